"""One page of a run: goodput, curves, starts, memory against plan, generated texts, failures and settings.

python -m launch.report runs/7b                        writes runs/7b/report.html
python -m launch.report runs/7b output=7b.html

The page is one file without scripts, and opens without a network. It is made from the run's folder alone, also while
the run goes on.
"""

import json
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.html_page import document, short, table, tiles
from launch import curves, requeue
from launch.chart import COLOURS, STYLE
from megatron_tn.cli import of_words
from megatron_tn.config import ConfigError, TrainConfig, replacing, shown, to_mapping, unwritable
from megatron_tn.planning.estimate import GIB, OUTSIDE, plan_memory
from megatron_tn.plot import journals_are_read, paths_and_output, runs_in
from megatron_tn.training.compare import flat
from megatron_tn.training.goodput import CAUSES, Goodput, goodput_of
from megatron_tn.training.hooks.figures import TEXTS
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.submission import Submission
from megatron_tn.training.summary import figures_of

TRACEBACK_LINES = 40
OLDER_TEXTS = 20  # evaluations whose generated texts the page has, the newest first


@of_words
def main(words: list[str]) -> None:
    folders, named = paths_and_output(words)
    found = [path for folder in folders for path in runs_in(folder)]
    if len(found) != 1:
        names = " ".join(map(str, folders))
        raise ConfigError(f"{names}: {len(found)} runs; a report is of one, launch.compare takes several")
    output = Path(named) if named else found[0] / "report.html"
    if problems := unwritable("output", str(output)):
        raise ConfigError(problems)
    with journals_are_read(found):
        page = page_of(RunFolder(found[0]))
    with replacing(output) as file:
        file.write(page)
    print(shown(f"wrote {output}"))


def page_of(run: RunFolder) -> str:
    """The HTML page."""
    records, goodput, unreadable = run.records(), goodput_of(run), ""
    try:
        config = run.frozen_config()
    except ConfigError as error:
        config, unreadable = None, str(error)
    planned, memory = _memory(config, records)
    parts = [
        _head(run, config),
        tiles(_figures(run, config, records, goodput)),
        *_goodput(goodput),
        *curves.of_run(run, records, planned),
        *_starts(records, run.superseded()),
        *_submissions(run),
        *memory,
        *_texts(records),
        *_failures(run),
        *_settings(config, unreadable),
        f"<p><small>{_utc(time.time())}, from {escape(str(run.path.absolute()))}</small></p>",
    ]
    return document(run.path.absolute().name, parts, STYLE)


def _head(run: RunFolder, config: TrainConfig | None) -> str:
    status = run.status()
    words = [escape(config.model.name)] if config else []
    words.append(f"<b>{escape(str(status.get('state', 'no status.json')))}</b> at step {status.get('step', 0)}")
    if "time" in status:
        words.append(f"last written {_utc(status['time'])}")
    error = f"<p class=wrong>{escape(str(status['error']))}</p>" if status.get("error") else ""
    return f"<p>{' · '.join(words)}</p>{error}"


def _figures(
    run: RunFolder, config: TrainConfig | None, records: list[dict[str, Any]], goodput: Goodput | None
) -> Iterator[tuple[str, str]]:
    found = figures_of(run)
    last = next((record for record in reversed(records) if "loss" in record), {})
    if "step" in found:
        yield f"{found['step']:,}", f"of {config.last_step:,} steps" if config else "steps"
        yield short(found["tokens"]).strip(), "tokens"
        yield f"{found['loss']:.3f}", "loss, nats a token, mean of the last tenth"
    if "heldout_loss" in found:
        yield f"{found['heldout_loss']:.3f}", "held-out loss"
    if "heldout_bits_per_byte" in found:
        yield f"{found['heldout_bits_per_byte']:.3f}", "held-out bits a byte"
    if "tokens_per_second" in found:
        yield short(found["tokens_per_second"]).strip(), f"tokens/s, median; {_processes(last.get('world_size', 1))}"
    for key, of in (("utilisation", "datasheet's"), ("utilisation_sampled", "measured matrix")):
        if values := [record[key] for record in records if record.get(key)]:
            yield f"{np.median(values):.1%}", f"of the {of} rate, median"
    if goodput:
        yield f"{goodput.share:.1%}", f"goodput, over {goodput.starts} start{'s' * (goodput.starts > 1)}"
    if last.get("steps_without_update"):
        yield f"{last['steps_without_update']:,}", "steps without an update"


def _goodput(found: Goodput | None) -> Iterator[str]:
    """Where the wall time went, as a bar and a table."""
    if found is None or not found.wall_s:
        return
    parts = [("useful steps", found.useful_s)]
    parts += sorted(((CAUSES[cause], seconds) for cause, seconds in found.lost_s.items()), key=lambda part: -part[1])
    parts = [(name, seconds) for name, seconds in parts if seconds > 0]
    shapes, left, rows = [], 0.0, []
    for number, (name, seconds) in enumerate(parts):
        width = 1000 * seconds / found.wall_s
        told = f"<title>{escape(name)} {seconds:,.0f} s</title>"
        shapes.append(f'<rect class="s{number % COLOURS}" x="{left:.2f}" width="{width:.2f}" height="24">{told}</rect>')
        left += width
        rows.append((name, seconds, f"{seconds / found.wall_s:.2%}"))
    yield f"<h2>Goodput</h2><p>Of {found.wall_s:,.0f} s from the first start to the last record.</p>"
    label = f"goodput {found.share:.1%}"
    yield f'<svg class=bar viewBox="0 0 1000 24" preserveAspectRatio="none" role="img" aria-label="{label}">'
    yield f"{''.join(shapes)}</svg>"
    yield table(("what the time went into", "seconds", "share"), rows)


def _starts(kept: list[dict[str, Any]], superseded: list[dict[str, Any]]) -> Iterator[str]:
    """Every start with its end; and every rewind."""
    rows: list[dict[str, Any]] = []
    both = sorted((one for one in [*kept, *superseded] if "time" in one), key=lambda one: one["time"])
    for record in both:
        if "start/began" in record:
            rows.append({"began": record["start/began"], "from": record["step"], "end": "without a word"})
        if rows:
            rows[-1] |= {"to": record["step"], "last": record["time"]}
            said = [record[key] for key in ("stop/state", "stop/error") if key in record]
            rows[-1]["end"] = ": ".join(said) or rows[-1]["end"]
    if rows:
        yield "<h2>Starts</h2><p>A start without a word at its end was killed, or goes on.</p>"
        yield table(
            ("start", "process began", "from step", "to step", "last record", "ended"),
            (
                (number, _utc(row["began"]), row["from"], row["to"], _utc(row["last"]), row["end"])
                for number, row in enumerate(rows, 1)
            ),
        )
    if rewinds := [mark for mark in curves.marks_of(kept) if mark["kind"] == "rewind"]:
        yield "<h2>Rewinds</h2>"
        yield table(("to step", "what"), ((mark["step"], mark["text"]) for mark in rewinds))


def _memory(config: TrainConfig | None, records: list[dict[str, Any]]) -> tuple[float | None, list[str]]:
    """(GiB that the plan has for the allocator, a section: the plan by kind, and the highest peaks measured)."""
    worlds = [record["world_size"] for record in records if "world_size" in record]
    if config is None or not worlds:
        return None, []
    title = "<h2>Memory of a GPU</h2>"
    try:
        plan = plan_memory(config, worlds[-1])
    except Exception as error:  # a plan of settings that another version of this project trained with
        return None, [title, f"<p>No plan of these settings: {escape(f'{type(error).__name__}: {error}')}</p>"]
    planned = plan.reserved / GIB
    reserved, allocated = (
        max((record[key] for record in records if key in record), default=None)
        for key in ("memory/reserved_gib", "memory/allocated_gib")
    )
    rows = [(kind, round(size / GIB, 3), None, "") for kind, size in plan.kinds.items() if kind != OUTSIDE]
    rows.append(
        ("reserved by the allocator", round(planned, 3), reserved, f"{reserved / planned - 1:+.1%}" if reserved else "")
    )
    rows += [("of it allocated", None, allocated, "")] if allocated else []
    rows.append((OUTSIDE, plan.kinds[OUTSIDE] / GIB, None, ""))
    measured = "The highest peak of all ranks" if reserved else "Nothing was measured (no GPU, or no record yet)"
    return planned, [
        title,
        f"<p>Planned for {_processes(worlds[-1])}. {measured}.</p>",
        table(("GiB", "planned", "measured", "measured against plan"), rows),
    ]


def _texts(records: list[dict[str, Any]]) -> Iterator[str]:
    found = [record for record in records if record.get(TEXTS)][: -OLDER_TEXTS - 1 : -1]
    for number, record in enumerate(found):
        if not number:
            yield "<h2>Generated texts</h2><p>Prompts in bold.</p>"
        body = "".join(
            f"<pre><b>{escape(str(text['prompt']))}</b>{escape(str(text['text']))}</pre>" for text in record[TEXTS]
        )
        yield f"<details{' open' * (not number)}><summary>step {record['step']:,}</summary>{body}</details>"


def _submissions(run: RunFolder) -> Iterator[str]:
    """What launch.submit and the job's requeues have noted."""
    submissions = [(submission.name, submission.read()) for submission in Submission.all_of(run)]
    if submissions:
        yield "<h2>Submissions</h2>"
        rows = ((name, " ".join(made.get("jobs", [])), made.get("revision", "")) for name, made in submissions)
        yield table(("submission", "SLURM jobs", "revision of the code"), rows)
    if requeues := requeue.records(str(run.path)):
        yield "<h2>Requeues</h2>"
        yield table(
            ("job", "restart", "exit code", "cause", "at step", ""),
            (
                (*(each.get(key, "") for key in ("job", "restart", "code", "cause", "step")), "gave up" * gave_up)
                for each in requeues
                for gave_up in ["gave-up" in each]
            ),
        )


def _failures(run: RunFolder) -> Iterator[str]:
    files = [run.hang, *sorted(run.tracebacks.glob("rank_*.txt"))]
    found = [(file.name, file.read_text(errors="replace").splitlines()) for file in files if file.is_file()]
    if found:
        yield "<h2>Failures</h2><p>Files that the last failure of each kind left, their last lines.</p>"
    for name, lines in found:
        title = f"{name}: {lines[-1] if lines else ''}"
        text = escape("\n".join(lines[-TRACEBACK_LINES:]))
        yield f"<details><summary>{escape(title)}</summary><pre>{text}</pre></details>"


def _settings(config: TrainConfig | None, unreadable: str) -> Iterator[str]:
    yield "<h2>Settings</h2>"
    if config is None:
        yield f"<p class=wrong>{escape(unreadable)}</p>"
        return
    values, default = flat(to_mapping(config)), flat(to_mapping(TrainConfig()))
    rows = [(name, _shown(value)) for name, value in values.items()]
    changed = [(name, text, _shown(default.get(name))) for name, text in rows if text != _shown(default.get(name))]
    yield table(("setting", "value", "default"), changed)
    yield f"<details><summary>all {len(rows)} settings</summary>{table(('setting', 'value'), rows)}</details>"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _processes(count: int) -> str:
    return f"{count:,} process{'es' * (count != 1)}"


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


if __name__ == "__main__":
    main()
