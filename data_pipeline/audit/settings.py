"""Settings of `python -m data_pipeline.audit`; their defaults for people are in conf/audit.yaml."""

import getpass
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.config import compose_plain, parse
from data_pipeline.sources import STRICT, Positive


@dataclass(frozen=True, config=STRICT)
class AuditSettings:
    """samples, answers: the two files, JSON lines; answers lie beside the samples unless said otherwise. auditor: whose
    answers these are; None takes the name of the login. show_verdict: show scores, reason and verdict before the
    answer. host, port: where to listen; token: what the URL must carry; None makes one up. ask_token: False asks for
    none on loopback, which other accounts of the machine reach too.

    To draw: manifest: of scored shards; filter: a YAML file or inline JSON (`ScoreFilter`); each: documents for every
    place of every source and language; border: share of the documents next to a threshold that is its border;
    max_characters: where a text is cut; overwrite: replace a file of samples that is there.
    """

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


def compose_audit(overrides: list[str]) -> AuditSettings:
    """From conf/audit.yaml and overrides in Hydra's grammar; raises InputError with a line a problem."""
    data, groups = compose_plain("audit", overrides, AuditSettings)
    return parse(data, extra_names=groups, cls=AuditSettings)
