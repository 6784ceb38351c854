"""No script of the world loses ordinary text: paragraphs in many languages, and made-up words in the letters of every
script that Unicode has."""

import base64
import collections
import json
import random
import unicodedata
from pathlib import Path

import pytest

from data_pipeline.config import compose
from data_pipeline.dedup.lines import line_hashes
from data_pipeline.letters import WORDS, count_words, plain

PARAGRAPHS = json.loads(Path(__file__).with_name("paragraphs.json").read_text())  # {language: text}
RULES = compose(["pipeline=jsonl", "input=/", "output=x"])


def drops(text):
    """{rule: measure} of every rule of prose that drops a text, whatever the others say."""
    language, drop = RULES.language.judge(text)
    asked = RULES.rules.active().items()
    found = {name: d for name, r in asked if language in getattr(r, "languages", (language,)) and (d := r(text))}
    return {name: d.measure for name, d in {**found, **({"language": drop} if drop else {})}.items()}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("text", PARAGRAPHS.values(), ids=PARAGRAPHS)
def test_ordinary_text_is_kept_however_its_marks_are_spelled(text, form):
    assert drops(unicodedata.normalize(form, text)) == {}


def script_letters():
    """{script: (letters, marks)} of all scripts of fontTools' tables, which are newer than Python's."""
    scripts = pytest.importorskip("fontTools.unicodedata")
    found = collections.defaultdict(lambda: ([], []))
    starts, names = scripts.Scripts.RANGES, scripts.Scripts.VALUES
    for place, (start, name) in enumerate(zip(starts, names, strict=True)):
        end = starts[place + 1] if place + 1 < len(starts) else start
        for character in map(chr, range(start, min(end, start + 500))):
            kind = scripts.category(character)
            if kind[0] == "M":
                found[name][1].append(character)
            elif kind[0] == "L" and kind != "Lu":
                found[name][0].append(character)
    return {name: sets for name, sets in found.items() if sets[0] and name not in ("Zyyy", "Zinh", "Zzzz")}


def test_made_up_words_of_every_script_are_kept_with_spaces_and_without():
    """The identifier may find them to be no language, where it knows the script; every other rule keeps them."""
    scripts, lost = script_letters(), {}
    assert len(scripts) > 150
    for name, (letters, marks) in scripts.items():
        chosen = random.Random(name)

        def word(letters=letters, marks=marks, chosen=chosen):
            signs = [chosen.choice(marks) if marks and chosen.random() < 0.6 else "" for _ in range(5)]
            return "".join(chosen.choice(letters) + sign for sign in signs[: chosen.randint(2, 5)])

        alphabet = name in ("Latn", "Grek", "Cyrl", "Armn")  # always with spaces
        for space in (" ", "") if count_words("".join(letters[:9])) == 9 else (" ",):
            sentences = [space.join(word() for _ in range(10)) + ". " for _ in range(6)]
            found = drops("\n".join("".join(sentences[at : at + 3]) for at in (0, 3)))
            if alphabet or name in ("Hebr", "Arab"):
                found.pop("language", None)
            found.pop("keyboard", None)  # random Latin letters are what it is for
            if found:
                lost[name, space] = found
    assert lost == {}


def test_a_letter_counts_once_with_its_marks():
    hindi, thai = "हैं में भारत", "เด็กๆ เล่น"
    assert plain(hindi) == "ह म भरत"
    assert WORDS.findall(hindi) == ["हैं", "में", "भारत"]
    assert (count_words(hindi), count_words(thai), count_words("这条河 is long")) == (3, 7, 5)
    assert plain("e\u0301a") == "ea"
    assert plain("བོད་ཡིག").split() == ["བད", "ཡག"]


def test_marks_tell_lines_and_words_apart_but_not_how_they_are_spelled():
    lines = ["café au lait", "cafe\u0301 au lait", "देश की भाषा का देश", "देश का भाषा का देश", "אֱלֹהִים"]
    one, two, three, four, five = line_hashes("\n".join(lines), 10)
    assert one == two
    assert three != four
    assert five is None  # five letters with their points


@pytest.mark.parametrize("text", ["=====\n-----\n" * 20, ". . . . .\n" * 30, "12 345 67\n" * 20, "※※※ ☞ ★★★\n" * 20])
def test_text_in_which_nothing_is_found_is_in_no_language(text):
    code, drop = RULES.language.judge(text)
    assert (code, drop.measure, drop.value) == ("zxx", "allowed", "zxx")


# Zhuang, with letters for tones, which the identifier takes for no language; Kongo, with the apostrophes of
# Windows-1252 read as Latin-1.
ZHUANG = """Gyoengqvunz ndaw mbanj cungj gyaez ciengqfwen. Boux geq caeuq lwgnyez doxcaez youq gyaeujmbanj, bouxsai boiq
rog, mehmbwk daenj buhmoq. Bouxboux cungj miz gienzleih doegsaw, hagfeiq cingqcingq mbouj yungh gyau."""
KONGO = """Nki\x92a bantu bakwiza ku mbanza? Mono i\x92mwana wa ngudi ame,
y\x92e mpangi zame zazo bena mu nzo a yaya."""


@pytest.mark.parametrize("text", [ZHUANG, KONGO], ids=["zhuang", "kongo"])
def test_latin_text_in_a_language_or_an_encoding_of_its_own_is_kept(text):
    assert drops(text) == {}


def test_codes_and_names_of_files_are_in_no_language():
    draw = random.Random(3)
    bytes_of_6 = (base64.b64encode(draw.randbytes(6)).decode() for _ in range(60))
    codes = ("".join(draw.choices("BCDFGHJKLMNPQRSTVWXZ", k=5)) for _ in range(60))
    files = (f"img_{draw.randrange(9999):04d}.jpg" for _ in range(60))
    for words in (bytes_of_6, codes, files):
        assert RULES.language.judge(" ".join(words))[0] == "zxx"


def test_a_script_that_the_identifier_does_not_know_is_an_unknown_language_and_stays():
    for text in ("ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ᎠᎴ ᏗᎪᏪᎵ", "ꆈꌠꁱꂷ ꀋꂶꊨ", "𐌰𐌱𐌲 𐌳𐌴𐌵", "އަހަރެމެންގެ ރަށުގެ"):
        assert RULES.language.judge(text) == ("und", None)
