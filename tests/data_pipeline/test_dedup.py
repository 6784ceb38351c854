"""Duplicates across sources: whose copy stays, and the lines that many documents share."""

import json

import pytest

from data_pipeline.config import NearDuplicates, compose
from data_pipeline.dedup.lines import line_hashes, lines_to_cut
from data_pipeline.run import run
from data_pipeline.shards import Manifest, read_documents
from data_pipeline.steps.documents import cut_lines
from tests.data_pipeline.corpus import prose


def clean(tmp_path, sources, *options, tasks=3):
    """Runs the pipeline over {source: ([texts], settings)}; kept ids, drops and edits."""
    entries = []
    for name, (texts, settings) in sources.items():
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / name / f"{number:03d}.txt").write_text(text)
        entries.append(f"{name}: {{kind: tree, path: {tmp_path / name}, suffixes: [.txt]{settings}}}")
    output = tmp_path / "out"
    arguments = [
        f"output={output}",
        "workers=1",
        "~sources.main",
        f"sources={{{', '.join(entries)}}}",
        f"tasks={tasks}",
    ]
    run(compose(["pipeline=text", *arguments, "heldout_fraction=0", "tokenizer.vocab_size=400", *options]))
    kept = {d.metadata["id"] for d in read_documents(Manifest.load(output / "train/manifest.json"))}
    drops = [json.loads(line) for path in output.glob("drops/*/*.jsonl") for line in path.open()]
    edits = [json.loads(line) for path in output.glob("edits/*.jsonl") for line in path.open()]
    return kept, drops, edits


@pytest.mark.parametrize("first", ["a", "b", "c"])
def test_the_copy_of_the_source_of_highest_priority_stays(tmp_path, first):
    """Of exact duplicates (0 to 2) as of near ones (3 to 5); document 6 of each source is its own."""

    def copy(number, source):
        text = prose(number)
        return text if number < 3 else text.replace("river", f"brook{source}", 1)

    sources = {
        name: ([copy(number, name) for number in range(6)] + [prose(ord(name))], f", priority: {3 * (name == first)}")
        for name in "abc"
    }
    kept, drops, _ = clean(tmp_path, sources)
    assert kept == {f"{first}/{n:03d}.txt" for n in range(6)} | {f"{name}/006.txt" for name in "abc"}
    others = set("abc") - {first}
    for kind, numbers in {"exact_duplicate": range(3), "near_duplicate": range(3, 6)}.items():
        dropped = [drop["id"] for drop in drops if drop["filter"] == kind]
        assert sorted(dropped) == sorted(f"{name}/{n:03d}.txt" for name in others for n in numbers)
    assert all(drop["kept"] == f"{first}{drop['id'][1:]}" for drop in drops)
    report = json.loads((tmp_path / "out/report.json").read_text())
    (example, *_) = report["drops"]["near_duplicate"]["examples"]
    assert f"kept: {example['kept']}" in (tmp_path / "out/report.html").read_text()


NOTICE = "This article is brought to you by the friends of page 3.\n"


def test_lines_that_many_documents_share_are_taken_out(tmp_path):
    code = "```\nThe same long line of code in every document.\n```\n"
    texts = [prose(n) + NOTICE.replace("3", str(n)) + code for n in range(8)]
    few = [prose(50 + n) + "This line is found in but a few of the documents.\n" for n in range(3)]
    mostly = ["\n".join([prose(90, sentences=3)] + [NOTICE.replace("page", "PAGE").strip()] * 30)]
    options = ["line_duplicates.min_documents=4", "rules.repetition=null", "near_duplicates=null"]
    kept, drops, edits = clean(tmp_path, {"a": (texts + few + mostly, "")}, *options)
    lines = [edit for edit in edits if edit["edit"] == "line_duplicates"]
    assert {edit["id"] for edit in lines} == {f"a/{n:03d}.txt" for n in range(8)}
    for edit in lines:
        assert (edit["measure"], edit["value"], edit["threshold"]) == ("documents", 9, 4)
        assert edit["bytes_before"] - edit["bytes_after"] == len(NOTICE)
    assert [(drop["id"], drop["filter"], drop["measure"]) for drop in drops] == [
        ("a/011.txt", "line_duplicates", "min_kept")
    ]
    assert drops[0]["value"] < drops[0]["threshold"] == 0.3
    assert kept == {f"a/{n:03d}.txt" for n in range(11)}


def test_lines_are_equal_but_for_case_digits_and_space():
    one, two, three, short = line_hashes("Page 3  of 7\npage 4 of 9\npage of it\n of 3 \n", 9)
    assert one == two != three
    assert short is None


def test_a_shared_line_is_taken_out_whole_and_never_beside_code():
    """A piece of a line beside inline code is no line of its own."""
    notice, code = "Brought to you by the friends.\n", "Brought to you by the friends. `x`\n"
    text = "A river.\n" + notice + code + "```\n" + notice + "```\n| " + notice[:-1] + " |\n"
    often = set(line_hashes(text, 12)) - {None} - set(line_hashes("A river.", 0))
    cut = lines_to_cut(text, line_hashes(text, 12), often)
    assert cut_lines(text, cut) == text.replace(notice, "", 1)


def test_the_number_of_tasks_does_not_change_what_stays(tmp_path):
    results = []
    for tasks in (1, 4):
        folder = tmp_path / str(tasks)
        folder.mkdir()
        sources = {
            "a": ([prose(n) + NOTICE for n in range(6)], ""),
            "b": ([prose(n) for n in range(6)], ", priority: 1"),
        }
        results.append(clean(folder, sources, "line_duplicates.min_documents=5", tasks=tasks))
    assert results[0][0] == results[1][0] == {f"b/{n:03d}.txt" for n in range(6)}


def test_signatures_estimate_the_similarity_and_do_not_depend_on_the_pieces(tmp_path, monkeypatch):
    from data_pipeline.dedup import near

    step = near.signatures(NearDuplicates(words=3, buckets=50, hashes=8), tmp_path)
    letters = str.maketrans("0123456789", "abcdefghij")  # all numbers are alike to it
    words = [str(number).translate(letters) for number in range(6000)]
    one, other = " ".join(words[:5000]), " ".join(words[1000:])
    first, second = ([hash for bucket in signature(step, text) for hash in bucket] for text in (one, other))
    estimate = sum(a == b for a, b in zip(first, second, strict=True)) / 400
    assert estimate == pytest.approx(4000 / 6000, abs=0.08)  # three standard deviations
    monkeypatch.setattr(near, "PIECE", 100)
    assert [hash for bucket in signature(step, one) for hash in bucket] == first
    assert step.get_shingles("two words").shape == (0, 1)


def signature(step, text):
    return step.get_signature(step.get_shingles(text))
