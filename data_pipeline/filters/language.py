"""Language identification by py3langid, whose package includes its model."""

import functools
import re
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop
from data_pipeline.langid import Identifier
from data_pipeline.letters import plain
from data_pipeline.thresholds import STRICT, Share

NONE = "zxx"  # the code of text in no language
UNKNOWN = "und"  # the code of text in an unknown language
# The model's own class of no language has a probability of 0.99 and more in base64 and lists of codes, of less in
# languages that the model does not know (Zhuang 0.88, Drung 0.989), and in lists of file names, with fewer letters.
SURE_OF_NONE, LETTERS_OF_PROSE = 0.99, 0.8
LONGEST = 20_000  # characters used for identification
LETTER = re.compile(r"[^\W\d_]")
# Letters of scripts without a language in the model, whose answer for them is arbitrary.
STRANGE_LETTER = re.compile(
    r"(?![\0-\u06ff\u0750-\u077f\u08a0-\u139f\u1780-\u17ff\u1c80-\u1cbf\u1d00-\u1fff\u2100-\u218f\u2c60-\u2c7f\u2d00-\u2d2f"
    r"\u2d80-\u2ddf\u3005-\u9fff\ua640-\ua69f\ua720-\ua7ff\uab00-\uab6f\uac00-\ufeff\uff00-\uffef\U0001d400-\U0001d7ff"
    r"\U00020000-\U0003ffff])[^\W\d_]"
)


@dataclass(frozen=True, config=STRICT)
class Language:
    """Identifies the language of documents whose source does not set it. `allowed`: codes to keep, null for all; text
    in no language is always dropped. `min_confidence`: minimum probability of the likeliest language."""

    allowed: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    min_confidence: Share = 0.0

    def judge(self, text: str) -> tuple[str, Drop | None]:
        """The language's code, and the reason to drop the document or None."""
        code, confidence = identify(text[:LONGEST])
        if code == NONE or (self.allowed is not None and code not in self.allowed):
            return code, Drop("allowed", code, " ".join(self.allowed or ("any",)))
        if confidence < self.min_confidence:
            return code, Drop("min_confidence", confidence, self.min_confidence)
        return code, None


def identify(text: str) -> tuple[str, float]:
    """(code, probability) of the likeliest language. (NONE, 0) for text without a letter, such as rulers and dots;
    (UNKNOWN, 0) for text without an n-gram of the model, in a script without a language in the model, or of letters
    that the model takes for no language with a probability below SURE_OF_NONE."""
    if not LETTER.search(plain(text)):
        return NONE, 0.0
    model = identifier()
    code, confidence = model.classify(text)
    # Equal probabilities of all classes mean unknown; a code has up to two classes.
    if confidence < 2.01 / len(model.classes) or _is_strange(text):
        return UNKNOWN, 0.0
    if code == NONE and confidence < SURE_OF_NONE and _share_of_letters(text) >= LETTERS_OF_PROSE:
        return UNKNOWN, 0.0
    return code, confidence


def _share_of_letters(text: str) -> float:
    """Letters among the characters other than white space."""
    letters = "".join(plain(text).split())
    return len(LETTER.findall(letters)) / len(letters)


def _is_strange(text: str) -> bool:
    """Whether most letters belong to scripts without a language in the model."""
    if text.isascii() or not STRANGE_LETTER.search(text := plain(text)):
        return False
    return 2 * len(STRANGE_LETTER.findall(text)) > len(LETTER.findall(text))


@functools.cache
def identifier() -> Identifier:
    """The model, loaded once per process, or once for all workers if loaded before the fork."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return Identifier(LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True))
