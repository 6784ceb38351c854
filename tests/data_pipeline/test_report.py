"""The report's figures, and that its page shows hostile documents as text only."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from data_pipeline.config import compose
from data_pipeline.report import stages_in_words
from data_pipeline.report_page import flow, page
from data_pipeline.run import run
from tests.data_pipeline.corpus import prose

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" & 'more' </pre></details>"


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name, texts in {
        "good": [prose(n) for n in range(10)],
        "bad": ["tiny " + HOSTILE, "Buy the very same thing here today.\n" * 60, " ", prose(3)],
    }.items():
        (folder / name).mkdir()
        for number, text in enumerate(texts):
            (folder / name / f"{number}<b>.txt").write_text(text)
    sources = ", ".join(f"{n}: {{kind: tree, path: {folder / n}, suffixes: [.txt]}}" for n in ("good", "bad"))
    options = ["~sources.main", f"sources={{{sources}}}", "heldout_fraction=0.2", "tokenizer.vocab_size=400", "tasks=2"]
    options += ["rules.length.min_bytes=200", "edits.html=null", "workers=1"]
    run(compose(["pipeline=text", f"output={folder}/out", *options]))
    return folder / "out"


def test_stages_add_up_by_source_and_language(output):
    report = json.loads((output / "report.json").read_text())
    for stage in report["stages"]:
        for unit in ("documents", "bytes"):
            for kind in ("sources", "languages"):
                assert sum(entry[unit] for entry in stage[kind].values()) == stage[unit]
    counts = {stage["stage"]: stage["documents"] for stage in report["stages"]}
    assert counts == {"read": 13, "rules": 11, "exact": 10, "lines": 10, "near": 10}
    assert stages_in_words(report) == "13 documents read, 11 after rules, 10 after exact, 10 after lines, 10 after near"
    last = report["stages"][-1]
    assert set(last["languages"]) == {"en"}
    tokens = sum(split["tokens"] for split in report["splits"].values())
    assert last["tokens_estimated"] == pytest.approx(tokens, rel=1e-3)
    assert report["quarantine"]["empty"]["documents"] == 1


def test_each_rule_has_examples_with_value_and_threshold(output):
    drops = json.loads((output / "report.json").read_text())["drops"]
    assert {name: entry["documents"] for name, entry in drops.items()} == {
        "length": 1,
        "repetition": 1,
        "exact_duplicate": 1,
    }
    (example,) = drops["length"]["examples"]
    assert example["excerpt"] == "tiny " + HOSTILE
    assert example["value"] < example["threshold"] == 200
    assert drops["length"]["sources"] == {"bad": 1}


VOID = ("meta", "rect", "path", "br")


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_hostile_documents_are_text(output):
    seen = Seen()
    seen.feed((output / "report.html").read_text())
    assert seen.open == []
    assert not {"script", "img", "b<"} & {tag for tag, _ in seen.tags}
    assert not [attributes for _, attributes in seen.tags if any(name.startswith("on") for name in attributes)]
    assert HOSTILE in seen.text
    assert "0<b>.txt" in seen.text
    for heading in ("By source", "By language", "Quarantined", "Edits", "Drops", "Shards"):
        assert heading in seen.text


def test_equal_runs_write_equal_pages(output):
    report = json.loads((output / "report.json").read_text())
    assert page(report) == (output / "report.html").read_text()


def test_the_flow_shows_what_is_lost():
    stages = [{"stage": "a", "bytes": 2000, "documents": 4}, {"stage": "b", "bytes": 500, "documents": 1}]
    picture = flow(stages)
    assert "−75.0%" in picture  # noqa: RUF001
    assert picture.count("<rect") == 2
    assert flow([]).startswith("<svg")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_runs_nothing_of_a_hostile_document(output, tmp_path):
    hostile = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    report = json.loads((output / "report.json").read_text())
    for entry in report["drops"].values():
        for example in entry["examples"]:
            example |= {"id": hostile, "excerpt": "</pre></details>" + hostile}
    report["quarantine"] = {hostile: {"documents": 1, "bytes": 1, "examples": [{"id": hostile, "detail": hostile}]}}
    report["sources"] = {hostile: {**next(iter(report["sources"].values())), "category": hostile}}
    (tmp_path / "report.html").write_text(page(report))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    url = (tmp_path / "report.html").as_uri()
    shown = subprocess.run(["chromium", *flags, url], capture_output=True, text=True, timeout=60).stdout
    assert "<title>Cleaning report</title>" in shown
    assert "<script" not in shown
    assert "<img" not in shown
    # The policy alone holds as well: the same page with the texts put in as they are.
    (tmp_path / "raw.html").write_text(page(report).replace("</h1>", f"</h1>{hostile}"))
    shown = subprocess.run(
        ["chromium", *flags, (tmp_path / "raw.html").as_uri()], capture_output=True, text=True
    ).stdout
    assert "<script" in shown
    assert "<title>Cleaning report</title>" in shown
