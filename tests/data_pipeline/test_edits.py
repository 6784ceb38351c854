"""What each edit changes, with its measure, and what it must leave: Markdown, LaTeX and code."""

import json
import random
import time
from pathlib import Path

import pytest

from data_pipeline.edits import EDITS, make_edits
from data_pipeline.edits.characters import Characters
from data_pipeline.edits.html import Html
from data_pipeline.edits.notices import Notices
from data_pipeline.edits.numbers import Numbers
from data_pipeline.edits.punctuation import Punctuation
from data_pipeline.edits.urls import Urls
from data_pipeline.protected import protected_parts

# ruff: noqa: RUF001  (unusual characters are what is tested)
EDITED = {
    "invisible": (Characters(), "a\u200bb\u00adc \ufeffd\u202ee", "abc de", "special_characters", 4),
    "spaces": (Characters(), "a\u00a0b\u2009c\u3000d", "a b c\u3000d", "special_characters", 2),
    "line ends": (Characters(), "a\r\nb\rc\x0cd", "a\nb\nc\nd", "special_characters", 3),
    "windows-1252": (Characters(), "\x93Don\x92t\x94, caf\xe9\x92", "“Don’t”, café", "special_characters", 4),
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
    "url with chinese behind it": (
        Urls(),
        "请看https://a.example/photos也欢迎（www.b.example）留言",
        "请看也欢迎留言",
        "urls",
        2,
    ),
    "url with a particle": (Urls(), "자세히는 https://a.example/x에서 본다", "자세히는 에서 본다", "urls", 1),
    "url before a danda": (Urls(), "देखें https://a.example/x। फिर", "देखें। फिर", "urls", 1),
    "url with letters": (Urls(), "см. https://ru.a.example/wiki/Река и да", "см. и да", "urls", 1),
    "url in a remark": (Urls(), "(see HTTPS://a.example/x_(y)) and", "(see) and", "urls", 1),
    "entities as characters": (Html(), "a&nbsp;b&#8203;c bar&shy;ley &frac12;", "a bc barley ½", "html_tags", 4),
    "entities of entities": (Html(), "R&amp;amp;D &amp;nbsp; x &amp;lt;i&amp;gt;", "R&D   x &lt;i&gt;", "html_tags", 2),
    "attributes": (Html(), "<input disabled type=text>a <b and c> d</p>", "a <b and c> d\n", "html_tags", 2),
    "unknown entities": (Html(), "AT&T; &nosuch; &copyright; &copy;", "AT&T; &nosuch; &copyright; ©", "html_tags", 1),
    "flag": (Characters(), "🏴󠁧󠁢󠁥󠁮󠁧󠁿 a\U000e0041b", "🏴󠁧󠁢󠁥󠁮󠁧󠁿 ab", "special_characters", 1),
    "chinese minus": (Numbers(), "气温−5度，n−1", "气温-5度，n−1", "number_formats", 1),
    "chinese notice": (
        Notices(),
        "河\n请阅读privacy policy。\n" + "规定很长，" * 20 + "privacy policy。\n",
        "河\n" + "规定很长，" * 20 + "privacy policy。\n",
        "notices",
        1,
    ),
    "exclamation": (Punctuation(), "Wow!!!!!!! No?????", "Wow! No?", "longest_run", 7),
    "full stops": (Punctuation(), "well......... yes", "well... yes", "longest_run", 9),
    "arabic marks": (Punctuation(), "متى؟؟؟؟؟ قريبا،،،،", "متى؟ قريبا،", "longest_run", 5),
    "indic marks": (Punctuation(), "कब।।।।।", "कब।", "longest_run", 5),
    "ruby": (Html(), "<ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp></ruby>", "漢(kan)", "html_tags", 8),
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
    "a page in fenced code": "# Page\n\n```html\n<!DOCTYPE html>\n<html>\n<body>&nbsp;</body>\n</html>\n```\n\nend\n",
    "fenced code in a list": "1. Do:\n\n   ```html\n   <b>x</b>\u200b\u00a0!!!!!\n   ```\n- ~~~~\n  <b> ~~~\n  ~~~~\n",
    "fenced code in a quotation": "> ```\n> <b>x</b>\n> ```\n",
    "a fence in a fence": "````md\n```html\n<b>\n```\n<i>\n````\n",
    "a fence without end": "text\n\n```\n<b> http://a.example\n",
    "code on one line": "```<b>``` and ``<i> ` &amp;`` and `<u>\nwrapped`.\n",
    "indented code with empty lines": "So:\n  \n    <b>\n\n\t<i>\n   \n    <u>!!!!!\n\nend\n",
    "indented page": "    <!DOCTYPE html>\n    <html>\n\nis how a page begins.\n",
    "characters in code": "`a\u00a0b\u200b e\u0301` and\n\n    x = '\ufeff\r'\n",
    "latex": r"see \url{http://a.example/x} and \href{https://b.example}{\emph{<b>}} and \verb|<i>|, $a\n<b>$",
    "nested environments": "\\begin{a}\n<b>\\begin{a}<i>\\end{a}\n" + "<u> !!!!!\n" * 900 + "\\end{a}\n",
    "displayed formula": "\\[\n" + "x <b> !!!!! \\\\[2pt]\n" * 300 + "\\]\nand $$\n<i>\n$$\n",
    "a table without borders": "name | value\n--- | :---:\n<b> | !!!!!\nhttp://a.example | 1'000\n",
    "tables of restructuredtext": "===  ===\na    b\n===  ===\n<b>  !!!!!\n===  ===\n\n+---+\n| <b> |\n+---+\n",
    "links": '[a\nb](http://a.example/(x) "t") ![i](https://b.example/i.png) [![j](http://c.example)](http://d.example)\n',
    "definitions of links": 'See [mill].\n\n[mill]: https://mill.example/terms "Privacy policy"\n',
    "a shown tag": "Write &lt;b&gt; and &lt;!-- so or &lt;html&gt;.",
    "comparisons": "if a <b and c> d or x<a or i <p",
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


PIECES = json.loads(Path(__file__).with_name("pieces.json").read_text())


def test_a_second_run_of_all_edits_changes_nothing_and_protected_parts_stay():
    """Random texts of all that edits and protected parts begin and end with."""
    editors, edited = {name: editor() for name, editor in EDITS.items()}, 0
    for seed in range(1500):
        chosen = random.Random(seed)
        text = "".join(chosen.choices(PIECES, k=chosen.choice((3, 6, 12, 30))))
        changed, made = make_edits(editors, text)
        edited += changed != text
        assert make_edits(editors, changed) == (changed, {}), (seed, text)
        if made and not any(edit.extracted for edit in made.values()):
            at = 0
            for part in protected_parts(text):
                assert (at := changed.find(part, at) + len(part)) >= len(part), (seed, text, part)
    assert edited > 1000


def test_edits_take_no_more_in_the_order_in_which_they_are_made():
    editors = {name: editor() for name, editor in EDITS.items()}
    text = "a&nbsp;b &#104;ttp://a.example/x!!!!! <i>ｗｗｗ.b.example/y</i> &amp;lt;b&amp;gt; e&#769;"
    assert make_edits(editors, text)[0] == "a b! &lt;b&gt; é"
    assert make_edits(editors, "plain") == ("plain", {})


def test_a_page_shows_its_markup_as_entities_and_is_not_taken_for_a_page_again():
    page = "<html><body><main><p>Write &lt;html&gt; first, then &lt;b&gt;.</p></main></body></html>"
    editors = {"html": Html()}
    text, made = make_edits(editors, page)
    assert text == "Write &lt;html&gt; first, then &lt;b&gt;.\n"
    assert made["html"].extracted
    assert make_edits(editors, text) == (text, {})


HOSTILE = [
    "<b ",
    "$a",
    "[a](",
    "`",
    "\\begin{a}",
    "http://",
    "!",
    "&a",
    "    x\n",
    "|",
    "- ",
    "1'000'",
    "[[",
    "\\a{",
    "\\[",
    "$$",
    "```\n",
    "http://(",
    "=== ==\n",
    "&#38;",
]


@pytest.mark.parametrize("name", EDITS)
def test_hostile_text_takes_linear_time(name):
    """A regular expression that backtracks would take minutes."""
    began = time.process_time()
    for piece in HOSTILE:
        EDITS[name]()(piece * (20_000 // len(piece)) + "!!!!! <b>x</b> http://a.example/ 1'000")
    assert time.process_time() - began < 2
