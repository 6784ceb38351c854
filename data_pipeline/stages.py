"""The pipeline as a list of stages, each a datatrove executor with its completion markers."""

from dataclasses import dataclass, replace
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import Settings
from data_pipeline.dedup import exact, near
from data_pipeline.dedup.lines import CountLines, FindLines, RemoveLines
from data_pipeline.dedup.stayed import NameStayed
from data_pipeline.executors import LocalExecutor, last_error, name_tasks
from data_pipeline.readers import ReadSources
from data_pipeline.report import WriteReport
from data_pipeline.sample import SampleText
from data_pipeline.steps.begin import BeginTask, missing_tasks
from data_pipeline.steps.documents import RecordKept, RemoveFolders, Stored, TaskReader, TaskWriter
from data_pipeline.steps.rules import ApplyRules
from data_pipeline.steps.tally import Tally
from data_pipeline.tokenise import MakeTokenizer, WriteManifests, WriteShards, splits


@dataclass(frozen=True)
class Stage:
    """`steps` run once per task when stage `after` is complete; a task marked complete is not run again."""

    name: str
    steps: list[PipelineStep]
    tasks: int
    folder: Path
    after: "Stage | None" = None

    def all_steps(self) -> list[PipelineStep]:
        before = (self.after.folder, self.after.tasks) if self.after else ()
        return [BeginTask(self.folder, *before), *self.steps]

    def local_executor(self, workers: int) -> LocalExecutor:
        workers = min(workers, self.tasks)
        return LocalExecutor(self.all_steps(), tasks=self.tasks, workers=workers, logging_dir=str(self.folder))

    def completed(self) -> int:
        """Number of tasks marked complete."""
        return self.tasks - len(missing_tasks(self.folder, self.tasks))

    def task_log(self, rank: int) -> Path:
        return self.folder / "logs" / f"task_{rank:05d}.log"

    def failed_tasks(self) -> list[tuple[int, str]]:
        """(task, error) of the incomplete tasks with an error in their log."""
        missing = missing_tasks(self.folder, self.tasks)
        return [(rank, error) for rank in missing if (error := last_error(self.task_log(rank)))]

    def failure(self, job: str | None) -> str:
        """The reason why a SLURM job ended with the stage incomplete."""
        if failed := self.failed_tasks():
            rank, error = failed[0]
            more = f"; {len(failed) - 1} more tasks failed" if len(failed) > 1 else ""
            return f"stage {self.name}, task {rank}: {error}; log: {self.task_log(rank)}{more}"
        missing = missing_tasks(self.folder, self.tasks)
        return (
            f"stage {self.name}: SLURM job {job} is gone and {name_tasks(missing)} not complete: cancelled, out of "
            f"time or memory, or never started; logs: {self.folder / 'slurm_logs'}"
        )


def build_stages(settings: Settings, output: Path, work: Path, inputs: str) -> list[Stage]:
    """All stages in order. `output`: folder of the results; `work`: folder of intermediate files. `inputs`: the
    `inputs_hash` of the sources' files.

    A document stays in its task from reading to shards: duplicates are recorded by (task, index in the task's file).
    Documents are stored once, compressed, after the rules; see `steps/documents.py`.
    """
    drops = output / "drops"
    stages: list[Stage] = []

    def add(name: str, tasks: int, *steps: PipelineStep) -> None:
        folder = work / "stages" / f"{len(stages):02d}_{name}"
        stages.append(Stage(name, list(steps), tasks, folder, stages[-1] if stages else None))

    tallied: list[str] = []
    named: list[NameStayed] = []

    def tally(name: str) -> Tally:
        tallied.append(name)
        return Tally(work / "tally" / name)

    documents, priorities = Stored(work / "ruled"), {name: source.priority for name, source in settings.sources.items()}

    def add_removal(name: str, *steps: PipelineStep) -> None:
        """Adds a stage that removes documents."""
        nonlocal documents
        kept = work / "kept" / name
        add(name, settings.tasks, TaskReader(documents), *steps, tally(name), RecordKept(kept))
        documents = replace(documents, kept=kept)

    add(
        "rules",
        settings.tasks,
        ReadSources(settings.sources, output / "quarantine", inputs),
        tally("read"),
        ApplyRules(
            settings.rules.active(), settings.edits.active(), settings.language, drops / "rules", output / "edits"
        ),
        tally("rules"),
        TaskWriter(documents.written),
        *([exact.signatures(priorities, work)] if settings.exact_duplicates else []),
    )
    if settings.exact_duplicates:
        add("exact_find", 1, exact.find(work))
        add_removal("exact", *exact.remove(work, drops / "exact_duplicates"))
        named.append(NameStayed(work / "exact" / "stayed", drops / "exact_duplicates"))
    if options := settings.line_duplicates:
        counts, often, cuts = (work / "lines" / name for name in ("counts", "often", "cuts"))
        # CountLines also passes the documents on, unused here.
        add("line_counts", settings.tasks, TaskReader(documents), CountLines(options, counts))
        add("line_find", settings.tasks, FindLines(options, counts, often))
        add_removal("lines", RemoveLines(options, often, cuts, drops / "line_duplicates", output / "edits"))
        documents = replace(documents, cuts=cuts)
    if options := settings.near_duplicates:
        noted = near.note_priorities(priorities, work)
        add("near_signatures", settings.tasks, TaskReader(documents), noted, near.signatures(options, work))
        add("near_pairs", options.buckets, near.buckets(options, work))
        add("near_clusters", 1, near.cluster(work))
        add_removal("near", *near.remove(options, work, drops / "near_duplicates"))
        named.append(NameStayed(work / "near" / "stayed", drops / "near_duplicates"))
    tokens, heldout, records, sampled = settings.tokenizer, settings.heldout_fraction, work / "records", work / "sample"
    sample = None
    if not tokens.file:
        sample = SampleText(tokens, settings.sources, work / "tally" / tallied[-1], heldout, sampled)
        add("tokenizer_sample", settings.tasks, TaskReader(documents), sample, RecordKept(sampled))
    add("tokenizer", 1, MakeTokenizer(tokens, replace(documents, kept=sampled), output / "tokenizer.json"))
    write = WriteShards(tokens, heldout, settings.sources, settings.shard_tokens, output, records)
    add("shards", settings.tasks, TaskReader(documents), write)
    add("manifests", 1, WriteManifests(tokens, heldout, settings.sources, output, records, sample))
    done_with = [work / name for name in ("ruled", "kept", "exact", "lines", "near", "sample")]
    add("report", 1, *named, WriteReport(output, work, splits(heldout)), RemoveFolders(done_with))
    return stages
