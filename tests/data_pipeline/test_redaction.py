"""No secret of a setting is stored or printed: variables of the environment, credentials of URLs."""

import json
import pickle
import time

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from data_pipeline import redaction
from data_pipeline.config import compose
from data_pipeline.errors import InputError, StageError
from data_pipeline.redaction import HIDDEN, redacted, resolve, restored, storable, written
from data_pipeline.run import check, main
from data_pipeline.selfclean.rounds import table
from data_pipeline.sources import Warc
from tests.data_pipeline.corpus import prose

SECRET = "mellon-and-friend"


@pytest.fixture(autouse=True)
def _nothing_resolved_yet(monkeypatch):
    monkeypatch.setattr(redaction, "_written", {})
    monkeypatch.setattr(redaction, "_values", {})
    monkeypatch.setenv("DOOR", SECRET)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a/b.json is gone", f"https://{HIDDEN}@host/a/b.json is gone"),
        ("https://host/m.json?sig=abc%2F&t=1: no", f"https://host/m.json?{HIDDEN}: no"),
        (
            "URL('http://host:80/m?sig=1') and s3://key:pw@b/c",
            f"URL('http://host:80/m?{HIDDEN}') and s3://{HIDDEN}@b/c",
        ),
        ("simplecache::https://me@host/x", f"simplecache::https://{HIDDEN}@host/x"),
        ("https://p@ss@host/x@y?q#part", f"https://{HIDDEN}@host/x@y?{HIDDEN}#part"),
        ("https://${oc.env:A}:${oc.env:B}@host/x?t=${oc.env:C}&u=${oc.env:D}", None),
        ("https://me:${oc.env:B}@host/x?t=1&u=${oc.env:D}", f"https://{HIDDEN}@host/x?{HIDDEN}"),
        ("runs/what?.json of me@host, 3:4, file:///a/b", None),
    ],
)
def test_credentials_of_urls(text, shown):
    assert redacted(text) == storable(text) == (shown or text)
    assert str(InputError(text)) == str(StageError(text)) == (shown or text)
    assert redacted(redacted(text)) == redacted(text)


def test_a_message_cannot_write_over_a_terminal():
    kept = "tab\t, accents é, 中文, हिन्दी, 😀, a\u200db"
    assert str(InputError(kept)) == kept
    assert str(InputError("\x1b[2Ja\rb\x9b\u202ec\u2066d\ud800\0")) == r"\x1b[2Ja\rb\x9b\u202ec\u2066d\ud800\x00"


def test_a_table_takes_names_to_the_letter(capsys):
    figures = {"documents": [1, 2], "tokens": [1, 2]}
    filter = {"bands": {}, "default": [0.1, 0.2]}
    Console(markup=False, width=200).print(table([{"round": 1, "kept_of": {"[/x] [red]": figures}, "filter": filter}]))
    assert "[/x] [red]" in capsys.readouterr().out


def test_time_grows_linearly_with_a_message():
    for piece in ("a", "a://", "x://@", "://?,", "https://u@h/?,,", "${oc.env:"):
        began = time.perf_counter()
        redacted(piece * 200_000)
        assert time.perf_counter() - began < 5, piece


def settings() -> OmegaConf:
    return OmegaConf.create(
        {
            "url": "https://host/${oc.env:DOOR}/m.json",
            "again": {"list": ["${url}?sig=1", 3], "plain": "text", "unset": "${oc.env:NOWHERE_SET,eight}"},
            "number": "${oc.decode:${oc.env:COUNT}}",
        }
    )


def test_interpolations_stay_in_what_is_stored_and_are_resolved_again(monkeypatch):
    monkeypatch.setenv("COUNT", "12")
    values = resolve(settings())
    assert values["url"] == f"https://host/{SECRET}/m.json"
    assert (values["number"], values["again"]["unset"]) == (12, "eight")
    stored = json.loads(json.dumps(storable(values)))
    assert SECRET not in json.dumps(stored)
    assert stored["url"] == written(values["url"]) == "https://host/${oc.env:DOOR}/m.json"
    assert stored["again"]["list"] == ["https://host/${oc.env:DOOR}/m.json?***", 3]
    assert redacted(f"cannot read {values['url']}: {SECRET}") == f"cannot read {stored['url']}: ${{oc.env:DOOR}}"
    problems = []
    assert restored(stored, values, problems) == values  # the same command
    del stored["again"]["list"]
    monkeypatch.setenv("DOOR", "another one")
    assert restored(stored, {}, problems)["url"] == "https://host/another one/m.json"
    assert storable(restored(stored, {}, problems)) == stored
    assert not problems


def test_a_secret_that_is_not_there_is_named(monkeypatch):
    monkeypatch.delenv("DOOR")
    stored, problems = {"a": {"b": "x/${oc.env:DOOR}"}, "c": ["https://***@host/y"]}, []
    restored(stored, {"a": {"b": "x/other"}, "c": ["https://me:pw@elsewhere/y"]}, problems)
    assert [line.partition(": ")[0] for line in problems] == ["a.b=x/${oc.env:DOOR}", "c=https://***@host/y"]
    assert "DOOR is not set" in problems[0]
    assert restored({"c": ["https://***@host/y"]}, {"c": ["https://me:pw@host/y"]}, []) == {
        "c": ["https://me:pw@host/y"]
    }


def test_messages_show_paths_and_short_values(monkeypatch, tmp_path):
    for name, value in (("PLACE", str(tmp_path)), ("SHORT", "abc"), ("USER", "somebody-else")):
        monkeypatch.setenv(name, value)
        resolve(OmegaConf.create({"x": f"${{oc.env:{name}}}"}))
        assert redacted(f"in {value} x") == f"in {value} x"
        assert storable(value) == f"${{oc.env:{name}}}"


def test_a_task_of_slurm_gets_the_variable_and_not_its_value(monkeypatch):
    resolve(OmegaConf.create({"path": "s3://${oc.env:DOOR}/x"}))
    source = Warc(kind="warc", path=f"s3://{SECRET}/x")
    data = pickle.dumps(source)
    assert SECRET.encode() not in data
    assert pickle.loads(data) == source
    monkeypatch.setenv("DOOR", "other")
    assert pickle.loads(data).path == "s3://other/x"


def test_no_file_of_a_run_and_no_line_of_it_has_the_secret(tmp_path, capsys, monkeypatch):
    """A run that fails in the middle, so that tracebacks with values of variables are written, and then goes on."""
    source = tmp_path / SECRET
    source.mkdir()
    for number in range(12):
        (source / f"{number}.txt").write_text(prose(number))
    output = tmp_path / "out"
    words = ["pipeline=text", f"input={tmp_path}/${{oc.env:DOOR}}", f"output={output}", "tasks=1", "workers=1"]
    words += ["tokenizer.vocab_size=400", "near_duplicates=null", "line_duplicates=null", "exact_duplicates=false"]
    broken = output / "work/ruled"
    broken.parent.mkdir(parents=True)
    (output / "pipeline.json").write_text(json.dumps(check(compose(words))))
    broken.write_text("in the way")
    assert main(words) == 1
    assert "Traceback" in next(output.rglob("task_*.log")).read_text()
    broken.unlink()
    assert main(words) == 0
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    texts = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert not [path for path, text in texts.items() if SECRET.encode() in text]
    assert b"${oc.env:DOOR}" in texts[output / "pipeline.json"]
    monkeypatch.delenv("DOOR")
    assert main(words) == 2
    assert "DOOR" in capsys.readouterr().err
