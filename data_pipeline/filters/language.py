"""Which language a text is in, by py3langid, which brings its model with it and needs no download."""

import functools
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop
from data_pipeline.thresholds import STRICT, Share

NONE = "zxx"  # the code of text in no language
LONGEST = 20_000  # characters that are looked at


@dataclass(frozen=True, config=STRICT)
class Language:
    """Identifies the language of documents whose source does not say it. `allowed`: the codes to keep, null for all;
    text in no language at all goes in any case. `min_confidence`: the probability of the likeliest language, at
    least."""

    allowed: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    min_confidence: Share = 0.0

    def judge(self, text: str) -> tuple[str, Drop | None]:
        """The language's code, and the reason to drop the document or None."""
        code, confidence = identifier().classify(text[:LONGEST])
        if code == NONE or (self.allowed is not None and code not in self.allowed):
            return code, Drop("allowed", code, " ".join(self.allowed or ("any",)))
        if confidence < self.min_confidence:
            return code, Drop("min_confidence", float(confidence), self.min_confidence)
        return code, None


@functools.cache
def identifier():
    """The model, loaded once a process, or once for all workers when their parent loads it before it forks."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
