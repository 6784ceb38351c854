"""Measure decoding on this machine: milliseconds of one token of the whole batch, sampling included.

python -m megatron_tn.benchmarking.decode --model 1b --rows 1 256 --positions 0 1000000 --output rows.jsonl

Random weights, bf16 on a GPU; the decoder of `python -m megatron_tn.generate`, which replays one CUDA graph a token.
Each figure is the median of three runs of --tokens tokens. Rows of the output are JSON, as of megatron_tn.benchmark.

With --peer llama, a Hugging Face LLaMA of the sizes of --model (transformer_1b, ...) decodes instead: generate() with
its static key-value cache, which it compiles on a GPU. Positions are then the lengths of that cache, filled with random
keys and values; a cache that does not fit into the GPU's memory is a row without a value. With --peer retnet,
flash-linear-attention's RetNet of the sizes of --model (1b, ...): generate() with its recurrent state, after a prompt.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf

import megatron_tn.train  # noqa: F401  registers the schema of conf/config.yaml
from kernels.bench import rows
from megatron_tn.benchmarking.clock import release
from megatron_tn.benchmarking.peers import filled_cache, llama, retnet
from megatron_tn.cli import CONF, bad_input_exits
from megatron_tn.config import ConfigError, ModelConfig, from_mapping
from megatron_tn.device.matrix_rate import elapsed, mark
from megatron_tn.inference.decoder import build_decoder
from megatron_tn.inference.prefix import Prefix
from megatron_tn.inference.sampler import Sampler
from megatron_tn.inference.states import SLOTS
from megatron_tn.model.base import Model
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.fp8_weights import keep_in_fp8

RUNS = 3
PEER_WARM_UP = 8  # tokens: the first compile, and are captured as a CUDA graph


def model_config(name: str) -> ModelConfig:
    """The size conf/model/`name`.yaml. Raises ConfigError: there is none."""
    if not (CONF / "model" / f"{name}.yaml").is_file():
        raise ConfigError(f"--model {name}: conf/model has no such file")
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        return from_mapping(
            ModelConfig, OmegaConf.to_container(hydra.compose("config", overrides=[f"model={name}"]).model)
        )


def random_model(name: str, device: str, *, fp8_weights: bool) -> Model:
    """`model_config(name)` with random weights; bf16 on a GPU, with `fp8_weights` kept in fp8."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build_model(model_config(name), None, device, dtype)
    initialize(model, seed=0)
    if fp8_weights:
        keep_in_fp8(model)
    return model


def token_ms(model: Model, batch: int, position: int, sampler: Sampler, tokens: int) -> float:
    """Milliseconds of one decoding step of `batch` rows that are at `position`, the median of RUNS runs of `tokens`
    steps after those that compile kernels and capture the graphs."""
    decoder = build_decoder(model, batch)
    for row in range(batch):
        decoder.start(row, Prefix(None, model.config.bos_id, frozenset()), sampler=sampler, key=row)
    decoder.positions += position
    decoder.run(2 * SLOTS).read()
    found = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        decoder.run(tokens).read()  # the copy to the host ends after the last step
        found.append(1e3 * (time.perf_counter() - begin) / tokens)
    decoder.release()
    return statistics.median(found)


def peer_steps(tokens: int) -> int:
    """Tokens that `peer_token_ms` decodes."""
    return PEER_WARM_UP + RUNS * tokens + 1


def peer_token_ms(peer: torch.nn.Module, batch: int, position: int, sampler: Sampler, tokens: int) -> float:
    """`token_ms` of a Hugging Face model. A LLaMA has a static cache of `position` tokens a row, all of which attention
    reads in every step. The last peer_steps(tokens) of them are decoded."""
    device = next(peer.parameters()).device
    sampled = sampler.temperature > 0
    drawn = {"temperature": sampler.temperature, "top_k": sampler.top_k, "top_p": sampler.top_p} if sampled else {}
    count, marks = peer_steps(tokens), []

    def marked(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        marks.append(mark(device))
        return logits

    if peer.config.model_type == "llama":
        drawn["past_key_values"] = filled_cache(peer, batch, position - count - 1, position)
    peer.generate(
        torch.ones(batch, position - count, dtype=torch.int64, device=device),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=sampled,
        pad_token_id=0,
        logits_processor=[marked],
        **drawn,
    )
    return statistics.median(elapsed(marks[PEER_WARM_UP::tokens])) / tokens


def measured(
    model: torch.nn.Module, *, peer: bool, batch: int, position: int, sampler: Sampler, tokens: int
) -> float | None:
    """Milliseconds of one decoding step; None where a peer's cache does not fit into the GPU's memory."""
    if not peer:
        return token_ms(model, batch, position, sampler, tokens)
    try:
        return peer_token_ms(model, batch, position, sampler, tokens)
    except torch.OutOfMemoryError:
        return None
    finally:
        release()  # the next shape is compiled for itself: torch.compile would make one program for all


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_tn.benchmarking.decode", description=__doc__)
    parser.add_argument("--model", default="1b", help="a file of conf/model (default: 1b)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="batch sizes (default: 1)")
    parser.add_argument(
        "--positions", type=int, nargs="+", default=[0], help="tokens before the first decoded one (default: 0)"
    )
    parser.add_argument("--tokens", type=int, default=200, help="decoded tokens of a timed run (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="the logits are divided by it; 0: greedy (default: 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=50, help="sample from the K likeliest tokens; 0: from all (default: 50)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens of total probability P; 1: from all (default: 1)",
    )
    parser.add_argument("--output", type=Path, help="file that JSON rows are appended to (default: none)")
    parser.add_argument("--fp8-weights", action="store_true", help="keep the matrices of the blocks in fp8")
    parser.add_argument("--peer", choices=["llama", "retnet"], help="time this model instead of ours")
    asked = parser.parse_args(arguments)
    try:
        sampler = Sampler(asked.temperature, asked.top_k, asked.top_p)
    except ConfigError as error:
        parser.error("; ".join(error.problems))
    if asked.peer and (least := min(asked.positions)) <= (steps := peer_steps(asked.tokens)):
        parser.error(
            f"--positions {least} must be more than {steps}, the tokens that are decoded with --tokens {asked.tokens}"
        )
    if asked.peer and asked.fp8_weights:
        parser.error(f"--fp8-weights does not go with --peer {asked.peer}: only our model can keep its weights in fp8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with bad_input_exits():
        if asked.peer == "llama":
            model, name = llama(model_config(asked.model), torch.device(device), head=True), "decoding of a LLaMA"
        elif asked.peer:
            model, name = retnet(model_config(asked.model), torch.device(device)), "decoding of a RetNet"
        else:
            model, name = random_model(asked.model, device, fp8_weights=asked.fp8_weights), "decoding"
    given = {
        "fp8_weights": asked.fp8_weights,
        "temperature": sampler.temperature,
        "top_k": sampler.top_k,
        "top_p": sampler.top_p,
    }
    for position, batch in itertools.product(sorted(asked.positions), asked.rows):
        value = measured(
            model, peer=bool(asked.peer), batch=batch, position=position, sampler=sampler, tokens=asked.tokens
        )
        said = "the cache does not fit" if value is None else f"{value:.4f} ms a token"
        kept = ", fp8 weights" if asked.fp8_weights else ""
        print(f"{name}, {asked.model}{kept}, batch {batch}, after {position} tokens: {said}", flush=True)
        if asked.output:
            extras = {"model": asked.model, "batch": batch, "position": position, **given}
            rows.append(asked.output, [rows.row(name, "ms", value, **extras)])


if __name__ == "__main__":
    main()
