"""Benchmark of the stream's reading and start: `python -m data_pipeline.stream.bench reader|start [--folder FOLDER]`.

reader: tokens per second of one process from local disk, compared with plain webdataset and, if installed, Hugging Face
datasets on the same shards. start: seconds from process start to the first batch at step 10^6, for a manifest of
100 000 shards (--shards) and 2 trillion tokens, with a filter; all shards are links to one file. Prints a line of JSON.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.cli import command, parser
from data_pipeline.errors import InputError
from data_pipeline.files import replace_file, sha256_of
from data_pipeline.shards.content import Shard, TokenizerInfo
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.scores import save_scores, scores_file
from data_pipeline.shards.writer import ShardWriter

if TYPE_CHECKING:
    from data_pipeline.stream import Document

DOCUMENT = 670  # tokens
LENGTH = 2048  # tokens a sample
BATCH = 8  # samples
SHARDS, SHARD_TOKENS = 100_000, 20_000_000  # shards of the simulated manifest, tokens of each
STEP, GLOBAL_BATCH = 10**6, 512  # sequences a step
ROUNDS = 5


def unchanged(document: "Document") -> np.ndarray:
    """A minimal user-defined document stage."""
    return document.tokens


def write_shards(folder: Path, shards: int, shard_tokens: int, vocab_size: int = 64_000) -> Manifest:
    """A manifest of documents of DOCUMENT random tokens."""
    generator = np.random.default_rng(0)
    replace_file(folder / "tokenizer.json", b"{}")
    digest = sha256_of(folder / "tokenizer.json")
    info = TokenizerInfo(file="tokenizer.json", sha256=digest, vocab_size=vocab_size, bos=1, eos=2, pad=0)
    with ShardWriter(folder, "bench", dtype=np.dtype("uint16"), shard_tokens=shard_tokens) as writer:
        for number in range(shards * (shard_tokens // DOCUMENT)):
            tokens = generator.integers(3, vocab_size, DOCUMENT)
            writer.write(tokens, id=str(number), source="bench", text_bytes=4 * DOCUMENT)
    manifest = Manifest.create(folder, info, writer.shards)
    manifest.save()
    return manifest


def reader(folder: Path) -> dict:
    """Tokens per second of one process for each reader, the best of ROUNDS, because other processes on the machine may
    slow a round. The first round fills the page cache."""
    from data_pipeline.stream import load_document_stage

    manifest = write_shards(folder, shards=4, shard_tokens=5_000_000)
    ways = {
        "batches": lambda: stream_batches(manifest),
        "batches_isolated": lambda: stream_batches(manifest, isolate_documents=True),
        "batches_with_a_document_stage": lambda: stream_batches(
            manifest, document_stages=[load_document_stage("data_pipeline.stream.bench:unchanged")]
        ),
        "webdataset_documents": lambda: webdataset_documents(manifest),
        "datasets_documents": lambda: datasets_documents(manifest),
    }
    if importlib.util.find_spec("datasets") is None:
        del ways["datasets_documents"]
        print("Hugging Face datasets is not installed (pip install datasets): left out", file=sys.stderr)
    best = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for name, read in ways.items():
            began = time.perf_counter()
            tokens = read()
            best[name] = max(best[name], tokens / (time.perf_counter() - began))
    packages = [name for name in ("torch", "webdataset", "datasets") if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"tokens": manifest.totals.tokens, "versions": versions} | {name: round(rate) for name, rate in best.items()}


def stream_batches(manifest: Manifest, **options) -> int:
    """Reads an epoch of batches through the whole pipeline, in this process; returns the number of tokens."""
    from webdataset import DataPipeline

    from data_pipeline.stream import batches, compose, token_stages

    stream = compose(token_stages(manifest, sequence_length=LENGTH, seed=0, **options))
    steps = stream.samples_per_epoch // BATCH
    plan = lambda step: (step * BATCH, BATCH) if step < steps else None  # noqa: E731
    return sum(
        batch.tokens.numel()
        for step in DataPipeline(lambda: stream, batches(plan, micro_batch=BATCH))
        for batch in step
    )


def webdataset_documents(manifest: Manifest) -> int:
    """Reads every document by plain webdataset, in stored order, without shuffling or packing; returns the number of
    tokens."""
    import webdataset

    urls = [str(manifest.directory / shard.name) for shard in manifest.shards]
    documents = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=webdataset.single_node_only)
    return sum(np.frombuffer(document["tokens"], "<u2").size for document in documents)


def datasets_documents(manifest: Manifest) -> int:
    """Reads every document by Hugging Face datasets in streaming mode; returns the number of tokens."""
    from datasets import load_dataset

    urls = [str(manifest.directory / shard.name) for shard in manifest.shards]
    documents = load_dataset("webdataset", data_files={"train": urls}, split="train", streaming=True)
    return sum(np.frombuffer(document["tokens"], "<u2").size for document in documents)


def start(folder: Path, shards: int = SHARDS) -> dict:
    """Seconds to the first batch of one of 64 ranks at step STEP, and the process's peak memory."""
    prepare(folder, shards)
    from data_pipeline.stream import BatchLoader, ScoreFilter, build_stream

    imported = peak_memory_mb()
    began = time.perf_counter()
    manifest = Manifest.load(folder / "manifest.json")
    loaded = time.perf_counter()
    stream = build_stream(
        manifest, sequence_length=LENGTH, seed=0, filter=ScoreFilter(scores="bench", default=(0.1, None))
    )
    built = time.perf_counter()
    plan = lambda step: (step * GLOBAL_BATCH, GLOBAL_BATCH)  # noqa: E731
    with BatchLoader(stream, plan, micro_batch=BATCH, rank=5, size=64, step=STEP) as loader:
        (batch,) = next(iter(loader))
    ended = time.perf_counter()
    if batch.damaged:
        raise RuntimeError(f"the first batch is damaged: {batch.damaged[0].reason}")
    return {
        "shards": len(manifest.shards),
        "tokens": manifest.totals.tokens,
        "seconds": round(ended - began, 2),
        "of_which_manifest": round(loaded - began, 2),
        "of_which_filter_counts_and_order": round(built - loaded, 2),
        "of_which_first_batch": round(ended - built, 2),
        "peak_memory_mb": peak_memory_mb(),
        "of_which_python_and_torch": imported,
    }


def peak_memory_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def prepare(folder: Path, shards: int) -> None:
    """Creates the simulated manifest, its links and its filter's counts, in a separate process, so that its memory and
    time are not measured."""
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=_prepare, args=(folder, shards))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("the simulated manifest could not be made")


def _prepare(folder: Path, count: int) -> None:
    from data_pipeline.stream.score_filter import ScoreFilter, counts_file

    real = write_shards(folder, shards=1, shard_tokens=SHARD_TOKENS).shards[0]
    scores = np.random.default_rng(1).random((real.documents, 2))
    digest = sha256_of(save_scores(folder, real, "bench", scores))
    shards = []
    for number in range(count):
        record = {field: getattr(real, field) for field in real.__dataclass_fields__}
        record |= {"name": f"s{number:06d}.tar", "index": f"s{number:06d}.npy", "sha256": f"{number:064x}"}
        shards.append(shard := Shard(**record))
        os.symlink(real.name, folder / shard.name)
        os.symlink(real.index, folder / shard.index)
        os.symlink(scores_file(real, "bench"), folder / scores_file(shard, "bench"))
    manifest = Manifest.create(folder, Manifest.load(folder / "manifest.json").tokenizer, shards)
    manifest.save()
    filter = ScoreFilter(scores="bench", default=(0.1, None))
    kept = int((scores[:, 0].astype(np.float32) >= np.float32(0.1)).sum())
    rows = list(itertools.repeat([kept, kept * DOCUMENT, DOCUMENT, digest], count))
    record = {"manifest": manifest.content_hash, "filter": filter.filter_hash, "shards": rows}
    replace_file(folder / counts_file(manifest, filter), json.dumps(record).encode())


@command
def main(arguments: list[str]) -> None:
    options = parser("data_pipeline.stream.bench", __doc__)
    options.add_argument("what", choices=["reader", "start"])
    options.add_argument("--folder", type=Path, help="an empty folder for the shards (default: a temporary one)")
    options.add_argument(
        "--shards", type=int, default=SHARDS, help=f"shards of the simulated manifest (default {SHARDS})"
    )
    given = options.parse_args(arguments)
    if given.shards < 1:
        raise InputError(f"--shards={given.shards} must be at least 1")
    if given.folder and given.folder.is_dir() and any(given.folder.iterdir()):
        raise InputError(f"--folder={given.folder} is not empty")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(reader(folder) if given.what == "reader" else start(folder, given.shards)))


if __name__ == "__main__":
    sys.exit(main())
