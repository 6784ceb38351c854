"""The settings `optim.*`: AdamW, and Muon for the blocks' matrices."""

from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import AboveZero, Bounds, Count, FromZero, Unlimited
from megatron_tn.config.mapping import STRICT

Beta = Annotated[float, Bounds(0, 1, below=True)]


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """AdamW (arXiv 1711.05101); Muon (Jordan 2024, arXiv 2502.16982) with AdamW for what is no matrix of a block."""

    # muon: momentum orthogonalised for the blocks' matrices, scaled so that lr and weight_decay are AdamW's; AdamW for
    # embedding, head, norm weights and LRPE's theta.
    name: Literal["adamw", "muon"] = "adamw"
    lr: AboveZero = 3e-4  # learning rate at the peak of the schedule
    beta1: Beta = 0.9  # decay rate of the first moment
    beta2: Beta = 0.95  # decay rate of the second moment
    eps: AboveZero = 1e-8  # added to the square root of the second moment
    weight_decay: FromZero = 0.1  # for matrices only; norm weights and LRPE's theta have none
    clip_norm: Unlimited = 1.0  # largest global gradient norm; gradients are scaled down to it. 0: no clipping
    # AdamW kernel. triton: this package's; torch: PyTorch's; apex: FusedAdam of NVIDIA apex; auto: triton on a GPU,
    # torch on a CPU.
    fused: Literal["auto", "triton", "torch", "apex"] = "auto"
    momentum: Beta = 0.95  # muon: share of the momentum that a step keeps (Jordan 2024, arXiv 2502.16982)
    # muon: applied steps over which momentum rises linearly from 0.85; 0: none, since the rate warms up, too (300 in
    # Jordan's speed runs, which have no warm-up of the rate).
    momentum_warmup_steps: Count = 0
