"""Settings of `python -m data_pipeline.audit`; defaults and explanations are in conf/audit.yaml."""

import getpass
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.sources import STRICT, Positive


@dataclass(frozen=True, config=STRICT)
class AuditSettings:
    """samples: path of the JSON-lines file of samples, which draw writes and the others read; answers: of the verdicts,
    null: beside the samples. auditor: name stored with each verdict; null: the login name. show_verdict: show scores,
    reason and the filter's verdict before the answer. host, port: listening address; port 0: any free one. token:
    required in the page's URL; null: a random one, printed at start. ask_token: false requires none on loopback, which
    other users of the machine reach, too. For draw: manifest: scored shards; filter: a YAML file or inline JSON
    (`ScoreFilter`); each: documents per place (tails, borders, middle), source and language; border: width of a border
    on either side of its threshold, as a share of all documents; seed: of the random choice; max_characters: longer
    texts are cut; overwrite: replace an existing samples file."""

    samples: str
    answers: str | None = None
    auditor: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    show_verdict: bool = False
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    token: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,200}$")] | None = None
    ask_token: bool = True
    manifest: str | None = None
    filter: str | dict | None = None
    each: Positive = 20
    border: Annotated[float, Field(gt=0, lt=1)] = 0.02
    seed: Annotated[int, Field(ge=0)] = 0
    max_characters: Positive = 1_000_000
    overwrite: bool = False

    @property
    def answers_path(self) -> str:
        return self.answers or f"{self.samples.removesuffix('.jsonl')}.answers.jsonl"

    @property
    def auditor_name(self) -> str:
        if self.auditor:
            return self.auditor
        try:
            return getpass.getuser()
        except (KeyError, OSError):  # a user id without a name, as in containers
            return "auditor"
