"""The ablation's corpora: real text, held-out text, raw text (real text plus noise), cleaned raw text of equal size.

Real and held-out text are gathered, deduplicated (exact and near), and tokenised by a tokenizer trained on the real
text. Neither noise nor cleaning is applied to held-out documents, so that they favour no corpus.
"""

import dataclasses
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.ablation.gather import gather
from data_pipeline.ablation.settings import AblationSettings
from data_pipeline.canaries import is_host
from data_pipeline.canary_texts import NOISE
from data_pipeline.config import compose, keep_settings
from data_pipeline.document import text_hash
from data_pipeline.errors import InputError
from data_pipeline.files import once, replace_file, replacing
from data_pipeline.run import run
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import StoredDocument, read_documents
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.tokenizer import load

PARTS = 16  # files of JSON lines, one per task of the pipeline
REAL, NEAR_DUPLICATE = "real", "near_duplicate"


def make_corpora(settings: AblationSettings) -> dict:
    """Makes the missing corpora below `settings.output` and returns the content of corpora.json. Raises InputError and
    StageError."""
    output = Path(settings.output)
    decisive = {key: value for key, value in dataclasses.asdict(settings).items() if key not in ("output", "workers")}
    keep_settings(settings.output, decisive, "corpora")
    result = output / "corpora.json"
    if result.exists():
        return json.loads(result.read_bytes())

    print("gathering text of the installed packages", flush=True)
    packages = once(output / "packages.json", lambda: _gather(settings, output))
    common = [f"tasks={PARTS}", f"workers={settings.workers}"]
    print("real text: duplicates go, a tokenizer is trained, a part is held out", flush=True)
    words = ["pipeline=raw", f"input={output}/gathered", f"output={output}/real", "exact_duplicates=true"]
    words += ["near_duplicates={words: 5}", f"heldout_fraction={settings.heldout_fraction}"]
    run(compose([*words, f"tokenizer.vocab_size={settings.vocab_size}", *common]))
    real = Manifest.load(str(output / "real/train/manifest.json"))
    print("planting noise", flush=True)
    planted = once(output / "planted.json", lambda: plant(real, settings, output / "planted"))
    common += [f"input={output}/planted", "heldout_fraction=0", f"tokenizer.file={output}/real/tokenizer.json"]
    whole = {}
    for name, pipeline in (("raw", "raw"), ("cleaned", "mixed")):
        print(f"{name}: pipeline={pipeline}", flush=True)
        run(compose([f"pipeline={pipeline}", f"output={output}/pipelines/{name}", *common]))
        whole[name] = Manifest.load(f"{output}/pipelines/{name}/train/manifest.json")

    tokens = min(manifest.totals.tokens for manifest in whole.values())
    figures = {}
    for name, manifest in whole.items():
        print(f"{name}: cut to {tokens} tokens", flush=True)
        cut(manifest, tokens, settings.seed, output / name)
        figures[name] = describe(output / name, manifest, planted)
    shutil.copytree(output / "real/heldout", output / "heldout", dirs_exist_ok=True)
    heldout = Manifest.load(str(output / "heldout/manifest.json"))
    summary = {
        "settings": decisive,
        "tokens": tokens,
        "vocab_size": heldout.tokenizer.vocab_size,
        "planted": planted,
        "corpora": figures,
        "heldout": dataclasses.asdict(heldout.totals),
        "packages": packages,
    }
    replace_file(result, json.dumps(summary, indent=1).encode() + b"\n")
    return summary


def _gather(settings: AblationSettings, output: Path) -> dict:
    limits = {"documentation": settings.documentation_bytes, "source": settings.source_bytes}
    return gather(output / "gathered", limits, settings.packages, PARTS)


def plant(real: Manifest, settings: AblationSettings, folder: Path) -> dict:
    """Writes the real documents and the noise made from them to `folder`/NN.jsonl, in the order of their hashes.
    Returns {kind: {documents, bytes}}, including kind REAL. Raises InputError when no document is suitable for noise.
    """
    decode = load(real.directory / real.tokenizer.file).decode
    texts, hosts, size = [], [], 0
    for document in read_documents(real):
        text = decode(document.tokens[1:-1].tolist())
        texts.append((identity := f"{REAL}/{document.metadata['key']}", text))
        size += document.metadata["bytes"]
        if is_host(text):
            hosts.append((identity, text))
    if not hosts:
        raise InputError(
            f"noise={settings.noise}: no real document is prose that is long enough to make noise from; raise "
            "documentation_bytes, or name packages with documentation"
        )
    counts = {REAL: {"documents": len(texts), "bytes": size}}
    generator = random.Random(settings.seed)
    generator.shuffle(hosts)
    share = size * settings.noise / (1 - settings.noise) / len(NOISE)  # bytes of each kind
    for kind, make in NOISE.items():
        count, made = 0, 0
        while made < share:
            host, original = hosts[count % len(hosts)]
            text = make(original, generator)
            texts.append((f"{kind}/{count}/{host}", text))
            count, made = count + 1, made + len(text.encode())
        counts[kind] = {"documents": count, "bytes": made}
    texts.sort(key=lambda entry: text_hash(entry[0]))
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(PARTS):
        with replacing(folder / f"{number:02d}.jsonl") as file:
            for identity, text in texts[number::PARTS]:
                file.write(json.dumps({"id": identity, "text": text}).encode() + b"\n")
    return counts


def cut(manifest: Manifest, tokens: int, seed: int, folder: Path) -> None:
    """Writes a random sample of a manifest's documents, as many as fit into `tokens`, as a new corpus."""
    if (folder / "manifest.json").exists():
        return
    documents = list(read_documents(manifest))
    left, chosen = tokens, []
    for place in np.random.default_rng(seed).permutation(len(documents)):
        if (size := len(documents[place].tokens)) > left:
            break
        left -= size
        chosen.append(documents[place])
    shard_tokens = max(tokens // 8, 1)
    with ShardWriter(folder, "part", dtype=manifest.dtype, shard_tokens=shard_tokens) as writer:
        for document in chosen:
            record = document.metadata
            writer.write(
                document.tokens,
                id=record["id"],
                source=record["source"],
                text_bytes=record["bytes"],
                language=record["language"],
                key=record["key"],
            )
    info = manifest.tokenizer
    shutil.copyfile(manifest.directory / info.file, folder / info.file)
    Manifest.create(folder, info, writer.shards, manifest.content.sources).save()


def describe(folder: Path, whole: Manifest, planted: dict) -> dict:
    """Statistics of a corpus after the cut, its share of noise in tokens, and per planted kind, the share of documents
    that cleaning had dropped before the cut."""
    corpus = Manifest.load(str(folder / "manifest.json"))
    tokens, left = Counter(), Counter()
    for kind, size in _kinds(list(read_documents(corpus))):
        tokens[kind] += size
    for kind, _ in _kinds(list(read_documents(whole))):
        left[kind] += 1
    return {
        **dataclasses.asdict(corpus.totals),
        "noise": 1 - tokens[REAL] / corpus.totals.tokens,
        "taken": {kind: max(1 - left[kind] / count["documents"], 0.0) for kind, count in planted.items()},
    }


def _kinds(documents: list[StoredDocument]) -> Iterator[tuple[str, int]]:
    """(Kind, tokens) of each document; the kind is REAL or that of its noise. A near duplicate whose original was
    dropped counts as REAL, because cleaning may drop either of the two."""
    there = {document.metadata["key"] for document in documents}
    for document in documents:
        kind, _, rest = document.metadata["key"].partition("/")
        host = rest.partition("/")[2]
        yield REAL if kind == NEAR_DUPLICATE and host not in there else kind, len(document.tokens)
