"""Decoding of several rows together, over buffers at fixed addresses: on a GPU one CUDA graph a token."""

from __future__ import annotations

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


class Decoder:
    """B rows, each a sequence at a position of its own. One step of all rows is a function of the buffers alone:

        logits = token_logits(tokens, positions, states); tokens = sample(logits); positions += 1

    tokens int64 [B]: each row's last token, which its state does not contain yet. positions int64 [B]: their positions.
    states: the rows' states, see states.py. Rows that no sequence occupies are decoded as well, to no use.

    On a GPU a step runs kernel by kernel the first time that its plan is met, which compiles kernels, and is captured
    the second time. Collective over tensor parallelism: every rank makes the same calls and gets the same ids.
    """

    def __init__(self, model: Model, rows: int):
        self.model = model
        self.rows = rows
        device = next(model.parameters()).device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.states = self._make_states()
        self.sampling = SamplingRows(rows, model.config.vocab_size, device)
        self.samplers = [Sampler(temperature=0)] * rows
        self._met: set[Plan] = set()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and self.states else None
        self._graphs = None if self._stream is None else GraphCache(self._stream)
        if self._graphs is not None and model.context.tp.size > 1:
            release_on_leaving(self._graphs)

    @torch.no_grad()
    def start(self, row: int, prefix: Prefix, *, sampler: Sampler, key: int) -> None:
        """Put a sequence that begins with `prefix` into `row`. key: `uniform.stream_key`."""
        self._set_state(row, prefix.state)
        self.tokens[row] = prefix.last
        self.positions[row] = prefix.length - 1
        self.sampling.set(row, sampler, key, prefix.seen)
        self.samplers[row] = sampler

    @torch.no_grad()
    def run(self, count: int) -> HostCopy:
        """The next `count` ids of every row, [count, B]. On a GPU the host only queues the steps and the copy."""
        plan = Plan.of(self.samplers, self.model.config.vocab_size)
        ids = torch.empty(count, self.rows, dtype=torch.int64, device=self.tokens.device)
        for at in range(count):
            ids[at] = self._run_one(plan)
        return HostCopy(ids)

    def release(self) -> None:
        """Drop the CUDA graphs; the next step captures again."""
        if self._graphs is not None:
            self._graphs.release()

    def _run_one(self, plan: Plan) -> Tensor:
        if self._graphs is None:
            return self._step(plan)
        if plan not in self._met:
            self._met.add(plan)
            with on_stream(self._stream):
                return self._step(plan)
        if plan not in self._graphs:
            self._graphs.capture(plan, lambda: self._step(plan), ())
        return self._graphs.replay(plan, ())

    def _step(self, plan: Plan) -> Tensor:
        logits = self._logits()
        self.tokens.copy_(sample(logits, self.sampling, self.positions, plan))
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

    def __init__(self, model: Model):
        super().__init__(model, rows=1)

    def _make_states(self) -> None:
        return None

    def _set_state(self, row: int, state: DecodingState | None) -> None:
        self._state = state

    def _logits(self) -> Tensor:
        out = self.model(self.tokens[:, None], state=self._state, return_state=True)
        self._state = out.state
        return out.logits[:, 0]


def build_decoder(model: Model, rows: int) -> Decoder:
    return Decoder(model, rows) if has_fixed_state(model) else GrowingDecoder(model)
