"""Sampling of each row's next token from its logits."""

import math

import torch
from torch import Tensor

from kernels import dispatch
from kernels.sampling.uniform import uniform


def sample_tokens(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    penalty: Tensor | None = None,
    seen: Tensor | None = None,
    candidates: int = 0,
    nucleus: bool = False,
) -> Tensor:
    """logits [B, V] -> ids int64 [B], drawn from softmax(logits / temperature), restricted by top_k and then by top_p.

    A row's token is drawn by inverting the cumulative probabilities, in the order of ids, at uniform(key, position): it
    depends on that row alone. Where the temperature is 0 it is the argmax.
    keys, positions: int64 [B], see `kernels.sampling.uniform`. temperature: fp64 [B], in the logits' units.
    top_k: int64 [B], keep the k largest logits and those equal to the kth; 0 keeps all.
    top_p: fp64 [B], keep the fewest of the likeliest tokens whose probabilities add up to p (arXiv 1904.09751), and
        those equal to the last of them; 1 keeps all.
    penalty, seen: fp32 [B] and bool [B, V], both or none. Logits of seen tokens are divided by the penalty where
        positive and multiplied where negative (CTRL, arXiv 1909.05858, section 4.1). Drawn tokens are marked as seen.
    candidates: at least the largest top_k of rows with a temperature, V if such a row has top_p < 1 and top_k 0; 0 if
        neither restricts a row. nucleus: whether a row has top_p < 1. They spare plain PyTorch a sort.

    The Triton kernel computes probabilities in fp32, plain PyTorch in fp64.
    """
    return torch.ops.megatron_tn.sample_tokens(
        logits, keys, positions, temperature, top_k, top_p, penalty, seen, candidates, nucleus
    )


@torch.library.custom_op("megatron_tn::sample_tokens", mutates_args=("seen",))
def _sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    penalty: Tensor | None,
    seen: Tensor | None,
    candidates: int,
    nucleus: bool,
) -> Tensor:
    if dispatch.choose("sample_tokens", logits) == "triton":
        from kernels.sampling import triton_sampling

        return triton_sampling.sample(
            logits=logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            keys=keys,
            positions=positions,
            penalty=penalty,
            seen=seen,
        )
    logits = logits.float()
    if seen is not None:
        logits = torch.where(
            seen, torch.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None]), logits
        )
    least = _least(logits, temperature, top_k, top_p, candidates, nucleus)
    cumulative = _weights(logits, logits, temperature).masked_fill_(logits < least, 0).cumsum(-1)
    drawn = uniform(keys, positions)[:, None] * cumulative[:, -1:]
    chosen = torch.where(temperature > 0, (cumulative <= drawn).sum(-1), logits.argmax(-1))
    if seen is not None:
        seen.scatter_(1, chosen[:, None], True)
    return chosen


@_sample.register_fake
def _fake(logits, keys, positions, temperature, top_k, top_p, penalty, seen, candidates, nucleus):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _weights(x: Tensor, logits: Tensor, temperature: Tensor) -> Tensor:
    """exp((x - largest logit) / temperature), fp64: probabilities times a factor."""
    temperature = torch.where(temperature > 0, temperature, 1.0)[:, None]
    return ((x - logits.amax(-1, keepdim=True)) / temperature).exp_()


def _least(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, candidates: int, nucleus: bool) -> Tensor:
    """The least logit of each row that is kept, [B, 1]."""
    least = torch.full_like(logits[:, :1], -math.inf)
    if not candidates:
        return least
    ordered = logits.topk(candidates).values
    kth = ordered.gather(1, top_k.clamp(1, candidates)[:, None] - 1)
    least = torch.where(top_k[:, None] > 0, kth, least)
    if not nucleus:
        return least
    total = _weights(logits, logits, temperature).masked_fill_(logits < least, 0).cumsum(-1)[:, -1:]
    summands = _weights(ordered, logits, temperature).masked_fill_(ordered < least, 0)
    before = summands.cumsum(-1) - summands
    # The likeliest token is always inside. Where no logit is finite, weights are NaN, and the sum is 0.
    inside = (before < top_p[:, None] * total).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(top_p[:, None] < 1, torch.maximum(least, ordered.gather(1, inside - 1)), least)
