"""Requests of the audit page and their answers as plain data, without HTTP."""

import secrets
import threading
from collections.abc import Mapping
from dataclasses import asdict

from data_pipeline.audit.agreement import decisions, summary
from data_pipeline.audit.answers import VERDICTS, Answer, AnswersFile, now
from data_pipeline.audit.samples import Sample, Samples

PIECE = 40_000  # characters of text per response: a browser lays them out without a pause
LONGEST_NOTE = 2000
LONGEST_SECONDS = 86_400.0
FILTER_VIEW = ("verdict", "place", "measure", "nats_per_token", "nats_per_byte", "low", "high", "probability")


class Refused(Exception):
    """A request that cannot be served: HTTP `status` and a one-line reason."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Audit:
    """One auditor's session on a file of samples. `token` authenticates every request for data."""

    def __init__(self, samples: Samples, answers: AnswersFile, auditor: str, *, show_verdict: bool = False):
        self.samples = samples
        self.answers = answers
        self.auditor = auditor
        self.show_verdict = show_verdict
        self.token = secrets.token_urlsafe(24)
        self._positions = {sample.id: position for position, sample in enumerate(samples.entries)}
        self._revealed: set[str] = set()
        self._lock = threading.Lock()

    def session(self) -> dict:
        """Initial data of the page: auditor, first open sample, progress."""
        self.answers.refresh()
        mine = self.answers.of(self.auditor)
        return {
            "token": self.token,
            "auditor": self.auditor,
            "samples": self.samples.path.name,
            "answers": str(self.answers.path),
            "show_verdict": self.show_verdict,
            "next": self._next_open(-1, mine),
            **self._progress(mine),
        }

    def document(self, position: int, start: int = 0, reveal: bool = False) -> dict:
        """Sample `position` and PIECE characters of its text from `start`. Scores, reason and verdict are left out
        until the sample is answered, unless show_verdict or `reveal` is set; the answer then is not blind."""
        if not 0 <= position < len(self.samples):
            raise Refused(404, f"no document {position + 1}: there are {len(self.samples)}")
        sample = self.samples.entries[position]
        try:
            text = self.samples.text(position)
        except (OSError, ValueError) as error:
            raise Refused(500, f"{self.samples.path}: {error}; start the audit again") from None
        if start < 0 or start > len(text):
            raise Refused(404, f"no character {start}: the text has {len(text)}")
        answer = self.answers.of(self.auditor).get(sample.id)
        if reveal:
            with self._lock:
                self._revealed.add(sample.id)
        end = min(start + PIECE, len(text))
        return {
            "position": position,
            "id": sample.id,
            "source": sample.source,
            "language": sample.language,
            "document": sample.document,
            "key": sample.key,
            "shard": sample.shard,
            "shard_position": sample.position,
            "bytes": sample.bytes,
            "tokens": sample.tokens,
            "characters": max(sample.characters, len(text)),
            "text": text[start:end],
            "start": start,
            "end": end,
            "held": len(text),
            "answer": {"verdict": answer.verdict, "note": answer.note} if answer else None,
            "filter": _filter_view(sample) if answer or not self._is_blind(sample.id) else None,
        }

    def answer(self, body: object) -> dict:
        """Saves a verdict: {sample, verdict, seconds, note}; returns once it is on disk."""
        sample, verdict, note, seconds = _checked(body, self._positions)
        self.answers.refresh()
        before = self.answers.of(self.auditor).get(sample)
        # The filter's verdict is shown after the first answer: an edit is not blind.
        blind = self._is_blind(sample) and before is None
        record = Answer(sample, verdict, self.auditor, now(), round(seconds, 1), note, blind)
        try:
            self.answers.append(record)
        except OSError as error:
            raise Refused(507, f"not saved: {self.answers.path}: {error.strerror or error}") from None
        mine, position = self.answers.of(self.auditor), self._positions[sample]
        return {
            "saved": {"sample": sample, "verdict": verdict, "edit": before is not None},
            "filter": _filter_view(self.samples.entries[position]),
            "next": self._next_open(position, mine),
            **self._progress(mine),
        }

    def summary(self) -> dict:
        """`agreement.summary` of all auditors' answers, and the lines of the table of disagreements."""
        self.answers.refresh()
        answers = self.answers.all()
        found = summary(self.samples.entries, answers)
        notes = {a.sample: a.note for a in answers if a.note}
        people = decisions(self.samples.entries, answers)
        rows = []
        for name in found.disagreements:
            sample = self.samples.entries[position := self._positions[name]]
            about = {"source": sample.source, "language": sample.language, "place": sample.place, "score": sample.score}
            verdicts = {"filter": sample.verdict, "people": people[name], "note": notes.get(name, "")}
            rows.append({"position": position, "document": sample.key or sample.document or name, **about, **verdicts})
        return {
            "samples": self.samples.path.name,
            "answers": str(self.answers.path),
            "problems": self.answers.problems(),
            "summary": asdict(found),
            "disagreements": rows,
        }

    def _is_blind(self, sample: str) -> bool:
        with self._lock:
            return not self.show_verdict and sample not in self._revealed

    def _next_open(self, position: int, mine: Mapping[str, Answer]) -> int | None:
        """The first sample after `position`, or else from the beginning, that has no answer; None when all have."""
        entries = self.samples.entries
        order = (*range(position + 1, len(entries)), *range(position + 1))
        return next((place for place in order if entries[place].id not in mine), None)

    def _progress(self, mine: Mapping[str, Answer]) -> dict:
        overall = asdict(summary(self.samples.entries, mine.values()).overall)
        return {
            "count": len(self.samples),
            "answered": sum(sample.id in mine for sample in self.samples.entries),
            "figures": {name: overall[name] for name in ("agreement", "precision", "recall")},
            "problems": self.answers.problems(),
        }


def _filter_view(sample: Sample) -> dict:
    return {name: getattr(sample, name) for name in FILTER_VIEW}


def _checked(body: object, known: Mapping[str, int]) -> tuple[str, str, str, float]:
    if not isinstance(body, dict):
        raise Refused(400, "an answer is a JSON object")
    sample, verdict = body.get("sample"), body.get("verdict")
    note, seconds = body.get("note", ""), body.get("seconds", 0.0)
    if not isinstance(sample, str) or sample not in known:
        raise Refused(404, f"sample={sample!r}: there is no such sample")
    if verdict not in VERDICTS:
        raise Refused(400, f"verdict={verdict!r} is none of {', '.join(VERDICTS)}")
    if not isinstance(note, str) or len(note) > LONGEST_NOTE:
        raise Refused(400, f"note: must be text of at most {LONGEST_NOTE} characters")
    try:
        note.encode()
    except UnicodeEncodeError as error:
        raise Refused(400, f"note: character {error.start} is an unpaired surrogate") from None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST_SECONDS:
        raise Refused(400, f"seconds={seconds!r} must be a number from 0 to {LONGEST_SECONDS:.0f}")
    return sample, verdict, note, float(seconds)
