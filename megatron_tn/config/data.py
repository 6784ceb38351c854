"""The settings `data.*`: training data, batch sizes, and filters of documents and batches."""

from __future__ import annotations

import dataclasses

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count, Positive
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    manifest: str = ""  # manifest.json of tokenised WebDataset shards, as python -m data_pipeline.run writes it
    sequence_length: Positive = 2048  # tokens
    global_batch: Positive = 64  # sequences an optimizer step, over all ranks
    micro_batch: Positive = 1  # sequences a forward pass of one rank
    shuffle_window: Positive = 32  # shards over which sequences are shuffled; neighbours in one shard are alike
    # Self-cleaning: a YAML file or inline JSON of data_pipeline.stream.ScoreFilter, or a filter of one's own as
    # module:object; empty keeps every document.
    filter: str = ""
    # Functions of data_pipeline.stream.Document, as module:function, applied to each document. They keep its length.
    document_stages: list[str] = dataclasses.field(default_factory=list)
    # Sources by {epochs: {...}} or {weights: {...}}; on the command line: +data.mixture.epochs.wiki=1.5
    mixture: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    # Reset attention's state where a document begins. The paper packs documents without a reset.
    isolate_documents: bool = False
    workers: Count = 1  # reader processes a data-parallel rank; 0 reads in the training process
    max_damaged: Count = 100  # unreadable samples that a rank replaces by padding before it stops
    cache_bytes: Count = 100_000_000_000  # of each node's local copies of a remote manifest's shards
    # Batches that are not trained on, each by the number of its step: [17, "100-299"]. Checkpoints keep the list.
    skip_batches: list[int | str] = dataclasses.field(default_factory=list)

    @property
    def skip_ranges(self) -> list[tuple[int, int]]:
        """(first, last) step number of each entry of skip_batches, both included.

        Raises:
            ValueError: an entry is neither a step number from 1 nor a range "first-last".
        """
        found = []
        for entry in self.skip_batches:
            first, dash, last = str(entry).partition("-")
            if not (first.isdecimal() and (last.isdecimal() or not dash) and 1 <= int(first) <= int(last or first)):
                raise ValueError(f"data.skip_batches: {entry!r} is neither a step from 1 nor a range such as '100-299'")
            found.append((int(first), int(last or first)))
        return found

    @property
    def skipped(self) -> set[int]:
        """All step numbers in skip_batches. Raises ValueError like `skip_ranges`."""
        return {batch for first, last in self.skip_ranges for batch in range(first, last + 1)}
