"""A rule or an edit is one file: what registers itself is asked, and is a setting."""

import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from data_pipeline.edits import EDITS, ORDER
from data_pipeline.filters import RULES
from data_pipeline.registry import Register

FILE = """
from pydantic.dataclasses import dataclass
from mine import REGISTER
from data_pipeline.thresholds import STRICT, Count

@REGISTER.add("{name}", place={place}, on={on})
@dataclass(frozen=True, config=STRICT)
class Rule:
    max_vowels: Count = {count}

    def __call__(self, text):
        return None
"""


def test_a_file_in_the_folder_is_a_rule_and_a_setting(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "__init__.py").write_text("from data_pipeline.registry import Register\nREGISTER = Register()\n")
    (folder / "late.py").write_text(FILE.format(name="late", place=20, on=True, count=3))
    (folder / "early.py").write_text(FILE.format(name="early", place=10, on=False, count=5))
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    mine.REGISTER.import_folder("mine", mine.__path__)
    assert list(mine.REGISTER.classes()) == ["early", "late"]
    settings = TypeAdapter(mine.REGISTER.settings("Rules", "Rules of mine."))
    assert list(settings.validate_python({}).active()) == ["late"]
    chosen = settings.validate_python({"early": {"max_vowels": 7}, "late": None})
    assert {name: rule.max_vowels for name, rule in chosen.active().items()} == {"early": 7}
    for wrong in ({"later": {}}, {"early": {"max_vowel": 7}}, {"early": {"max_vowels": -1}}):
        with pytest.raises(ValidationError):
            settings.validate_python(wrong)
    for name in ("mine", "mine.late", "mine.early"):
        sys.modules.pop(name)


def test_a_name_is_registered_once_and_an_order_names_all():
    register = Register()
    register.add("one")(int)
    with pytest.raises(ValueError, match="is registered as 'one'"):
        register.add("one")(str)
    register.add("two")(str)
    assert list(register.classes(("two", "one"))) == ["two", "one"]
    with pytest.raises(ValueError, match="the order names"):
        register.classes(("two",))


def test_every_file_of_rules_and_edits_registers_its_own_name():
    for classes in (RULES, EDITS):
        assert all(kind.__module__.endswith(f".{name}") for name, kind in classes.items())
    assert tuple(EDITS) == ORDER
