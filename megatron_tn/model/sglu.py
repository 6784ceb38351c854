"""Simple gated linear unit, the channel mixer: out = W_3 (act(W_1 x) * W_2 x); act is the identity by default."""

from torch import Tensor, nn

from megatron_tn.config import ModelConfig
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.linear import ColumnParallelLinear, RowParallelLinear, gated_unit, share_input
from megatron_tn.parallel.sequence import TokenSlices


class SGLU(nn.Module):
    """x [B, n, D] -> [B, n, D], or slices [S, D] -> [S, D].

    W_1 and W_2 [F, D], F = model.glu_dim, are split by rows over tensor parallel, W_3 [D, F] by columns.
    """

    def __init__(self, config: ModelConfig, axis: Axis):
        super().__init__()
        self.act = config.glu_act
        self.l1 = ColumnParallelLinear(config.embed_dim, config.glu_dim, axis)
        self.l2 = ColumnParallelLinear(config.embed_dim, config.glu_dim, axis)
        share_input(self.l1, self.l2)
        self.l3 = RowParallelLinear(config.glu_dim, config.embed_dim, axis)

    def forward(self, x: Tensor, slices: TokenSlices | None = None) -> Tensor:
        return gated_unit(x, self.l1, self.l2, self.l3, self.act, slices)
