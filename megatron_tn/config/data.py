"""The settings `data.*`: training data, batch sizes, and filters of documents and batches."""

import dataclasses

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count, Positive
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    manifest: str = ""  # manifest.json of tokenised WebDataset shards, written by python -m data_pipeline.run
    sequence_length: Positive = 2048  # tokens of a sequence
    global_batch: Positive = 64  # sequences per optimizer step, over all ranks
    micro_batch: Positive = 1  # sequences per forward pass of one rank
    shuffle_window: Positive = 32  # shards that sequences are shuffled across; neighbours in a shard are alike
    # Document filter: a YAML file or inline JSON of data_pipeline.stream.ScoreFilter (self-cleaning), or module:object
    # for a user-defined filter; empty: every document is kept.
    filter: str = ""
    # Functions, as module:function, from data_pipeline.stream.Document to Document, applied to each document in this
    # order. They must not change its number of tokens.
    document_stages: list[str] = dataclasses.field(default_factory=list)
    # Mixture of sources: {epochs: {source: repetitions}} or {weights: {source: weight}}; on the command line:
    # +data.mixture.epochs.wiki=1.5. Empty: the epochs of the manifest.
    mixture: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    # Reset the state of attention where a document begins. The paper packs documents into sequences without a reset.
    isolate_documents: bool = False
    workers: Count = 1  # reader processes per data-parallel rank; 0: the training process reads
    max_damaged: Count = 100  # unreadable samples that a rank replaces by padding before it ends the run
    cache_bytes: Count = 100_000_000_000  # most bytes of a node's local copies of remote shards
    # Step numbers whose batches are skipped (no training on them): [17, "100-299"]. Checkpoints store the list.
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
