"""The features of q and k, act(x) or LRPE(act(x)), as a separate operator, whose result selective recomputation need
not keep.

The operators here have no gradient: gla's backward pass computes dqkvu through the features, so that q, k, v and u
share one gradient tensor. Plain PyTorch computes features within its passes and saves none.
"""

import torch
from torch import Tensor

from kernels.gla.inputs import backend, key_width, parts


def form_features(
    *,
    qkvu: Tensor,
    theta: Tensor | None,
    act: str,
    positions: Tensor | None,
    heads: int,
    keys_alone: bool = False,
) -> Tensor | None:
    """The features of q and k, [B, T, 2, H, K]; None where the feature map is the identity (no activation, no LRPE).

    keys_alone: leave q's features unwritten, for `add_query_features_`. positions: [T] or [B, T]; None counts from 0
    in every row, also with packed documents.
    """
    if act == "none" and theta is None:
        return None
    fixed = None if theta is None else theta.detach()
    return torch.ops.megatron_tn.gla_features(qkvu.detach(), fixed, act, positions, heads, keys_alone)


def add_query_features_(
    features: Tensor | None, *, qkvu: Tensor, theta: Tensor | None, act: str, positions: Tensor | None
) -> None:
    """Write q's features into `features`, the result of `form_features(keys_alone=True)`; other arguments as there."""
    if features is not None:
        fixed = None if theta is None else theta.detach()
        torch.ops.megatron_tn.gla_query_features_(features, qkvu.detach(), fixed, act, positions)


@torch.library.custom_op("megatron_tn::gla_features", mutates_args=())
def _features(
    qkvu: Tensor, theta: Tensor | None, act: str, positions: Tensor | None, heads: int, keys_alone: bool = False
) -> Tensor:
    v = parts(qkvu, heads)[2]
    if backend(v, theta) == "triton":
        from kernels.gla.feature_map import FeatureMap

        feature_map = FeatureMap(heads=heads, act=act, theta=theta, positions=positions)
        return feature_map.apply(qkvu, queries=not keys_alone)
    return _empty_features(v, theta)


@torch.library.custom_op("megatron_tn::gla_query_features_", mutates_args=("features",))
def _query_features_(features: Tensor, qkvu: Tensor, theta: Tensor | None, act: str, positions: Tensor | None) -> None:
    # Plain PyTorch on a GPU leaves the features unwritten: see _empty_features.
    if features.numel() and backend(parts(qkvu, features.shape[3])[2], theta) == "triton":
        from kernels.gla.feature_map import FeatureMap

        feature_map = FeatureMap(heads=features.shape[3], act=act, theta=theta, positions=positions)
        feature_map.apply(qkvu, features, keys=False)


@_features.register_fake
def _features_fake(qkvu, theta, act, positions, heads, keys_alone=False):
    return _empty_features(parts(qkvu, heads)[2], theta)


@_query_features_.register_fake
def _query_features_fake(features, qkvu, theta, act, positions):
    return None


def _empty_features(v: Tensor, theta: Tensor | None) -> Tensor:
    """Uninitialised features on a GPU (for fake tensors too, which do not know the backend); else an empty tensor."""
    if not v.is_cuda or v.dtype == torch.float64:
        return v.new_empty(0)
    batch, total, heads, _ = v.shape
    return v.new_empty(batch, total, 2, heads, key_width(v, theta))
