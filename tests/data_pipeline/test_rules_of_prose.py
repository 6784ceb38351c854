"""The rules that only prose has to pass: what they drop, and the good text that looks odd to them."""

import random

import pytest

# ruff: noqa: RUF001  (Chinese punctuation is what is tested)
from data_pipeline.filters.boilerplate import Boilerplate
from data_pipeline.filters.broken_sentences import BrokenSentences
from data_pipeline.filters.curly_brackets import CurlyBrackets
from data_pipeline.filters.keyboard import Keyboard
from data_pipeline.filters.language import Language
from data_pipeline.filters.line_ends import LineEnds
from data_pipeline.filters.logs import Logs
from data_pipeline.filters.placeholder import Placeholder
from data_pipeline.filters.stop_words import StopWords
from data_pipeline.filters.word_order import WordOrder
from data_pipeline.filters.words import Words
from tests.data_pipeline.corpus import prose
from tests.data_pipeline.test_filters import CHINESE, CODE, LATEX, PROSE, TABLE

STORY = (
    "When the old miller died he left the mill to his eldest son. The second got the donkey, and the youngest was left "
    "with the cat. He was sad about it. What could a cat be good for? But the cat put on a pair of boots, threw a sack "
    "over its shoulder and walked out of the door on two legs, as a person would. In the evening it came back with a "
    "partridge for the king. Nobody in the village had ever seen such a thing. They talked about it until the spring.\n"
)
POEM = (
    "Tyger Tyger, burning bright,\nIn the forests of the night;\n"
    "What immortal hand or eye,\nCould frame thy fearful symmetry?\n"
)
CZECH = "Čtvrtý vlk utekl do lesa za mlýnem, kde prý straší. Starý mlynář zemřel a nechal synovi jen kocoura. " * 3
LICENSE = (
    "Copyright 2026 the authors. All rights reserved. Redistribution and use in source and binary forms are permitted "
    "provided that the above notice is kept in all copies. The software comes as it is, and nobody is liable for what "
    "it does to those who use it. The names of the authors may not be used to promote what is derived from it.\n"
)
# No line of it ends a sentence.
VERSE = (
    "Where the river bends below the mill,\nAnd the reeds stand up in the cold,\nA heron waits on one leg still\n"
    "For the fish that swam here of old —\n\nThe wheel that turned is turning no more,\nThe miller is gone,\n"
    "And nobody knocks at the crooked door\nBut the wind and the rain;\n\nO the wind and the rain and the years,\n"
    "The grass on the roof, the owl in the hall,\nThe song of the wheel that nobody hears\nAnd the moss on the wall\n"
)
DRAMA = (
    "MILLER:\nWhat, ho! who knocks? is't thou, my cat? come in!\nO night! o rain! that ever I was born!\n\n"
    "CAT:\nFear not, my lord! the king is at the gate;\n'Go!' said he, 'go! and bring the miller here!'\n\n"
    "MILLER:\nAlack! what shall I say? what shall I wear?\nO cat! good cat! thou art my only heir.\n"
)
MANUAL = (
    "# Mill\n\nGrinds **grain** of any kind; see [the site](https://mill.example/terms).\n\n## What it can do\n\n"
    + "".join(
        f"- grind {grain} of the year\n" for grain in ("wheat", "rye", "barley", "oats", "maize", "rice", "spelt")
    )
    + "\n## How it is called\n\n```js\nmill({grain: 'rye'}, {stones: {upper: 1, lower: 2}})\n```\n\n"
    + TABLE
    + "\n## Who made it\n\nThe miller and his sons, with a little help from the cat\n"
)
ARTICLE = (
    r"\section{The mill}\label{sec:mill} As \cite{miller2020} has shown, the wheel turns at $v_{max}$ or less, "
    r"and \emph{never} faster \footnote{Unless it rains.}; see \ref{fig:wheel} for what was measured, and "
    "\\begin{equation}\n\\frac{a}{b} = \\sum_{i} x_{i}\n\\end{equation}\nfor the law that it obeys.\n"
)
RULES = [
    *(Words(), StopWords(), BrokenSentences(), WordOrder(), Keyboard(), Boilerplate(), Logs()),
    *(LineEnds(), Placeholder(), CurlyBrackets()),
]
GOOD = {
    "story": STORY,
    "poem": POEM,
    "verse": VERSE,
    "drama": DRAMA,
    "czech": CZECH,
    "license": LICENSE,
    "chinese": CHINESE,
    "manual": MANUAL,
    "article": ARTICLE,
    "made up": prose(1),
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_good_text_passes(text):
    language, drop = Language().judge(text)
    asked = [rule for rule in RULES if language in getattr(rule, "languages", (language,))]
    assert [drop, *(rule(text) for rule in asked)] == [None] * (1 + len(asked))


@pytest.mark.parametrize("text", [PROSE, CODE, LATEX], ids=["prose", "code", "latex"])
def test_code_and_formulas_pass_the_rules_on_by_default(text):
    assert [drop for rule in (Boilerplate(), Logs(), BrokenSentences()) if (drop := rule(text))] == []


def shuffled(text, lower=False):
    words = text.split()
    random.Random(3).shuffle(words)
    text = " ".join(words)
    return "".join(c for c in text.lower() if c.isalpha() or c == " ") if lower else text


MENU = "Home\nAbout us\nSign in | Sign up\nShopping cart\nAccept all cookies\nPrivacy policy\nContact us\nThe weather\n"
LOG = "".join(f"2026-11-22 03:0{n % 10}:11,20{n} INFO worker-{n}: processed {n * 7} items\n" for n in range(20))
TITLES = "".join(f"The {word} of the old mill and what became of it\n" for word in "ABCDEFGHIJKLMNOP")
CHINESE_TITLES = "".join(f"老磨坊主的{word}和那只猫\n" for word in "一二三四五六七八九十百千")
STYLE = "The mill stands by the river. " + "p.mill { color: red; margin: 0 } " * 20
MASHED = " ".join("".join(random.Random(n).choices("asdfghjkl", k=6)) for n in range(60))

DROPPED = {
    "too few words": (Words(), "one two three", "min_words", 3),
    "long words": (Words(), "extraordinarilylongwords " * 30, "max_mean_length", 24),
    "short words": (Words(), "a b c d e " * 10, "min_mean_length", 1),
    "numbers": (Words(), "the 1 2 3 4 5 6 7 | " * 40, "min_alphabetic", 1 / 8),
    "key words": (StopWords(), "cheap shoes boots sandals " * 20, "min_different", 0),
    "shuffled": (BrokenSentences(), shuffled(STORY * 2), "max_share", None),
    "shuffled without marks": (WordOrder(), shuffled(STORY * 3, lower=True), "max_share", None),
    "mashed": (Keyboard(), MASHED, "max_share", None),
    "menu": (Boilerplate(), MENU, "max_share", None),
    "log": (Logs(), LOG, "max_share", 1.0),
    "titles": (LineEnds(), TITLES + STORY, "min_share", 1 / 17),
    "chinese titles": (LineEnds(), CHINESE_TITLES, "min_share", 0),
    "placeholder": (Placeholder(), STORY + "Lorem ipsum dolor sit amet. LOREM IPSUM.", "max_count", 2),
    "style sheet": (CurlyBrackets(), STYLE, "max_per_word", 20 / (6 + 20 * 7)),
    "template": (CurlyBrackets(), "Dear {{ user.name }}, the {{ mill }} is open. " * 4, "max_per_word", 4 / 10),
}


@pytest.mark.parametrize(("rule", "text", "measure", "value"), DROPPED.values(), ids=DROPPED)
def test_dropped_with_its_measure_value_and_threshold(rule, text, measure, value):
    drop = rule(text)
    assert (drop.measure, drop.threshold) == (measure, getattr(rule, measure))
    if value is not None:
        assert drop.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (STORY, "en"),
        ("Der alte Müller starb und hinterließ seinem jüngsten Sohn nichts als einen Kater.", "de"),
        ("老磨坊主去世了，只给最小的儿子留下了一只猫。", "zh"),
        ("Старый мельник умер и оставил младшему сыну только кота.", "ru"),
    ],
    ids=["en", "de", "zh", "ru"],
)
def test_language(text, code):
    assert Language().judge(text) == (code, None)
    assert Language(allowed=("fr",)).judge(text)[1].value == code
    assert Language(min_confidence=1.0).judge(text)[1].measure == "min_confidence"


def test_text_in_no_language_is_dropped():
    code, drop = Language().judge(MASHED)
    assert (code, drop.measure, drop.value) == ("zxx", "allowed", "zxx")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("text", ["", " \n\t\n", "\0", "a"], ids=["empty", "blank", "null", "letter"])
def test_nothing_to_measure_is_no_error(rule, text):
    rule(text)
