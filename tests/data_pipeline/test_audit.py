"""The audit without a browser: sampling, the two files, the figures, and the command line."""

import fcntl
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.audit.__main__ import main
from data_pipeline.audit.agreement import decisions, summary, wilson
from data_pipeline.audit.answers import Answer, AnswersFile, now
from data_pipeline.audit.draw import draw
from data_pipeline.audit.samples import Samples
from data_pipeline.audit.sampling import strata, tails_and_borders
from data_pipeline.errors import InputError
from data_pipeline.files import sha256_of
from data_pipeline.shards.content import Shard, TokenizerInfo
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import read_shard
from data_pipeline.shards.scores import save_scores
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.stream.score_filter import ScoreFilter
from data_pipeline.tokenizer import train
from tests.data_pipeline.audit_factory import make_sample, make_samples
from tests.data_pipeline.corpus import prose


def answer(sample: str, verdict: str, auditor: str = "ann", **more) -> Answer:
    return Answer(sample, verdict, auditor, now(), **more)


class TestSampling:
    def test_people_see_tails_borders_and_a_control(self):
        scores = np.random.default_rng(1).permutation(np.arange(1000.0))
        scores[50] = np.nan
        chosen = tails_and_borders(scores, low=100, high=900, each=4, seed=0)
        by_place = {place: [c for c in chosen if c.place == place] for place in {c.place for c in chosen}}
        assert {place: len(found) for place, found in by_place.items()} == dict.fromkeys(
            ("low tail", "low border", "middle", "high border", "high tail"), 4
        )
        assert all(c.kept == (100 <= c.score <= 900) for c in chosen)
        assert all(c.score < 80 + 2 for c in by_place["low tail"])
        assert all(abs(c.score - 100) <= 22 for c in by_place["low border"])
        assert sorted(c.kept for c in by_place["high border"]) == [False, False, True, True]
        assert len({c.index for c in chosen}) == len(chosen)
        assert all(scores[c.index] == c.score for c in chosen)
        assert chosen == tails_and_borders(scores, low=100, high=900, each=4, seed=0)
        assert chosen != tails_and_borders(scores, low=100, high=900, each=4, seed=1)

    @pytest.mark.parametrize(
        ("low", "high"),
        [
            (low, high)
            for low in (None, -5.0, 3.0, 50.0, 200.0)
            for high in (None, 300.0, 96.0, 50.0)
            if low is None or high is None or low <= high
        ],
    )
    @pytest.mark.parametrize("documents", [0, 1, 2, 5, 100])
    def test_strata_cover_every_document_once_and_agree_with_the_filter(self, low, high, documents):
        ordered = np.arange(documents, dtype=np.float32)
        found = strata(ordered, low, high, width=3)
        covered = [index for _, _, start, stop in found for index in range(start, stop)]
        assert covered == list(range(documents))
        for place, kept, start, stop in found:
            for score in ordered[start:stop]:
                assert kept == ((low is None or score >= low) and (high is None or score <= high)), (place, score)

    def test_the_weighted_sample_gives_back_the_corpus(self):
        """Horvitz-Thompson: documents over their probability, summed, are the documents of the corpus."""
        scores = np.random.default_rng(0).normal(4, 1, 5000).astype(np.float32)
        chosen = tails_and_borders(scores, low=2.5, high=6.0, each=10, seed=0)
        assert sum(1 / c.probability for c in chosen) == pytest.approx(5000)
        assert sum(1 / c.probability for c in chosen if c.kept) == ((scores >= 2.5) & (scores <= 6.0)).sum()

    def test_bad_settings(self):
        with pytest.raises(ValueError, match="each=0 must be at least 1"):
            tails_and_borders(np.zeros(3), None, None, each=0, seed=0)
        with pytest.raises(ValueError, match=r"border=1\.0 must be between 0 and 1"):
            tails_and_borders(np.zeros(3), None, None, each=1, seed=0, border=1.0)


class TestSamples:
    def test_texts_come_back_as_they_were(self, tmp_path):
        texts = ["plain\n", "tab\tnul\x00 rtl\u202e שלום\r\n\u2028line", "", "x" * 300_000]
        samples = Samples.load(make_samples(tmp_path / "s.jsonl", texts))
        assert [samples.text(place) for place in range(len(samples))] == texts

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("{", "not JSON"),
            ("[1]", "no object with a text"),
            ('{"id": "a"}', "no object with a text"),
            ('{"id": "a", "text": "t", "source": "s", "place": "middle"}', "verdict: "),
            ('{"id": "a", "text": "t", "source": "s", "place": "up", "verdict": "keep"}', "place='up'"),
            ('{"id": "a", "text": "", "source": "s", "place": "middle", "verdict": "keep", "low": NaN}', "low="),
        ],
    )
    def test_a_line_that_is_no_sample_is_named(self, tmp_path, line, complaint):
        path = make_samples(tmp_path / "s.jsonl")
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(InputError, match=r"line 7: .*" + complaint):
            Samples.load(path)

    def test_ids_given_twice_and_empty_files_are_refused(self, tmp_path):
        path = make_samples(tmp_path / "s.jsonl")
        path.write_text(path.read_text() * 2)
        with pytest.raises(InputError, match="given more than once"):
            Samples.load(path)
        path.write_text("")
        with pytest.raises(InputError, match="holds no samples"):
            Samples.load(path)

    def test_a_file_that_changes_later_is_noticed(self, tmp_path):
        samples = Samples.load(path := make_samples(tmp_path / "s.jsonl"))
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(reversed(lines)))
        with pytest.raises(ValueError, match=r"changed|JSON"):
            samples.text(0)


class TestAnswers:
    def test_a_later_line_wins_and_auditors_are_apart(self, tmp_path):
        file = AnswersFile(tmp_path / "a.jsonl")
        for verdict in ("keep", "drop"):
            file.append(answer("x", verdict))
        file.append(answer("x", "unsure", "bob"))
        assert {(a.auditor, a.verdict) for a in AnswersFile(file.path).all()} == {("ann", "drop"), ("bob", "unsure")}
        assert len(file.path.read_text().splitlines()) == 3

    def test_a_torn_last_line_is_reported_and_never_joined(self, tmp_path):
        path = tmp_path / "a.jsonl"
        AnswersFile(path).append(answer("x", "keep"))
        whole = path.read_bytes()
        for cut in (1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole + whole[:cut])
            file = AnswersFile(path)
            assert file.torn == cut
            assert "torn" in file.problems()[0]
            file.append(answer("y", "drop"))
            assert {a.sample: a.verdict for a in AnswersFile(path).all()} == {"x": "keep", "y": "drop"}

    def test_two_files_open_at_once_see_each_other(self, tmp_path):
        one, two = AnswersFile(tmp_path / "a.jsonl"), AnswersFile(tmp_path / "a.jsonl")
        one.append(answer("x", "keep"))
        two.append(answer("y", "drop", "bob"))
        one.refresh()
        assert len(one.all()) == len(two.all()) == 2

    def test_an_append_waits_for_another_process_in_the_middle_of_one(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"sample": ')
        write = (
            "import sys; from data_pipeline.audit.answers import *; "
            "AnswersFile(sys.argv[1]).append(Answer('y', 'drop', 'bob', now()))"
        )
        with path.open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            other = subprocess.Popen([sys.executable, "-c", write, path])
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(1)
            held.write(b'"x", "verdict": "keep", "auditor": "ann", "time": ""}\n')
        assert other.wait(20) == 0
        file = AnswersFile(path)
        assert {a.sample: a.verdict for a in file.all()} == {"x": "keep", "y": "drop"}
        assert not file.problems()

    def test_a_full_disk_leaves_the_file_as_it_was(self, tmp_path, monkeypatch):
        file = AnswersFile(tmp_path / "a.jsonl")
        file.append(answer("x", "keep"))
        before, write = file.path.read_bytes(), os.write
        calls = []

        def full(descriptor, data):
            calls.append(len(data))
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return write(descriptor, data[:10])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            file.append(answer("y", "drop"))
        assert len(calls) == 2
        assert file.path.read_bytes() == before

    def test_an_answer_is_synced_before_append_returns(self, tmp_path, monkeypatch):
        synced, fsync = [], os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
        AnswersFile(tmp_path / "a.jsonl").append(answer("x", "keep"))
        assert synced == [str(tmp_path / "a.jsonl"), str(tmp_path)]

    def test_another_kind_of_file_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="none is an answer"):
            AnswersFile(make_samples(tmp_path / "s.jsonl"))


class TestAgreement:
    def test_wilson(self):
        """Newcombe 1998, table I, method 3."""
        for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
            found = wilson(successes, trials)
            assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
        assert wilson(0, 0) is None

    def test_unweighted_counts(self):
        flat = {"stratum_documents": None, "probability": None}
        samples = [make_sample(n, "t", score=1.0 if n < 10 else 3.0, **flat)[0] for n in range(20)]
        people = ["drop"] * 8 + ["keep", "unsure"] + ["drop"] * 2 + ["keep"] * 8
        found = summary(samples, [answer(s.id, v) for s, v in zip(samples, people, strict=True)])
        assert not found.weighted
        assert found.overall.counts == {"drop": {"drop": 8, "keep": 1}, "keep": {"drop": 2, "keep": 8}}
        assert found.overall.precision == wilson(8, 9)
        assert found.overall.recall == wilson(8, 10)
        assert found.overall.agreement == wilson(16, 19)
        assert found.unsure == 1
        assert found.disagreements == [samples[n].id for n in (8, 10, 11)]

    def test_strata_count_by_their_documents(self):
        dropped = [make_sample(n, "d", score=1.0, stratum_documents=100)[0] for n in range(4)]
        kept = [make_sample(n, "k", score=3.0, stratum_documents=900)[0] for n in range(10)]
        answers = [answer(s.id, "drop") for s in dropped] + [
            answer(s.id, "drop" if n == 0 else "keep") for n, s in enumerate(kept)
        ]
        found = summary([*dropped, *kept], answers)
        assert found.weighted
        assert found.overall.precision == wilson(4, 4)  # one stratum: Wilson's own interval
        assert found.overall.recall.value == pytest.approx(100 / (100 + 90))
        assert found.overall.agreement.value == pytest.approx((100 + 810) / 1000)
        assert found.overall.recall.low < 0.35 < 0.75 < found.overall.recall.high
        assert found.places["low tail"].recall is None  # it says nothing of what is kept

    def test_strata_that_nobody_judged_are_named(self):
        samples = [make_sample(0, "a", score=1.0)[0], make_sample(1, "b", score=3.0)[0]]
        found = summary(samples, [answer(samples[0].id, "drop")])
        assert found.uncovered == [("web", "en", "middle", "keep", 900)]
        assert found.overall.recall is None

    @pytest.mark.parametrize("kept_bad", [0.0, 0.02, 0.1])
    def test_the_intervals_cover_the_truth(self, kept_bad):
        """400 audits of a corpus whose truth is known. Kept documents weigh most, so a recall that forgot what their
        sample cannot tell would cover far less."""
        random, shares = np.random.default_rng(0), {"tail": (500, 0.95), "border": (200, 0.5), "kept": (9300, kept_bad)}
        caught = 500 * 0.95 + 200 * 0.5
        truth = {
            "precision": caught / 700,
            "recall": caught / (caught + 9300 * kept_bad),
            "agreement": (caught + 9300 * (1 - kept_bad)) / 10_000,
        }
        places = {"tail": ("low tail", 1.0), "border": ("low border", 1.9), "kept": ("middle", 3.0)}
        samples = {
            name: [
                make_sample(n, name, score=score, place=place, stratum_documents=shares[name][0])[0] for n in range(30)
            ]
            for name, (place, score) in places.items()
        }
        inside = dict.fromkeys(truth, 0)
        for _ in range(400):
            answers = [
                answer(s.id, "drop" if random.random() < shares[name][1] else "keep")
                for name, members in samples.items()
                for s in members
            ]
            found = summary([s for members in samples.values() for s in members], answers).overall
            for name, value in truth.items():
                estimate = getattr(found, name)
                inside[name] += estimate.low - 1e-9 <= value <= estimate.high + 1e-9
        assert {name: count / 400 for name, count in inside.items() if count / 400 < 0.93} == {}

    def test_auditors_who_disagree_decide_nothing(self):
        samples = [make_sample(n, "t", score=3.0)[0] for n in range(3)]
        answers = [answer(samples[0].id, "keep"), answer(samples[0].id, "drop", "bob")]
        answers += [answer(samples[1].id, "unsure"), answer(samples[1].id, "drop", "bob"), answer("elsewhere", "keep")]
        assert decisions(samples, answers) == {samples[0].id: "disputed", samples[1].id: "drop"}
        found = summary(samples, answers)
        assert (found.disputed, found.pairs, found.pairs_agree, found.unknown) == (1, 1, 0, 1)
        assert found.auditors == {"ann": 2, "bob": 2}


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Manifest:
    """Shards of text of two languages, scored by length in no particular order."""
    folder = tmp_path_factory.mktemp("shards")
    texts = [prose(number, 3 + number % 9) for number in range(60)]
    tokenizer = train(lambda: iter(texts), 600)
    tokenizer.save(str(folder / "tokenizer.json"))
    info = TokenizerInfo("tokenizer.json", sha256_of(folder / "tokenizer.json"), tokenizer.get_vocab_size(), 1, 2, 0)
    with ShardWriter(folder, "part", dtype=np.dtype("uint16"), shard_tokens=2000) as writer:
        for number, text in enumerate(texts):
            ids = np.array([1, *tokenizer.encode(text).ids, 2])
            size = len(text.encode())
            language = ("en", "de")[number % 3 == 0]
            writer.write(ids, id=f"web/{number}", source="web", text_bytes=size, language=language)
    manifest = Manifest.create(folder, info, writer.shards)
    manifest.save()
    for shard in manifest.shards:
        save_scores(folder, shard, "small", shard_scores(manifest, shard))
    return manifest


def shard_scores(manifest: Manifest, shard: Shard) -> np.ndarray:
    sizes = np.array([document.metadata["bytes"] for document in read_shard(manifest, shard)], float)
    return np.stack([sizes / 100, sizes / 400], axis=1)


class TestDraw:
    def test_samples_are_the_documents_they_name(self, scored):
        chosen = ScoreFilter("small", default=(3.0, 10.0), bands={"*/de": (None, 9.0)})
        found = list(draw(scored, chosen, each=4, seed=0))
        assert {sample.language for sample, _ in found} == {"en", "de"}
        shards = {shard.name: shard for shard in scored.shards}
        for sample, text in found:
            number = int(sample.document.rpartition("/")[2])
            assert text == prose(number, 3 + number % 9)
            stored = list(read_shard(scored, shards[sample.shard]))[sample.position]
            assert (stored.metadata["id"], stored.metadata["bytes"]) == (sample.document, sample.bytes)
            low, high = chosen.band("web", sample.language)
            assert (sample.low, sample.high) == (low, high)
            kept = (low is None or sample.score >= low) and sample.score <= high
            assert sample.verdict == ("keep" if kept else "drop")
            assert sample.nats_per_token == pytest.approx(sample.bytes / 100)
        weights = dict.fromkeys(("en", "de"), 0.0)
        for sample, _ in found:
            weights[sample.language] += 1 / sample.probability
        assert weights == {"en": pytest.approx(40), "de": pytest.approx(20)}

    def test_long_texts_are_cut_and_ids_stay(self, scored):
        chosen = ScoreFilter("small")
        whole = dict(sample_and_text for sample_and_text in draw(scored, chosen, each=3, seed=0))
        cut = dict(sample_and_text for sample_and_text in draw(scored, chosen, each=3, seed=0, max_characters=50))
        assert list(whole) == list(cut)
        assert all(text[:50] == cut[sample] and sample.characters == len(text) for sample, text in whole.items())

    def test_from_the_command_line_to_the_table(self, scored, tmp_path, capsys):
        path = tmp_path / "round1.jsonl"
        arguments = ["draw", f"samples={path}", f"manifest={scored.directory}/manifest.json", "each=3"]
        assert main([*arguments, "filter={scores: small, default: [3.0, 10.0]}"]) == 0
        assert f"python -m data_pipeline.audit samples={path}" in capsys.readouterr().out
        samples = Samples.load(path)
        assert main(["summary", f"samples={path}"]) == 2
        assert "there is no such file" in capsys.readouterr().err
        file = AnswersFile(tmp_path / "round1.answers.jsonl")
        for sample in samples.entries:
            file.append(answer(sample.id, sample.verdict))
        assert main(["summary", f"samples={path}"]) == 0
        table = capsys.readouterr().out
        assert "100% (" in table
        assert "strata weighted" in table
        assert main([*arguments, "filter={scores: small}"]) == 2
        assert "overwrite=true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["judge"], "samples: missing; give it as samples=..."),
        (["paint", "samples=x"], "paint: no such command"),
        (["samples=x", "prot=1"], "prot: unknown setting; did you mean port?"),
        (["samples=x", "port=70000"], "port=70000"),
        (["samples=x", "token=short"], "token='short'"),
        (["samples=/nowhere/x"], "samples=/nowhere/x: No such file"),
        (["draw", "samples=x"], "manifest: missing; draw needs manifest=..."),
        (
            ["draw", "samples=x", "manifest=/nowhere", "filter={scores: a, default: [2, 1]}"],
            "low=2.0 is above high=1.0",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value[:20],
)
def test_bad_input_names_the_setting(arguments, complaint, capsys):
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_answers_that_are_the_samples_or_cannot_be_written_are_refused(tmp_path, capsys):
    path = make_samples(tmp_path / "s.jsonl")
    assert main([f"samples={path}", f"answers={path}"]) == 2
    assert "is the file of samples" in capsys.readouterr().err
    assert main([f"samples={path}", "host=192.0.2.1"]) == 2
    assert "host=192.0.2.1 port=8765: cannot listen there" in capsys.readouterr().err
    assert json.loads(path.read_text().splitlines()[0])["source"] == "web"
