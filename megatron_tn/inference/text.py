"""Text of ids as they come: characters whose bytes are spread over several tokens, and stop strings."""

from collections.abc import Sequence

from tokenizers import Tokenizer

UNFINISHED = "\ufffd"  # what decoders give for bytes that are no character, or not one yet
MOST_PENDING = 64  # ids that end in no character before they are decoded as they are


class TextStream:
    """Called with each new id; returns True once a stop string has occurred (`Request.until`).

    context: the ids before, which some decoders need for a space at the beginning.
    stop: the text ends before the first of these strings, wherever in a token it begins. Text that may be the
        beginning of a stop string is held back until more is known.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = [each for each in stop if each]
        self._ids = list(context[-4:])  # decoded already up to _said characters, and what follows
        if tokenizer.decode(self._ids).endswith(UNFINISHED):
            self._ids = []
        self._known = len(self._ids)
        self._said = len(tokenizer.decode(self._ids))
        self._held = ""
        self._new = ""
        self.text = ""  # final

    def __call__(self, chosen: int) -> bool:
        self._ids.append(chosen)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(UNFINISHED) and len(self._ids) - self._known < MOST_PENDING:
            return False
        return self._decoded(text)

    def finish(self) -> None:
        """No more ids follow: what was held back is text."""
        if self._known < len(self._ids):
            self._decoded(self._tokenizer.decode(self._ids))
        self._emit(self._held)
        self._held = ""

    def take(self) -> str:
        """The text that has become final since the last call."""
        new, self._new = self._new, ""
        return new

    def _decoded(self, text: str) -> bool:
        """Append what `text`, the decoded text of all of _ids, has beyond what is known; returns whether a stop string
        occurred."""
        self._held += text[self._said :]
        self._ids = self._ids[self._known :]  # a window: what was new is the context of what follows
        self._known, self._said = len(self._ids), len(self._tokenizer.decode(self._ids))
        found = [at for each in self._stop if (at := self._held.find(each)) >= 0]
        if found:
            self._emit(self._held[: min(found)])
            self._held = ""
            self._stop = []
            return True
        keep = max((_overlap(self._held, each) for each in self._stop), default=0)
        self._emit(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _emit(self, text: str) -> None:
        self.text += text
        self._new += text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
