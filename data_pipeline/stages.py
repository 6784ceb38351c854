"""The pipeline as a list of stages, each a datatrove executor with its completion markers."""

from dataclasses import dataclass
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import Settings
from data_pipeline.dedup import exact, near
from data_pipeline.dedup.lines import CountLines, FindLines, RemoveLines
from data_pipeline.readers import ReadSources
from data_pipeline.steps import ApplyRules, HoldTask, Tally, TaskReader, TaskWriter
from data_pipeline.tokenise import MakeTokenizer, WriteManifests, WriteShards


@dataclass(frozen=True)
class Stage:
    """`steps` run once for each of `tasks`; a task marked complete is not run again."""

    name: str
    steps: list[PipelineStep]
    tasks: int
    folder: Path

    def executor(self, workers: int) -> LocalPipelineExecutor:
        return LocalPipelineExecutor(
            [HoldTask(self.folder / "locks"), *self.steps],
            tasks=self.tasks,
            workers=min(workers, self.tasks),
            logging_dir=str(self.folder),
            # Workers inherit the modules: a second less a stage. Nothing here holds threads of its own or a GPU.
            start_method="fork",
        )

    def completed(self) -> int:
        """How many tasks are marked complete."""
        return len(list((self.folder / "completions").glob("*")))


def build_stages(settings: Settings, output: Path, work: Path) -> list[Stage]:
    """All stages in order. `output` receives what users see, `work` what stages hand each other.

    A document keeps its task from reading to shards: duplicates are recorded by (task, place in the task's file).
    """
    drops = output / "drops"
    stages: list[Stage] = []

    def add(name: str, tasks: int, *steps: PipelineStep) -> None:
        stages.append(Stage(name, list(steps), tasks, work / "stages" / f"{len(stages):02d}_{name}"))

    def tally(name: str) -> Tally:
        return Tally(work / "tally" / name)

    documents, priorities = work / "ruled", {name: source.priority for name, source in settings.sources.items()}
    add(
        "rules",
        settings.tasks,
        ReadSources(settings.sources, output / "quarantine"),
        tally("read"),
        ApplyRules(
            settings.rules.active(), settings.edits.active(), settings.language, drops / "rules", output / "edits"
        ),
        tally("rules"),
        TaskWriter(documents),
        *([exact.signatures(priorities, work)] if settings.exact_duplicates else []),
    )
    if settings.exact_duplicates:
        add("exact_find", 1, exact.find(work))
        removal = exact.remove(work, drops / "exact_duplicates")
        add("exact", settings.tasks, TaskReader(documents), removal, tally("exact"), TaskWriter(work / "unique"))
        documents = work / "unique"
    if options := settings.line_duplicates:
        counts, often = work / "lines" / "counts", work / "lines" / "often"
        # The step that counts passes documents on; nobody takes them.
        add("line_counts", settings.tasks, TaskReader(documents), CountLines(options, counts))
        add("line_find", settings.tasks, FindLines(options, counts, often))
        removal = RemoveLines(options, often, drops / "line_duplicates", output / "edits")
        add("lines", settings.tasks, TaskReader(documents), removal, tally("lines"), TaskWriter(work / "lined"))
        documents = work / "lined"
    if options := settings.near_duplicates:
        noted = near.note_priorities(priorities, work)
        add("near_signatures", settings.tasks, TaskReader(documents), noted, near.signatures(options, work))
        add("near_pairs", options.buckets, near.buckets(options, work))
        add("near_clusters", 1, near.cluster(work))
        removal = near.remove(options, work, drops / "near_duplicates")
        add("near", settings.tasks, TaskReader(documents), removal, tally("near"), TaskWriter(work / "clean"))
        documents = work / "clean"
    made = MakeTokenizer(settings.tokenizer, settings.heldout_fraction, documents, output / "tokenizer.json")
    add("tokenizer", 1, made)
    split, records = (settings.tokenizer, settings.heldout_fraction), work / "records"
    add("shards", settings.tasks, TaskReader(documents), WriteShards(*split, settings.shard_tokens, output, records))
    add("manifests", 1, WriteManifests(*split, settings.sources, output, records))
    return stages
