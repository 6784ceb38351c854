"""Continuations of many prompts: rows of a batch that are filled again as soon as their sequences end."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, NamedTuple

from megatron_tn.config.bounds import MOST_SEED
from megatron_tn.device.host_copy import HostCopy
from megatron_tn.inference.decoder import build_decoder
from megatron_tn.inference.prefill import CHUNK
from megatron_tn.inference.prefix import Prefix, as_ids, check_ids
from megatron_tn.inference.sampler import Sampler
from megatron_tn.inference.uniform import stream_key
from megatron_tn.model.base import Model, has_fixed_state
from megatron_tn.model.registry import check_decoding_kernels

CHECK_EVERY = 8  # tokens decoded between two checks on the host whether a text has ended
FED_PER_ROW = 8  # longest prompt, in tokens per row, that decoding steps take instead of a forward pass


@dataclass(frozen=True)
class Request:
    """A sequence to continue by up to `max_new_tokens` ids, ending before the model's eos_id.

    prompt: a list, array or tensor of ids, which follow `prefix`; together they hold at least one token.
    seed, number: the key of the random numbers. Requests that differ in neither, with equal prompts, get equal ids.
    until: called with each new id; True ends the sequence behind it.

    Raises:
        ValueError: a prompt of something else, or a number that is out of its range, one or several of them.
    """

    prompt: Sequence[int] = ()
    prefix: Prefix | None = None
    sampler: Sampler = field(default_factory=Sampler)
    max_new_tokens: int = 128
    seed: int = 0
    number: int = 0
    until: Callable[[int], bool] = lambda chosen: False

    def __post_init__(self) -> None:
        if isinstance(self.prompt, int):
            raise ValueError(f"the prompt {self.prompt} is an id: give a list of prompts, each a list of ids")
        object.__setattr__(self, "prompt", as_ids(self.prompt))
        problems = []
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 0:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 0, and whole")
        for name in ("seed", "number"):
            if not isinstance(value := getattr(self, name), Integral) or not 0 <= value <= MOST_SEED:
                problems.append(f"{name}={value} must be from 0 to {MOST_SEED}, and whole")
        if problems:
            raise ValueError("; ".join(problems))


class Piece(NamedTuple):
    """New ids of the request at `index` (from 0, in the order in which they came in). end: why the sequence ended with
    them, None if it goes on."""

    index: int
    ids: list[int]
    end: Literal["eos", "length", "until"] | None


class Generator:
    """Decodes requests in `rows` rows.

    On a GPU all rows are decoded together. On a CPU each row is decoded alone: BLAS rounds a row's products differently
    by the number of rows, and a row's ids must not depend on the rows beside it. `together` says otherwise: rows of one
    forward pass, which all take part whether a request is in them or not.
    check_every: ids are looked at by the host so many tokens at a time. On a GPU they are copied while the next ones
    are decoded, so that a sequence's last ids are followed by up to 2 x check_every - 1 that are dropped.
    chunk: tokens of a prompt in one forward pass.
    feed_below: a prompt with fewer tokens has no forward pass of its own: the rows' steps take it, a token each. By
    default 8 x rows on a GPU, where kernels of a short prompt take less time than their launches; 0 on a CPU.
    Collective over tensor parallelism: every rank makes the same calls and gets the same ids.

    Raises:
        ValueError: a number of rows or tokens below 1.
    """

    def __init__(
        self,
        model: Model,
        rows: int = 8,
        *,
        together: int = 0,
        check_every: int = 0,
        chunk: int = CHUNK,
        feed_below: int | None = None,
    ) -> None:
        cuda = next(model.parameters()).is_cuda
        together = rows_together(model, rows, together)
        check_every = check_every or (CHECK_EVERY if cuda else 1)
        for name, value in (("rows", rows), ("together", together), ("check_every", check_every), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_decoding_kernels(model)
        self.model = model
        self.chunk = chunk
        self.feed_below = feed_below if feed_below is not None else FED_PER_ROW * rows * cuda
        self._streams = 0  # begun so far
        self._lanes = [_Lane(self, together, check_every, int(cuda)) for _ in range(-(-rows // together))]

    def stream(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """The continuations, piece by piece, of several requests at a time. One stream of a Generator at a time.

        Raises:
            RuntimeError: a later stream of this Generator has begun.
            ValueError: a prompt without tokens, with an id outside the vocabulary, too long for model.max_length, or
                with a prefix of another model.
        """
        self._streams += 1
        this = self._streams
        for piece in self._pieces(enumerate(requests)):
            yield piece
            if self._streams != this:
                raise RuntimeError("another stream of this Generator has begun, which took its rows")

    def _pieces(self, waiting: Iterator[tuple[int, Request]]) -> Iterator[Piece]:
        for lane in self._lanes:
            lane.clear()
        while True:
            for lane in self._lanes:
                yield from lane.fill(waiting)
            if not any(lane.busy for lane in self._lanes):
                return
            for lane in self._lanes:
                yield from lane.turn()

    def release(self) -> None:
        """Drop the CUDA graphs and their memory; the next stream captures again."""
        for lane in self._lanes:
            lane.decoder.release()


class _Running:
    """A request in a row. fed: ids of its prompt that are the row's first ids. steps: number of steps that make all its
    ids. launched: steps queued so far."""

    def __init__(self, index: int, request: Request, fed: int, eos_id: int):
        self.index = index
        self.request = request
        self.eos_id = eos_id
        self.fed = fed
        self.steps = fed + request.max_new_tokens
        self.launched = 0
        self.taken = 0
        self.done = False

    def take(self, ids: list[int]) -> Piece:
        """The next ids of its row, cut where the sequence ends."""
        kept, end = [], None
        own, self.fed = ids[self.fed :], max(self.fed - len(ids), 0)
        for chosen in own:
            if chosen == self.eos_id:
                end = "eos"
                break
            kept.append(chosen)
            self.taken += 1
            if self.request.until(chosen):
                end = "until"
            elif self.taken == self.request.max_new_tokens:
                end = "length"
            if end:
                break
        self.done = end is not None
        return Piece(self.index, kept, end)


class _Lane:
    """One Decoder, who is in its rows, and the steps whose ids the host has not looked at.

    ahead: how many runs of check_every steps are queued before the ids of an earlier one are read.
    """

    def __init__(self, generator: Generator, rows: int, check_every: int, ahead: int):
        self.generator = generator
        self.decoder = build_decoder(generator.model, rows, generator.feed_below)
        self.check_every = check_every
        self.ahead = ahead
        self.clear()

    def clear(self) -> None:
        self.occupants: list[_Running | None] = [None] * self.decoder.rows
        self.in_flight: collections.deque[tuple[HostCopy, list[_Running | None]]] = collections.deque()

    @property
    def busy(self) -> bool:
        return any(self.occupants)

    def fill(self, waiting: Iterator[tuple[int, Request]]) -> Iterator[Piece]:
        """Put requests into the free rows; yield the pieces of those that want no tokens."""
        model = self.generator.model
        for row, occupant in enumerate(self.occupants):
            while occupant is None and (found := next(waiting, None)):
                index, request = found
                prompt, fed = request.prompt, ()
                if len(prompt) < self.generator.feed_below:
                    first = 0 if request.prefix else 1
                    prompt, fed = prompt[:first], prompt[first:]
                    check_ids(fed, model.config.vocab_size)
                prefix = Prefix.of(model, prompt, request.prefix, self.generator.chunk)
                check_length(model, prefix.length + len(fed), request.max_new_tokens)
                if request.max_new_tokens == 0:
                    yield Piece(index, [], "length")
                    continue
                key = stream_key(request.seed, request.number)
                self.decoder.start(row, prefix, fed, sampler=request.sampler, key=key)
                occupant = _Running(index, request, len(fed), model.config.eos_id)
            self.occupants[row] = occupant

    def turn(self) -> Iterator[Piece]:
        """Queue the next steps, and yield the ids of earlier ones."""
        wanting = [x for x in self.occupants if x is not None and x.launched < x.steps]
        if wanting:
            steps = min(self.check_every, max(x.steps - x.launched for x in wanting))
            self.in_flight.append((self.decoder.run(steps), list(self.occupants)))
            for occupant in wanting:
                occupant.launched += steps
        if self.in_flight and (len(self.in_flight) > self.ahead or not wanting):
            copy, occupants = self.in_flight.popleft()
            ids = copy.read().T.tolist()
            for row, running in enumerate(occupants):
                if running is not None and not running.done:
                    piece = running.take(ids[row])
                    if running.done:
                        self.occupants[row] = None
                        self.decoder.free(row)
                    if piece.ids or running.done:
                        yield piece


def rows_together(model: Model, rows: int, together: int) -> int:
    """Rows of one forward pass of a Generator: `together`, where it is not 0 and the architecture can."""
    if not has_fixed_state(model):
        return 1
    return together or (rows if next(model.parameters()).is_cuda else 1)


def least_bytes(model: Model, rows: int, together: int) -> int:
    """Bytes of the states of a Generator's rows, and of the marks of the ids that each has seen."""
    together = rows_together(model, rows, together)
    states = model.model.initial_state(1) if has_fixed_state(model) else []
    return -(-rows // together) * together * (sum(state.nbytes for state in states) + model.config.vocab_size)


def check_length(model: Model, length: int, max_new_tokens: int) -> None:
    """Raise ValueError if a prompt of `length` tokens and its continuation exceed model.max_length."""
    most = model.config.max_length
    if most and length + max_new_tokens - 1 > most:  # the last token is not fed back
        asked = f"a prompt of {length} tokens and max_new_tokens={max_new_tokens}"
        raise ValueError(f"{asked} are longer than model.max_length={most}")


def generate(
    model: Model,
    prompts: Iterable[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampler: Sampler | None = None,
    seed: int = 0,
    rows: int = 8,
    **options,
) -> list[list[int]]:
    """The ids that follow each prompt, in the order of the prompts: up to `max_new_tokens`, before the model's eos_id.

    seed: prompt n draws its random numbers from the key (seed, n). rows, options: of `Generator`.

    Raises:
        ValueError: a prompt is empty, holds an id outside the vocabulary, or leaves too little of model.max_length.
    """
    sampler = sampler or Sampler()
    requests = (
        Request(prompt, sampler=sampler, max_new_tokens=max_new_tokens, seed=seed, number=number)
        for number, prompt in enumerate(prompts)
    )
    found: dict[int, list[int]] = collections.defaultdict(list)
    generator = Generator(model, rows, **options)
    try:
        for piece in generator.stream(requests):
            found[piece.index] += piece.ids
    finally:
        generator.release()
    return [found[index] for index in range(len(found))]


def stream(
    model: Model, prompt: Sequence[int], *, max_new_tokens: int = 128, sampler: Sampler | None = None, seed: int = 0
) -> Iterator[int]:
    """`generate` for one prompt, id by id."""
    request = Request(prompt, sampler=sampler or Sampler(), max_new_tokens=max_new_tokens, seed=seed)
    for piece in Generator(model, 1).stream([request]):
        yield from piece.ids
