"""Reads and writes the released (Hugging Face) layout: config.json and safetensors files.

Tensor names and shapes are those of the released TransNormerLLM family, so weights can be exchanged both ways.
The family computes decay rates from the layer index. This writer also stores them (`decay_rates`, [L][H]), and the
reader compares them: a model with other decay rates than in training would be silently wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_tn.checkpoint.manifest import Piece
from megatron_tn.config import ConfigError, ModelConfig, from_mapping, read_mapping
from megatron_tn.model.base import Model
from megatron_tn.model.decay import all_decay_rates
from megatron_tn.model.registry import architecture, build_model
from megatron_tn.parallel.context import ParallelContext

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ACTS = {"swish": "silu", "silu": "silu", "none": "none", "1+elu": "1+elu"}


def config_from_released(values: dict[str, Any]) -> ModelConfig:
    """A released config.json as a `ModelConfig`.

    Raises:
        ConfigError: a field is missing, or its value is not supported.
    """
    problems = []
    required = ("vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "glu_dim")
    for name in required:
        if name not in values:
            problems.append(f"config.json has no {name}")
        elif not isinstance(values[name], int):
            problems.append(f"config.json: {name}={values[name]!r} is not a whole number")
    act, norm = values.get("linear_act_fun", "swish"), values.get("norm_type", "simplermsnorm")
    if act not in _ACTS:
        problems.append(f"config.json: linear_act_fun={act!r} is not one of {', '.join(_ACTS)}")
    if norm not in ("simplermsnorm", "rmsnorm"):
        problems.append(f"config.json: norm_type={norm!r} is not one of simplermsnorm, rmsnorm")
    if values.get("bias", False):
        problems.append("config.json: bias=true, but this model has no biases")
    if values.get("hidden_dim", values.get("decoder_embed_dim")) != values.get("decoder_embed_dim"):
        problems.append(
            f"config.json: hidden_dim={values['hidden_dim']} differs from "
            f"decoder_embed_dim={values['decoder_embed_dim']}"
        )
    extra = values.get("megatron_tn", {})  # settings that the released family lacks
    if not isinstance(extra, dict):
        problems.append(f"config.json: megatron_tn={extra!r} is not a mapping")
    if problems:
        raise ConfigError(problems)
    layers = values["decoder_layers"]
    fields = {
        "name": extra.get("name", "released"),
        "vocab_size": values["vocab_size"],
        "embed_dim": values["decoder_embed_dim"],
        "layers": layers,
        "heads": values["decoder_attention_heads"],
        "glu_dim": values["glu_dim"],
        "scale_embedding": not values.get("no_scale_embedding", False),
        "norm": norm,
        "norm_eps": extra.get("norm_eps", 1e-6),
        "act": _ACTS[act],
        "glu_act": extra.get("glu_act", "none"),
        "gate": extra.get("gate", True),
        "lrpe": [bool(flag) for flag in values.get("linear_use_lrpe_list") or [1] + [0] * (layers - 1)],
        "decay": extra.get("decay", "released"),
        "decay_temperature": extra.get("decay_temperature", True),
        "init_std": values.get("init_std", 0.02),
        "pad_id": values.get("pad_token_id", 0),
        "bos_id": values.get("bos_token_id", 1),
        "eos_id": values.get("eos_token_id", 2),
    }
    try:
        config = from_mapping(ModelConfig, fields)
    except ConfigError as error:
        raise ConfigError([f"config.json: {problem}" for problem in error.problems]) from None
    stored = values.get("decay_rates")
    if stored is not None and not _same_rates(stored, all_decay_rates(config)):
        raise ConfigError(
            f"config.json: the stored decay_rates are not those of decay={config.decay!r}, "
            f"decay_temperature={config.decay_temperature}: the model was trained with other rates"
        )
    return config


def config_to_released(config: ModelConfig) -> dict[str, Any]:
    """Fields of a released config.json, plus `decay_rates`, plus "megatron_tn": settings the family lacks."""
    released = architecture(config).released
    return {
        "architectures": [released.class_name],
        "model_type": released.model_type,
        "vocab_size": config.vocab_size,
        "decoder_embed_dim": config.embed_dim,
        "hidden_dim": config.embed_dim,
        "decoder_layers": config.layers,
        "decoder_attention_heads": config.heads,
        "glu_dim": config.glu_dim,
        "linear_use_lrpe_list": [int(flag) for flag in config.lrpe_layers],
        "linear_act_fun": config.act,
        "norm_type": config.norm,
        "no_scale_embedding": not config.scale_embedding,
        "add_bos_token": False,
        "bias": False,
        "init_std": config.init_std,
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "tie_word_embeddings": True,
        "decay_rates": all_decay_rates(config),
        "megatron_tn": {
            "name": config.name,
            "norm_eps": config.norm_eps,
            "glu_act": config.glu_act,
            "gate": config.gate,
            "decay": config.decay,
            "decay_temperature": config.decay_temperature,
        },
    }


def load_pretrained(
    directory: str | Path,
    context: ParallelContext | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Build a model from a directory in the released layout: config.json and safetensors files.

    Each tensor-parallel rank of `context` reads only its slices of the tensors.

    Raises:
        FileNotFoundError: no such directory, no config.json in it, or no weights.
        ConfigError: a file is damaged; the config does not fit the model or the parallel layout; a tensor is missing,
            unknown, or of another shape.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json: not a model in the released layout")
    config = config_from_released(read_mapping(directory / "config.json"))
    context = context or ParallelContext()
    model = build_model(config, context, device, dtype)
    files = _tensor_files(directory)
    specs = model.shard_specs()
    problems = [f"{directory}: tensor {name} is missing" for name in specs if name not in files]
    unknown = files.keys() - specs.keys() - architecture(config).released.repeated.keys()
    problems += [f"{directory}: unknown tensor {name}" for name in sorted(unknown)]
    if problems:
        raise ConfigError(problems)
    axis = context.tp
    parameters = dict(model.named_parameters())
    for file in sorted(set(files.values())):
        with _opened(file) as tensors:
            there = set(tensors.keys())
            for name, spec in specs.items():
                if files[name] != file:
                    continue
                if name not in there:
                    raise ConfigError(f"{file} has no tensor {name}, which {INDEX_FILE} looks for in it")
                view = tensors.get_slice(name)
                if tuple(view.get_shape()) != spec.shape:
                    raise ConfigError(
                        f"{file}: {name} has shape {view.get_shape()}, but config.json makes it {list(spec.shape)}"
                    )
                local = torch.zeros(spec.local_shape(axis.rank, axis.size))
                offset, dim = 0, spec.dim or 0
                for box in spec.boxes(axis.rank, axis.size):
                    part = view[tuple(slice(*edge) for edge in box)].float()
                    local.narrow(dim, offset, part.shape[dim]).copy_(part)
                    offset += part.shape[dim]
                with torch.no_grad():
                    parameters[name].copy_(local)
    return model


class ReleasedTensors:
    """The weights in a released model's folder, read piece by piece; takes the place of a checkpoint's Reader."""

    def __init__(self, directory: Path):
        self._files = _tensor_files(directory)
        self._directory = directory

    def fill(self, kind: str, name: str, shape: tuple[int, ...], piece: Piece, destination: torch.Tensor) -> None:
        """Fill `destination` [piece.stop - piece.start] with that piece of tensor `name`; the only kind is "param".

        Raises:
            ConfigError: the tensor is missing or has another shape.
        """
        if name not in self._files:
            raise ConfigError(f"{self._directory}: tensor {name} is missing")
        with _opened(self._files[name]) as tensors:
            view = tensors.get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise ConfigError(f"{self._directory}: {name} has shape {view.get_shape()}, not {list(shape)}")
            box = view[tuple(slice(*edge) for edge in piece.box)]
        with torch.no_grad():
            destination.copy_(box.flatten()[piece.start : piece.stop])


def save_pretrained(model: Model, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `model` in the released layout; global rank 0 writes. Collective over tensor parallel."""
    directory = Path(directory)
    weights = {}
    for name, parameter in model.named_parameters():
        whole = parameter.shard_spec.gather(parameter.detach(), model.context.tp)
        weights[name] = whole.to(device="cpu", dtype=dtype or parameter.dtype).contiguous()
    if model.context.is_first:
        write_released(weights, model.config, directory)


def write_released(weights: dict[str, torch.Tensor], config: ModelConfig, directory: Path) -> None:
    """Write whole logical tensors and their config.json, each file under a temporary name first."""
    directory.mkdir(parents=True, exist_ok=True)
    weights_tmp, config_tmp = directory / f"{WEIGHTS_FILE}.tmp", directory / "config.json.tmp"
    save_file(weights, weights_tmp, metadata={"format": "pt"})
    # safetensors creates files with mode 0600; give the file the folder's read and write permissions.
    weights_tmp.chmod(directory.stat().st_mode & 0o666)
    weights_tmp.replace(directory / WEIGHTS_FILE)
    config_tmp.write_text(json.dumps(config_to_released(config), indent=1) + "\n")
    config_tmp.replace(directory / "config.json")


def _same_rates(a: Any, b: list[list[float]]) -> bool:
    try:
        a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    except (TypeError, ValueError):  # not numbers, or rows of unequal length
        return False
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-5, atol=1e-9))


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    # model.safetensors wins over the index, as in transformers: an export writes that file and does not remove the
    # index and shards of an older model in the folder.
    index, whole = directory / INDEX_FILE, directory / WEIGHTS_FILE
    if index.is_file() and not whole.is_file():
        weight_map = read_mapping(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ConfigError(f"{index} is damaged: it has no weight_map of tensors' names to files")
        names = {name: Path(file) for name, file in weight_map.items()}
        if outside := [str(file) for file in names.values() if file.name != str(file)]:
            raise ConfigError(f"{index}: {outside[0]!r} is not a plain file name in the model's directory")
        return {name: directory / file for name, file in names.items()}
    files: dict[str, Path] = {}
    # Beside model.safetensors, other safetensors files are not weights.
    for file in [whole] if whole.is_file() else sorted(directory.glob("*.safetensors")):
        with _opened(file) as tensors:
            files.update(dict.fromkeys(tensors.keys(), file))
    if not files:
        raise FileNotFoundError(f"{directory} has no *.safetensors files")
    return files


def _opened(file: Path) -> safe_open:
    """`safe_open` as a context manager. Raises ConfigError when the file is missing or damaged."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
