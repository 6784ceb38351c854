"""The states of a decoder's rows, in buffers at fixed addresses that decoding steps write over."""

from torch import Tensor

from megatron_tn.inference.token import token_logits
from megatron_tn.model.base import DecodingState, Model

BUFFERED_ROWS = 16  # from so many rows on a buffered step was faster (docs/measurements/2026-11-29.md)
SLOTS = 16  # tokens between two writes of a buffered state: more make a step read more keys and values


class RowStates:
    """One state tensor a layer, [B, ...], read and written by every step."""

    writes = True  # whether the next step writes the states: part of a CUDA graph's key

    def __init__(self, model: Model, rows: int):
        self.model = model
        self.layers = model.model.initial_state(rows)

    def advance(self) -> None:
        """A step has been run, or its graph replayed."""

    def put(self, row: int, state: DecodingState | None) -> None:
        """Let `row` begin with `state` (B = 1); None: before the first token."""
        for layer, buffer in enumerate(self.layers):
            buffer[row] = 0 if state is None else state.layers[layer][0]

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions int64 [B] -> [B, V]; the states become those after the tokens."""
        return token_logits(self.model, tokens, positions, self.layers)


class BufferedRowStates(RowStates):
    """States that are written every SLOTS tokens only; see `kernels.gla.buffered`."""

    def __init__(self, model: Model, rows: int):
        self.model = model
        self.buffers = model.model.buffered_state(rows, SLOTS)
        self.layers = [buffer.state for buffer in self.buffers]
        self.steps = 0

    @property
    def writes(self) -> bool:
        return self.steps % SLOTS == SLOTS - 1

    def advance(self) -> None:
        self.steps += 1

    def put(self, row: int, state: DecodingState | None) -> None:
        super().put(row, state)
        first = self.buffers[0]
        first.start[row : row + 1].copy_(first.slot)

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        state = DecodingState([buffer._replace(fold=self.writes) for buffer in self.buffers], positions)
        out = self.model(tokens[:, None], state=state, update_state=True)
        self.buffers[0].advance()
        return out.logits[:, 0]


def row_states(model: Model, rows: int) -> RowStates:
    """The states of a decoder's rows: buffered where that is faster, on a GPU for many rows, if the architecture
    can."""
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu and rows >= BUFFERED_ROWS and getattr(model.model, "bufferable_state", False):
        return BufferedRowStates(model, rows)
    return RowStates(model, rows)
