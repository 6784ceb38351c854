"""What each rule drops, with its measure, and what it leaves alone."""

import random
import string

import pytest

from data_pipeline.config import Rules
from data_pipeline.filters import RULES
from data_pipeline.filters.garbled import Garbled
from data_pipeline.filters.length import Length
from data_pipeline.filters.lines import Lines
from data_pipeline.filters.raw_length import RawLength
from data_pipeline.filters.repetition import Repetition
from data_pipeline.filters.symbols import Symbols

PROSE = (
    "The quick brown fox did not jump over anything today; it slept, as foxes do, under the old pear tree.\n"
    "When evening came the farmer counted his hens, found all of them at home, and went to bed content.\n"
    "“Naïve café owners,” she wrote — in Zürich — “pay €20 for crème brûlée.”\n"
)
CODE = '''def merge(left, right):
    """Merges two sorted lists."""
    out = []
    while left and right:
        out.append((left if left[0] <= right[0] else right).pop(0))
    return out + left + right
'''
# ruff: noqa: RUF001  (Chinese and typographic punctuation is what is tested)
CHINESE = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n白日依山尽，黄河入海流。欲穷千里目，更上一层楼。\n"
LATEX = (
    r"\begin{align} \lambda_h &= \exp\left(-\frac{8h}{H}\right), & q_s^\top k_t &= \sum_{d} q_{sd} k_{td} \end{align} "
    r"where the sum runs over heads."
)
TABLE = "| name | size | colour |\n|------|------|--------|\n" + "".join(
    f"| thing{n} | {n * 7} | blue{n % 3} |\n" for n in range(8)
)
NOISE = random.Random(0)


@pytest.mark.parametrize(
    "text", [PROSE, CODE, CHINESE, LATEX, TABLE], ids=["prose", "code", "chinese", "latex", "table"]
)
def test_good_text_passes_the_rules_on_by_default(text):
    assert {name: drop for name, rule in Rules().active().items() if (drop := rule(text))} == {}


DROPPED = {
    "too short": (Length(min_bytes=10), "tiny", "min_bytes", 4),
    "short in bytes, not characters": (Length(min_bytes=10), "四个汉", "min_bytes", 9),
    "too long": (Length(min_bytes=1, max_bytes=10), "x" * 11, "max_bytes", 11),
    "too long to be edited": (RawLength(max_bytes=11), "四个汉字", "max_bytes", 12),
    "binary": (Garbled(), bytes(range(256)).decode("utf-8", "replace"), "max_share", None),
    "utf-8 read as latin-1": (
        Garbled(),
        ("Düsseldorf hält große Bäume für schön. " * 5).encode().decode("latin-1"),
        "max_share",
        None,
    ),
    "russian read as latin-1": (Garbled(), ("Книга, и дом. " * 5).encode().decode("latin-1"), "max_share", None),
    "utf-8 read as windows-1252": (
        Garbled(),
        ("“Don’t” — she said… " * 5).encode().decode("cp1252", "replace"),
        "max_share",
        None,
    ),
    "line noise": (Symbols(), "".join(NOISE.choices(string.punctuation, k=400)), "max_symbols", 1.0),
    "numbers": (Symbols(), " ".join(str(NOISE.random()) for _ in range(50)), "min_letters", 0.0),
    "blob": (Lines(max_line=1000), "".join(NOISE.choices(string.ascii_letters, k=1001)), "max_line", 1001),
    "minified": (Lines(max_mean=100), ("var a=1;" * 20 + "\n") * 3, "max_mean", 160),
    "links alone": (Lines(max_bullets=0.9), "Read also:\n" + "- another page\n" * 19, "max_bullets", 0.95),
    "teasers": (Lines(max_ellipses=0.3), "The farmer counted his hens and…\nHe slept.\n" * 5, "max_ellipses", 0.5),
    # On one line, where no run of three words is common.
    "a passage again and again": (
        Repetition(max_repeated_words=0.3),
        " ".join(PROSE.split() * 8),
        "max_repeated_words",
        (7 * len(PROSE.split()) - 9) / (8 * len(PROSE.split())),
    ),
    "repeated lines": (Repetition(), "the same line again\n" * 30, "max_duplicate_lines", 29 / 30),
    "repeated words": (Repetition(), "buy it now " * 40, "max_top_words", 1.0),
}


@pytest.mark.parametrize(("rule", "text", "measure", "value"), DROPPED.values(), ids=DROPPED)
def test_dropped_with_its_measure_value_and_threshold(rule, text, measure, value):
    drop = rule(text)
    assert drop.measure == measure
    assert drop.threshold == getattr(rule, measure)
    if value is not None:
        assert drop.value == pytest.approx(value)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("text", ["", " \n\t\n", "\0"], ids=["empty", "blank", "null"])
def test_nothing_to_measure_is_no_error(rule, text):
    rule()(text)
