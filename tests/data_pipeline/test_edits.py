"""What each edit changes, with its measure, and what it must leave: Markdown, LaTeX and code."""

import pytest

from data_pipeline.edits import EDITS
from data_pipeline.edits.characters import Characters
from data_pipeline.edits.html import Html
from data_pipeline.edits.notices import Notices
from data_pipeline.edits.numbers import Numbers
from data_pipeline.edits.punctuation import Punctuation
from data_pipeline.edits.urls import Urls

# ruff: noqa: RUF001  (unusual characters are what is tested)
EDITED = {
    "invisible": (Characters(), "a\u200bb\u00adc \ufeffd\u202ee", "abc de", "special_characters", 4),
    "spaces": (Characters(), "a\u00a0b\u2009c\u3000d", "a b c\u3000d", "special_characters", 2),
    "line ends": (Characters(), "a\r\nb\rc\x0cd", "a\nb\nc\nd", "special_characters", 3),
    "undecodable": (Characters(), "a\ufffdb\x00c\ue000d", "abcd", "special_characters", 3),
    "accents": (Characters(), "cafe\u0301 na\u0131\u0308ve", "café naı̈ve", "special_characters", 1),
    "tags": (Html(), "a <b>bold</b> word<br/>and <a href='x'>link</a>", "a bold word\nand link", "html_tags", 5),
    "scripts": (Html(), "a<script>if (x < 1) y()</script> b<!-- c -->", "a b", "html_tags", 2),
    "entities": (Html(), "salt &amp; pepper &#8211; &lt;3", "salt & pepper – <3", "html_tags", 3),
    "notices": (
        Notices(),
        "The mill.\nWe use cookies on this site.\nIt stood by a river.\nPlease enable JavaScript!\nTerms of Use\n",
        "The mill.\nIt stood by a river.\n",
        "notices",
        3,
    ),
    "urls": (Urls(), "See https://a.example/b?c=d#e, or www.f.example. End", "See, or. End", "urls", 2),
    "url in brackets": (Urls(), "source (http://a.example/x) says", "source says", "urls", 1),
    "chinese url": (Urls(), "见http://a.example/x。好", "见。好", "urls", 1),
    "exclamation": (Punctuation(), "Wow!!!!!!! No?????", "Wow! No?", "longest_run", 7),
    "full stops": (Punctuation(), "well......... yes", "well... yes", "longest_run", 9),
    "chinese marks": (Punctuation(), "好！！！！！吗", "好！吗", "longest_run", 5),
    "wide digits": (Numbers(), "２０２６年 ＡＢＣ", "2026年 ABC", "number_formats", 7),
    "thousands": (Numbers(), "it cost 1'234'567 francs", "it cost 1,234,567 francs", "number_formats", 1),
    "minus": (Numbers(), "at −5 degrees", "at -5 degrees", "number_formats", 1),
}


@pytest.mark.parametrize(("editor", "text", "expected", "measure", "value"), EDITED.values(), ids=EDITED)
def test_edited_with_its_measure_and_value(editor, text, expected, measure, value):
    edit = editor(text)
    assert edit.text == expected
    assert (edit.measure, edit.value) == (measure, value)
    assert edit.value > edit.threshold
    assert editor(edit.text) is None  # once is enough


KEPT = {
    "fenced code": "Text\n\n```html\n<b>x</b> http://a.example !!!!! 1'000\n```\nmore",
    "inline code": "use `<br> &amp; http://a.example/x` and ``a ` <b>``",
    "indented code": "Example:\n\n    x = '<b>' + \"http://a.example\" // !!!!!!\n    y = 1'000\n\nend",
    "formula": r"so $a <b> c$ and $$x !!!!!! y$$ and \[ <i> \] hold",
    "environment": "\\begin{align}\n a &= <b> \\\\ !!!!! &amp; \n\\end{align}\n",
    "markdown link": "see [the page](https://a.example/x?y=z) for it",
    "markdown": "# Title\n\n* **bold** _it_\n\n---\n\n| a | b |\n|---|---|\n| <b> | !!!!! |\n\n1. one\n",
    "rulers": "Title\n=====\n\n* * *\n\n_____\n",
    "code": "if (a<b && c>d) { List<int> x; cout << y; } // <stdin> ...\n",
    "numbers": "1,234.56 and 3.14 and 10:30 and -5 and 2026-11-22 and 6'2\" and it's 1990's",
    "chinese": "春眠不觉晓，处处闻啼鸟。《诗》……——“好”！\n",
    "emoji": "👩‍👩‍👧 and می‌خواهم",
    "notices in code": "Call it so:\n\n    TEXT = 'We use cookies on this site'\n\nand\n\n```\nPrivacy policy\n```\n",
    "a notice with a link": "Read our [privacy policy](/privacy) for more.\n",
    "a notice in a table": "| Privacy policy | short |\n",
    "a paragraph on privacy": "Our privacy policy "
    + "is a long text that nobody reads to its end, " * 5
    + "they say.\n",
    "a wrapped paragraph": "The shop changed its\nPrivacy Policy and its prices in\nthe same week.\n",
    "javascript": "JavaScript is a language of the web.\nCode in JavaScript runs in browsers.\n",
    "ellipsis": "well... and so on?! Yes!!!",
}


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT)
def test_left_to_the_byte(text):
    assert {name: edit.text for name, editor in EDITS.items() if (edit := editor()(text))} == {}


def test_a_page_goes_through_the_extractor():
    page = "<!DOCTYPE html><html><body><nav><a href='/'>Home</a></nav><main><p>The text of it.</p></main></body></html>"
    edit = Html()(page)
    assert edit.text == "The text of it.\n"
    assert edit.value > 0


@pytest.mark.parametrize("name", EDITS)
def test_a_threshold_that_is_not_crossed_leaves_the_text(name):
    text = "a\u200bb <b>c</b> http://a.example !!!!! １\nPrivacy policy\n"
    field = next(iter(EDITS[name].__dataclass_fields__))
    assert EDITS[name](**{field: 100})(text) is None
    assert EDITS[name]()(text) is not None


@pytest.mark.parametrize("name", EDITS)
def test_hostile_text_takes_linear_time(name):
    """A regular expression that backtracks would take minutes."""
    import time

    began = time.process_time()
    for piece in ("<b ", "$a", "[a](", "`", "\\begin{a}", "http://", "!", "&a", "    x\n", "|", "- ", "1'000'"):
        EDITS[name]()(piece * (20_000 // len(piece)) + "!!!!! <b>x</b> http://a.example/ 1'000")
    assert time.process_time() - began < 2
