"""A session: one document that grows by given and by generated text in turn, with its recurrent state kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_tn.inference.generator import Generator, Request
from megatron_tn.inference.prefill import CHUNK
from megatron_tn.inference.prefix import Prefix
from megatron_tn.inference.prefix_file import load_prefix, save_prefix
from megatron_tn.inference.sampler import Sampler
from megatron_tn.model.base import Model


class Session:
    """feed(ids) appends to the document; ask() continues it, and appends what it yields; fork() makes another session
    that begins as this one is, at no cost.

        session = Session(model)
        session.feed(question)
        answer = list(session.ask(max_new_tokens=64, sampler=Sampler(temperature=0)))
        session.feed(next_question)

    While an `ask` is open, neither ended nor closed, the document has the ids that it has yielded so far: fork() and
    save() take them along, while feed() and another ask() are refused.
    Costs of a turn are those of its tokens, however long the document is already. Collective over tensor parallelism.
    """

    def __init__(self, model: Model, prefix: Prefix | None = None, *, chunk: int = CHUNK):
        self.model = model
        self.chunk = chunk
        self._prefix = prefix
        self._yielded: list[int] = []  # ids at the document's end that `_prefix` does not contain yet
        self._asking = False
        self._idle: list[Generator] = []  # of this session and its forks; each is in one `ask` at a time

    @property
    def prefix(self) -> Prefix | None:
        """The document; None without tokens. Ids that `ask` yielded are processed here, when somebody needs them: a
        generator may be closed while Python shuts down, where no forward pass can run."""
        if self._yielded:
            self._prefix = Prefix.of(self.model, self._yielded, self._prefix, self.chunk)
            self._yielded = []
        return self._prefix

    @property
    def length(self) -> int:
        """Number of tokens of the document."""
        return len(self._yielded) + (0 if self._prefix is None else self._prefix.length)

    def feed(self, ids: Sequence[int]) -> None:
        """Append `ids`.

        Raises:
            ValueError: an id outside the vocabulary.
            RuntimeError: an `ask` is open.
        """
        self._check_closed("feed")
        if len(ids):
            self._prefix = Prefix.of(self.model, ids, self.prefix, self.chunk)

    def ask(
        self,
        *,
        max_new_tokens: int = 128,
        sampler: Sampler | None = None,
        seed: int = 0,
        number: int = 0,
        until: Callable[[int], bool] = lambda chosen: False,
    ) -> Iterator[int]:
        """Yield up to `max_new_tokens` ids, ending before the model's eos_id; `Request` has the other arguments. Each
        id is appended as it is yielded. The ask is open from its first id until the iterator ends or is closed.

        Raises:
            ValueError: the document has no tokens.
            RuntimeError: another `ask` is open.
        """
        self._check_closed("ask")
        given = {"sampler": sampler or Sampler(), "max_new_tokens": max_new_tokens, "seed": seed, "number": number}
        request = Request(prefix=self.prefix, until=until, **given)
        generator = self._idle.pop() if self._idle else Generator(self.model, 1, chunk=self.chunk)
        self._asking = True
        try:
            for piece in generator.stream([request]):
                for chosen in piece.ids:
                    self._yielded.append(chosen)
                    yield chosen
        finally:
            self._asking = False
            self._idle.append(generator)

    def _check_closed(self, call: str) -> None:
        if self._asking:
            raise RuntimeError(f"{call}() while an ask() of this session is open: end its iterator, or close() it")

    def fork(self) -> Session:
        """A session with the same document, and its own from here on."""
        other = Session(self.model, self.prefix, chunk=self.chunk)
        other._idle = self._idle
        return other

    def save(self, path: str | Path) -> None:
        """Write the document's state to `path`, see `prefix_file`.

        Raises:
            ValueError: the document has no tokens.
        """
        if not self.length:
            raise ValueError("the session has no tokens: feed it before it is saved")
        save_prefix(self.prefix, self.model, path)

    @classmethod
    def load(cls, model: Model, path: str | Path, *, chunk: int = CHUNK) -> Session:
        """The session that `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or another model computed it.
        """
        return cls(model, load_prefix(path, model), chunk=chunk)
