"""The settings `optim.*`: AdamW, and Muon for the blocks' matrices."""

from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import AboveZero, Bounds, Count, FromZero, Unlimited
from megatron_tn.config.mapping import STRICT

# Settings that optim.name=muon alone reads.
OF_MUON = ("momentum", "momentum_warmup_steps", "equal_norms", "heads_apart")
Beta = Annotated[float, Bounds(0, 1, below=True)]


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """AdamW (arXiv 1711.05101); Muon (Jordan 2024, arXiv 2502.16982) with AdamW for what is no matrix of a block."""

    # adamw: AdamW for every parameter. muon: orthogonalised momentum for the blocks' matrices, scaled so that AdamW's
    # lr and weight_decay fit; AdamW for embedding, head, norm weights and LRPE's theta.
    name: Literal["adamw", "muon"] = "adamw"
    lr: AboveZero = 3e-4  # learning rate at the peak of the schedule, after warm-up
    # learning rate of the embedding, which is also the head, divided by that of the other parameters. AdamW steps it
    # whatever optim.name is.
    embedding_lr_ratio: AboveZero = 1.0
    beta1: Beta = 0.9  # AdamW: decay rate of the first moment
    beta2: Beta = 0.95  # AdamW: decay rate of the second moment
    eps: AboveZero = 1e-8  # AdamW: added to the square root of the second moment
    weight_decay: FromZero = 0.1  # decoupled weight decay of matrices; norm weights and LRPE's theta have none
    # Largest L2 norm of the whole gradient; a larger gradient is scaled down to it. 0: no clipping.
    clip_norm: Unlimited = 1.0
    # kernel of AdamW. triton: kernels/adamw; torch: PyTorch's fused AdamW; apex: NVIDIA apex's FusedAdam; auto: triton
    # on a GPU, torch on a CPU.
    fused: Literal["auto", "triton", "torch", "apex"] = "auto"
    momentum: Beta = 0.95  # muon: mu in M = mu M + (1 - mu) G (Jordan 2024, arXiv 2502.16982)
    # muon: applied steps over which momentum rises linearly from 0.85 to optim.momentum; 0: constant momentum, since
    # the learning rate warms up. Jordan's speed runs have 300, and no warm-up of the learning rate.
    momentum_warmup_steps: Count = 0
    # muon: scale the rows of an orthogonalised update to one norm, or its columns where they are more, and keep the
    # update's norm (NorMuon, arXiv 2510.05491, but by this step's norms instead of an average over steps).
    equal_norms: bool = False
    # muon: orthogonalise each head of q, k, v and u by itself. false: the heads of each together.
    heads_apart: bool = False
