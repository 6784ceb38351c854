"""Samples to judge, and the audit page's server, for tests."""

import json
import subprocess
import sys
from pathlib import Path

from data_pipeline.audit.samples import Sample, sample_id, write_samples
from tests.data_pipeline.corpus import prose

HOSTILE = (
    "<script>document.title='owned'</script>\n<img src=x onerror=\"document.title='owned'\">\n"
    "access level: \u202euser\u2066 admin\u2069\u202c end\nnull:\x00\x00\x00 escape:\x1b[31m lone:\ud800 bom:\ufeff\n"
    "مرحبا بالعالم، هذا نص عربي.\n"
)


def make_sample(number: int, text: str, **changes) -> tuple[Sample, str]:
    """A sample that a band of 2 to 6 nats per token keeps or drops by its score."""
    score = changes.pop("score", 1.0 + number % 7)
    kept = 2.0 <= score <= 6.0
    place = "middle" if kept else "low tail" if score < 2.0 else "high tail"
    known = {
        "id": sample_id("web", f"{number}{text}"),
        "source": "web",
        "language": "en",
        "verdict": "keep" if kept else "drop",
        "place": place,
        "nats_per_token": score,
        "nats_per_byte": score / 4,
        "low": 2.0,
        "high": 6.0,
        "document": f"web/{number}",
        "shard": "train-00000.tar",
        "position": number,
        "bytes": len(text.encode("utf-8", "replace")),
        "tokens": len(text) // 4,
        "characters": len(text),
        "stratum_documents": 900 if kept else 50,
        "probability": 0.01,
    }
    return Sample(**{**known, **changes}), text


def make_samples(path: Path, texts: list[str] | None = None) -> Path:
    """A file of samples of these texts, or of six of prose."""
    texts = [prose(number, 12) for number in range(6)] if texts is None else texts
    pairs = [make_sample(number, text) for number, text in enumerate(texts)]
    if any("\ud800" in text for text in texts):  # which a hand-made file may hold as an escape
        from dataclasses import asdict

        path.write_text("".join(json.dumps({**asdict(sample), "text": text}) + "\n" for sample, text in pairs))
    else:
        write_samples(path, pairs)
    return path


def start(*overrides: str) -> tuple[subprocess.Popen, str]:
    """The command line's server in a process of its own, and its URL."""
    command = [sys.executable, "-m", "data_pipeline.audit", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("open "):
            return process, line.split()[1]
    raise AssertionError(process.stderr.read())
