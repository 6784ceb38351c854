"""A prefix in a file: its state in safetensors, computed once and continued any number of times.

Tensors: layer.N, the state of layer N without its batch dimension, of all heads; seen, int32, the ids that occur.
Metadata: format, model (`fingerprint`), config (JSON), dtype, length (tokens), last (the last token's id).
A file is read into any tensor-parallel layout. Its size does not depend on the number of tokens where the state's does
not.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_tn.config import ConfigError, to_mapping
from megatron_tn.inference.prefix import Origin, Prefix, check_ids, fingerprint, kind_difference, types
from megatron_tn.model.base import DecodingState, Model
from megatron_tn.parallel.collectives import all_gather, all_reduce_

FORMAT = "megatron_tn prefix 1"
HEADS = -3  # the dimension of every state that is split over tensor parallelism: [.., H / tp, K, d]


@torch.no_grad()
def save_prefix(prefix: Prefix, model: Model, path: str | Path) -> None:
    """Write `prefix`, computed by `model`, to `path`. Rank 0 writes, and every rank returns when the file is there.

    Raises:
        ConfigError: it cannot be written, or something else than a prefix of this model is there.
        ValueError: another model computed it.
    """
    prefix.check_origin(model)
    axis = model.context.tp
    layers = [] if prefix.state is None else prefix.state.layers
    tensors = {f"layer.{n}": all_gather(layer[0], axis, HEADS).cpu() for n, layer in enumerate(layers)}
    tensors["seen"] = torch.tensor(sorted(prefix.seen), dtype=torch.int32)
    metadata = {
        "format": FORMAT,
        **identity(model),
        "length": str(prefix.length),
        "last": str(prefix.last),
    }
    error = "rank 0 failed"
    written = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
    if axis.rank == 0 and (obstacle := replacing_problem(path, metadata)):
        error = obstacle
    elif axis.rank == 0:
        partial = Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(8)}.tmp")  # nobody else can foresee it
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
            partial.replace(path)
            written += 1
        except (OSError, SafetensorError) as failure:
            partial.unlink(missing_ok=True)
            error = str(failure)
    if not all_reduce_(written, axis).item():
        raise ConfigError(f"{path} cannot be written: {error}")


def replacing_problem(path: str | Path, own: Mapping[str, str] | None = None) -> str:
    """Why `save_prefix` must not replace what is at `path`; empty where nothing is there, or the file of a prefix.
    own: `identity` of the model, whose prefixes alone may then be replaced."""
    place = Path(path)
    if place.is_symlink() or (place.exists() and not place.is_file()):
        return "it is no regular file"
    if not place.exists():
        return ""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
        other = own is not None and _difference(metadata, own) if metadata.get("format") == FORMAT else None
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError):
        other = None
    if other is None:
        return "a file is there that holds no saved state: name another"
    return f"the state of another model is there: {other}" if other else ""


@torch.no_grad()
def load_prefix(path: str | Path, model: Model) -> Prefix:
    """The prefix in `path`, on the model's device. Collective over tensor parallelism.

    Raises:
        ConfigError: the file cannot be read, is no prefix, or another model computed it; the line says which.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"state={path} cannot be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"state={path} has format {metadata.get('format')!r}, not {FORMAT!r}")
    own = identity(model)
    try:
        if problem := _difference(metadata, own):
            raise ConfigError(f"state={path} was computed by another model: {problem}")
        return _prefix(metadata, tensors, model)
    except ConfigError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:  # of JSON, shapes or nesting
        raise ConfigError(f"state={path} is damaged: {error}") from None


def _prefix(metadata: dict[str, str], tensors: dict[str, Tensor], model: Model) -> Prefix:
    length, last, seen = int(metadata["length"]), int(metadata["last"]), frozenset(tensors["seen"].tolist())
    check_ids(seen | {last}, model.config.vocab_size)
    if not 1 <= length < 2**62 or tensors["seen"].dtype != torch.int32:
        raise ValueError(f"length {length}, ids in {tensors['seen'].dtype}")
    if length == 1:
        return Prefix(None, last, seen)
    axis, device = model.context.tp, next(model.parameters()).device
    layers = [tensors[f"layer.{n}"] for n in range(model.config.layers)]
    layers = [layer.chunk(axis.size, HEADS)[axis.rank].to(device)[None].contiguous() for layer in layers]
    for n, (layer, wanted) in enumerate(zip(layers, _layers_of(model, length - 1), strict=True)):
        if (layer.dtype, list(layer.shape)) != wanted:
            raise ValueError(f"layer.{n} is {layer.dtype} {list(layer.shape)}, not {wanted[0]} {wanted[1]}")
    return Prefix(DecodingState(layers, length - 1), last, seen, Origin.of(model))


def _layers_of(model: Model, tokens: int) -> Iterator[tuple[torch.dtype, list[int]]]:
    """Type and shape of each layer's state (B = 1) after so many tokens."""
    heads, dtype = model.config.heads // model.context.tp.size, model.lm_head.weight.dtype
    for block in model.blocks:
        mixer = block.token_mixer
        if widths := getattr(mixer, "state_widths", None):
            yield torch.promote_types(dtype, torch.float32), [1, heads, *widths]
        else:
            yield dtype, [1, 2, heads, mixer.kept_tokens(tokens), mixer.head_dim]


def identity(model: Model) -> dict[str, str]:
    """The metadata that name a model. Collective over tensor parallelism."""
    return {"model": fingerprint(model), "config": json.dumps(to_mapping(model.config)), "dtype": types(model)}


def _difference(theirs: Mapping[str, str], own: Mapping[str, str]) -> str:
    """The differences between the `identity` in a file's metadata and a model's own, in words; empty without any."""
    kinds = ((json.loads(each["config"]), each["dtype"]) for each in (theirs, own))
    if found := kind_difference(*kinds):
        return found
    if theirs["model"] != own["model"]:
        return f"weights with fingerprint {theirs['model']}, not {own['model']}"
    return ""
