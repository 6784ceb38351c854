"""The settings `evaluation.*`: held-out loss, benchmark tasks and generated texts during training."""

import dataclasses
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count, Positive
from megatron_tn.config.mapping import STRICT


def _in_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) and value else value


Names = Annotated[list[str], BeforeValidator(_in_a_list)]  # tasks=a is tasks=[a]


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    manifest: str = ""  # manifest.json of held-out shards; empty: no held-out loss during training
    every: Count = 0  # steps between evaluations; 0: only at the end of the run
    max_documents: Count = 256  # evaluate so many held-out documents, equally many of each source; 0: all
    # Tasks of lm-evaluation-harness, by name or as task files: docs/evaluation.md. They need the extra eval.
    tasks: Names = dataclasses.field(default_factory=list)
    task_folder: str = ""  # a folder of task files of one's own, whose names `tasks` may then have
    task_documents: Count = 256  # of each task, the first ones; 0: all
    prompts: Names = dataclasses.field(default_factory=list)  # texts that each evaluation continues
    prompt_tokens: Positive = 64  # tokens of a continuation

    @property
    def is_on(self) -> bool:
        return bool(self.manifest or self.tasks or self.prompts)
