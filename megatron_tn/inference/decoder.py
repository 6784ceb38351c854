"""Decoding of several rows together, over buffers at fixed addresses: on a GPU one CUDA graph a token."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tn.device.graph import GraphCache
from megatron_tn.device.host_copy import HostCopy
from megatron_tn.device.streams import on_stream
from megatron_tn.inference.prefix import Prefix
from megatron_tn.inference.sampler import Plan, Sampler, SamplingRows, sample
from megatron_tn.inference.states import RowStates, row_states
from megatron_tn.model.base import DecodingState, Model, has_fixed_state
from megatron_tn.parallel.world import release_on_leaving


class Parts(NamedTuple):
    """The key of a CUDA graph. feeding: some row has ids of its prompt left. writing: the states are written."""

    plan: Plan
    feeding: bool
    writing: bool = True


class Decoder:
    """B rows, each a sequence at a position of its own. One step of all rows is a function of the buffers alone:

        logits = token_logits(tokens, positions, states); tokens = sample(logits); positions += 1

    tokens int64 [B]: each row's last token, which its state does not contain yet. positions int64 [B]: their positions.
    states: the rows' states, see states.py. Rows that no sequence occupies are decoded as well, to no use.
    fed int64 [B, most_fed]: the rest of prompts that are decoded with the batch. While a row has ids of its prompt
    left, the next one takes the place of the sampled one.

    On a GPU a step runs kernel by kernel the first time that its parts are met, which compiles kernels, and is captured
    the second time. Collective over tensor parallelism: every rank makes the same calls and gets the same ids.
    """

    def __init__(self, model: Model, rows: int, most_fed: int = 0):
        self.model = model
        self.rows = rows
        device = next(model.parameters()).device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.states = self._make_states()
        self.sampling = SamplingRows(rows, model.config.vocab_size, device)
        self.fed = torch.zeros(rows, max(most_fed, 1), dtype=torch.int64, device=device)
        self.fed_at = torch.zeros(rows, dtype=torch.int64, device=device)
        self.fed_count = torch.zeros(rows, dtype=torch.int64, device=device)
        # The rows' settings on the host: they decide which parts a step has (`Parts`, `Plan`).
        self.samplers = [Sampler(temperature=0)] * rows
        self.left_to_feed = [0] * rows
        self._met: set[Parts] = set()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and self.states else None
        self._graphs = None if self._stream is None else GraphCache(self._stream)
        if self._graphs is not None and model.context.tp.size > 1:
            release_on_leaving(self._graphs)

    @torch.no_grad()
    def start(self, row: int, prefix: Prefix, fed: Sequence[int] = (), *, sampler: Sampler, key: int) -> None:
        """Put a sequence that begins with `prefix` into `row`; the ids `fed` follow, and are the row's first ids.

        key: `uniform.stream_key`.
        """
        self._set_state(row, prefix.state)
        self.tokens[row] = prefix.last
        self.positions[row] = prefix.length - 1
        self.fed_at[row] = 0
        self.fed_count[row] = len(fed)
        if fed:
            self.fed[row, : len(fed)] = torch.tensor(fed, device=self.fed.device)
        self.sampling.set(row, sampler, key, prefix.seen.union(fed))
        self.samplers[row] = sampler
        self.left_to_feed[row] = len(fed)

    def free(self, row: int) -> None:
        """The sequence in `row` has ended: its settings decide the parts of a step no longer."""
        self.samplers[row] = Sampler(temperature=0)
        self.left_to_feed[row] = 0

    @torch.no_grad()
    def run(self, count: int) -> HostCopy:
        """The next `count` ids of every row, [count, B]. On a GPU the host only queues the steps and the copy."""
        parts = Parts(Plan.of(self.samplers, self.model.config.vocab_size), feeding=any(self.left_to_feed))
        ids = torch.empty(count, self.rows, dtype=torch.int64, device=self.tokens.device)
        for at in range(count):
            ids[at] = self._run_next(parts)
        self.left_to_feed = [max(left - count, 0) for left in self.left_to_feed]
        return HostCopy(ids)

    def release(self) -> None:
        """Drop the CUDA graphs; the next step captures again."""
        if self._graphs is not None:
            self._graphs.release()

    def _run_next(self, parts: Parts) -> Tensor:
        if self.states is None:
            return self._run_one(parts)
        ids = self._run_one(parts._replace(writing=self.states.writes))
        self.states.advance()
        return ids

    def _run_one(self, parts: Parts) -> Tensor:
        if self._graphs is None:
            return self._step(parts)
        if parts not in self._met:
            self._met.add(parts)
            with on_stream(self._stream):
                return self._step(parts)
        if parts not in self._graphs:
            self._graphs.capture(parts, lambda: self._step(parts), ())
        return self._graphs.replay(parts, ())

    def _step(self, parts: Parts) -> Tensor:
        chosen = sample(self._logits(), self.sampling, self.positions, parts.plan)
        if parts.feeding:
            at = self.fed_at.clamp(max=self.fed.shape[1] - 1)[:, None]
            chosen = torch.where(self.fed_at < self.fed_count, self.fed.gather(1, at)[:, 0], chosen)
            self.fed_at += 1
        self.tokens.copy_(chosen)
        self.positions += 1
        return self.tokens

    def _make_states(self) -> RowStates | None:
        return row_states(self.model, self.rows)

    def _set_state(self, row: int, state: DecodingState | None) -> None:
        self.states.put(row, state)

    def _logits(self) -> Tensor:
        """[B, V], and the states become those after the tokens."""
        return self.states.logits(self.tokens, self.positions)


class GrowingDecoder(Decoder):
    """One row of an architecture whose state grows with every token (not `Body.fixed_state`): without a graph."""

    def _make_states(self) -> None:
        return None

    def _set_state(self, row: int, state: DecodingState | None) -> None:
        self._state = state

    def _logits(self) -> Tensor:
        out = self.model(self.tokens[:, None], state=self._state, return_state=True)
        self._state = out.state
        return out.logits[:, 0]


def build_decoder(model: Model, rows: int, most_fed: int = 0) -> Decoder:
    """rows is 1 for a state that grows."""
    return (Decoder if has_fixed_state(model) else GrowingDecoder)(model, rows, most_fed)
