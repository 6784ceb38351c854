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
    every: Count = 0  # steps between evaluations; 0: evaluate only at the end of the run
    max_documents: Count = 256  # number of held-out documents to evaluate, equally many of each source; 0: all
    # Tasks of lm-evaluation-harness, by name or by task file (docs/evaluation.md); need pip install -e '.[eval]'. []:
    # none.
    tasks: Names = dataclasses.field(default_factory=list)
    task_folder: str = ""  # folder of your own task files, which evaluation.tasks may name; empty: none
    task_documents: Count = 256  # evaluate only the first so many documents of each task; 0: all
    # Texts that each evaluation lets the model continue; []: none.
    prompts: Names = dataclasses.field(default_factory=list)
    prompt_tokens: Positive = 64  # tokens of each continuation of evaluation.prompts

    @property
    def is_on(self) -> bool:
        return bool(self.manifest or self.tasks or self.prompts)
