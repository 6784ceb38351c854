"""The settings `data.*`: training data, batch sizes, and filters of documents and batches."""

import dataclasses

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count, Positive
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    # manifest.json of tokenised WebDataset shards, written by python -m data_pipeline.run; has to be set.
    manifest: str = ""
    sequence_length: Positive = 2048  # tokens of a training sequence
    global_batch: Positive = 64  # sequences of an optimizer step, summed over all ranks and microbatches
    micro_batch: Positive = 1  # sequences of one forward pass on one data-parallel rank
    # Number of consecutive shards across which sequences are shuffled; neighbours within a shard are alike.
    shuffle_window: Positive = 32
    # Document filter: a YAML file or inline JSON of data_pipeline.stream.ScoreFilter (self-cleaning), or module:object
    # of a user-defined filter; empty: every document is kept.
    filter: str = ""
    # Functions, each module:function, that map a data_pipeline.stream.Document to a Document with as many tokens;
    # applied to each document in this order. []: none.
    document_stages: list[str] = dataclasses.field(default_factory=list)
    # Share of each source: {epochs: {source: repetitions}} or {weights: {source: weight}}; on the command line
    # +data.mixture.epochs.wiki=1.5. {}: the epochs that the manifest records.
    mixture: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    # true: reset the attention state where a document begins. false: the state runs on across the documents of a
    # sequence, as in the paper.
    isolate_documents: bool = False
    workers: Count = 1  # reader processes of each data-parallel rank; 0: the training process reads
    max_damaged: Count = 100  # unreadable samples that a rank replaces by padding; one more ends the run
    # Bytes on a node's disk that copies of remote shards may take; unused with shards on local disks.
    cache_bytes: Count = 100_000_000_000
    # Numbers or ranges of steps whose batches are not trained on, such as [17, "100-299"]; checkpoints store the list.
    # []: none.
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
