"""Train and evaluate the runs of a plan, each on one GPU, and write a row of figures for each.

    python -m data_pipeline.corpus.join PARTS data/results          (parts that python -m data_pipeline.corpus made)
    python -m launch.results --plan launch/plans/results_50m.yaml --data data/results --output rows.jsonl --pieces rates

A plan (launch/plans/) lists runs as grids of settings, in pieces. Each run is trained (megatron_tn.train), evaluated on
the held-out text (megatron_tn.evaluate; a plan may add evaluations), and a row is appended to --output; runs that have
a row there are not run again, and a stopped one goes on from its checkpoint in --runs/PLAN. With `held_out: curve` in
the plan, the last evaluation of the training is the row's figure instead. A grid with settings benchmark.* is measured
(megatron_tn.benchmark), one run at a time: the speed of runs side by side says nothing. Consecutive pieces share the
GPUs, but a piece with "best of" begins when all runs before it have their rows, and pieces after a measured one begin
when it has its rows. With --minutes a run does not begin if one like it took longer than the minutes that are left,
unless it took longer than all of --minutes; the pieces that wait for its row then do not begin either. SIGTERM and
Ctrl-C end it as --minutes does. When a run fails, the others go on, but for later pieces with "best of"; named by
--pieces, these take the best of the rows that there are.

Words after -- are overrides of every run. A run that has a checkpoint goes on only with the settings that it was begun
with: where the plan, these words or --documents give it others, that is said and no run begins. A run that has a row is
done, whatever words the row was made with: its key "command" has them. Exit code 1 when a run failed; 2 for bad input;
3 when --minutes or a signal ended it before all runs had their rows.
"""

import argparse
import contextlib
import itertools
import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from kernels.bench import rows
from launch.results.planned_run import LOOP, Run, runs_per_gpu
from launch.results.run_plan import BEST, ELSEWHERE, RESULT, SPLITS, Bad, Row, grid_runs, read_plan
from launch.results.runs import Failed, Programs, TimeUp
from launch.rows import EVERY, KINDS
from megatron_tn.config import unwritable
from megatron_tn.training.run_folder import RunFolder

FAILED, TIME_UP = 1, 3
OF_ROWS = {RESULT: ("plan", "run", "model", "lr", "value"), LOOP: ("command",)}  # name of a row -> keys that it needs
FORMS = EVERY | KINDS[RESULT]
REPORT_S = 20.0  # between two lines on the runs under way


def read_rows(path: Path) -> list[Row]:
    """Raises Bad for a line that is no row, as where a kill cut one off."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            found.append(json.loads(line))
            for key in OF_ROWS.get(found[-1]["name"], ()):
                if (value := found[-1].get(key)) is None:
                    raise ValueError(f"{key} is missing")
                if why := FORMS[key].problem(value):
                    raise ValueError(f"{key}={value!r:.50} {why}")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise Bad(f"--output {path}: line {number} is no row ({error}): remove it") from None
    return found


def check_best(together: list[list[str]], plan: dict, options: argparse.Namespace) -> None:
    """Raises Bad for a "best of" runs that neither have rows nor are among the pieces before."""
    there = {(row.get("model"), row.get("variant", "")) for row in read_rows(options.output) if row["name"] == RESULT}
    for pieces in together:
        grids = [grid for piece in pieces for grid in plan["pieces"][piece]]
        chosen = [dict(zip(grid, own, strict=True)) for grid in grids for own in itertools.product(*grid.values())]
        for key, value in itertools.chain.from_iterable(own.items() for own in chosen):
            asked = BEST.fullmatch(str(value))
            if asked and not there & {(asked[1], asked[2] or ""), (None, asked[2] or "")}:
                raise Bad(f"{key}={value}: no run of {value.removeprefix('best of ')} has a row yet, or comes before")
        runs = [Run(options.plan.stem, plan["settings"], own, options.runs, {}) for own in chosen]
        there |= {((run.shared | run.own).get("model"), run.variant) for run in runs}  # None: an experiment says it


def stages(pieces: list[str], plan: dict) -> list[list[str]]:
    """The pieces in their order, consecutive ones together where their runs may share the GPUs: none reads a row of
    another ("best of"), and none but the last is measured (benchmark.*)."""
    found: list[list[str]] = []
    closed = True
    for piece in pieces:
        grids = plan["pieces"][piece]
        if closed or reads_rows(grids):
            found.append([])
        found[-1].append(piece)
        closed = any(key.startswith("benchmark.") for grid in grids for key in grid)
    return found


def run_grids(
    grids: list[dict], plan: dict, options: argparse.Namespace, programs: Programs
) -> tuple[list[Run], list[Run]]:
    """Runs what has no row yet; returns the runs for which there was no time, and those that failed. Raises Bad."""
    known = read_rows(options.output)
    chosen = [own for grid in grids for own in grid_runs(grid, known)]
    runs = [Run(options.plan.stem, plan["settings"], own, options.runs, plan["evaluations"]) for own in chosen]
    once = {run.name: run for run in runs}.values()  # the best rate may be one that a grid lists, too
    left = [run for run in once if not run.has_row(known, options.overrides)]
    if changed := list(filter(None, (run.changed(options) for run in left))):
        raise Bad(changed[0] + (f" (and {len(changed) - 1} runs more)" if len(changed) > 1 else ""))
    failed: list[Run] = []
    with contextlib.suppress(TimeUp):
        train([run for run in left if not run.is_benchmark], known, failed, options, programs)
        for run in left:
            if run.is_benchmark:
                say(f"{run.name}: measured")
                with noted(run, failed):
                    run.measure(programs, options)
    known = read_rows(options.output)
    return [run for run in left if run not in failed and not run.has_row(known, options.overrides)], failed


@contextlib.contextmanager
def noted(run: Run, failed: list[Run]) -> Iterator[None]:
    """Says why a run failed, and appends it to `failed`."""
    try:
        yield
    except Failed as why:
        failed.append(run)
        say(f"{run.name}: failed: {why}")


def reads_rows(grids: list[dict]) -> bool:
    """Whether grids read rows of other runs ("best of")."""
    return any(BEST.fullmatch(str(value)) for grid in grids for values in grid.values() for value in values)


def train(
    runs: list[Run], known: list[Row], failed: list[Run], options: argparse.Namespace, programs: Programs
) -> None:
    """Finishes the runs, options.at_once at a time, with a line on each of them now and then; appends their rows to the
    output and to `known`, and those that fail to `failed`. A run that does not end in the time left, but would in a
    call of its own, does not begin. Raises TimeUp."""
    writing, under_way = threading.Lock(), {}
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for _, gpu in zip(range(options.at_once), itertools.cycle(options.gpus or [None])):
        free.put(gpu)

    def task(run: Run) -> None:
        needed, left = run.seconds_left(known, runs_per_gpu(options)), programs.left()
        if left == 0:
            raise TimeUp
        if None not in (needed, left) and left < needed <= 60 * options.minutes:  # longer ones need several calls
            say(f"{run.name}: does not begin: about {needed:.0f} s, and {left:.0f} s are left")
            return
        under_way[run.name] = run
        say(f"{run.name}: begins")
        gpu = free.get_nowait()
        with noted(run, failed):
            try:
                row = run.finish(programs, options, gpu)
            finally:
                del under_way[run.name]
                free.put(gpu)
            with writing:
                rows.append(options.output, [row])
                known.append(row)
            say(f"{run.name}: {row['value']:.4f} bits per byte, {row['tokens_per_second']:,.0f} tokens/s")

    ended = threading.Event()

    def report() -> None:
        while not ended.wait(REPORT_S):
            for run in list(under_way.values()):
                if records := run.folder.records("loss"):
                    step, loss = (records[-1][key] for key in ("step", "loss"))
                    say(f"  {run.name}: step {step}, loss {'not finite' if loss is None else f'{loss:.3f}'}")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        programs.side_by_side([lambda run=run: task(run) for run in runs], options.at_once)
    finally:
        ended.set()
        reporter.join()


@contextlib.contextmanager
def alone(options: argparse.Namespace) -> Iterator[None]:
    """Locks the plan's folder in --runs: two calls would write two rows of a run. Raises Bad."""
    folder = RunFolder(options.runs / options.plan.stem)
    try:
        holder = folder.claim()
    except OSError as error:
        raise Bad(f"--runs {options.runs}: {folder.path} cannot be written: {error.strerror}") from None
    if holder:
        raise Bad(
            f"--runs {options.runs}: another call {holder.removeprefix('rank 0 ')} runs {options.plan.stem} there"
        )
    try:
        yield
    finally:
        folder.release()


@contextlib.contextmanager
def told_to_stop(programs: Programs) -> Iterator[None]:
    """SIGTERM and Ctrl-C stop the programs. A signal that is ignored, as Ctrl-C in the background, stays so."""
    signals = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: programs.stop()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, required=True, help="a YAML file such as launch/plans/results_50m.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder that data_pipeline.corpus.join wrote")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file that rows are appended to")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="folder of the runs' own folders")
    parser.add_argument(
        "--pieces", nargs="+", metavar="PIECE", help="pieces of the plan to run, in this order; default: all"
    )
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, of all GPUs (default 1)")
    parser.add_argument(
        "--gpus", nargs="+", metavar="INDEX", help="indices of the GPUs that runs take in turn; default: the first GPU"
    )
    parser.add_argument(
        "--documents", type=int, default=0, help="held-out documents and pieces that are evaluated; 0: all"
    )
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; the same command continues")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings added to every run, after --")
    options = parser.parse_args(arguments)
    for option, least in (("at_once", 1), ("documents", 0), ("minutes", 0)):
        if (value := getattr(options, option)) is not None and not value >= least:
            parser.error(f"--{option.replace('_', '-')} {value} must be at least {least}")
    programs = Programs(None if options.minutes is None else time.monotonic() + 60 * options.minutes)
    try:
        plan = read_plan(options.plan)
        if unknown := sorted(set(options.pieces or ()) - set(plan["pieces"])):
            raise Bad(f"--pieces {unknown[0]}: {options.plan} has {', '.join(plan['pieces'])}")
        for split in SPLITS:
            if not (path := options.data / split / "manifest.json").is_file():
                raise Bad(f"--data {options.data}: no {path}; python -m data_pipeline.corpus.join makes it")
        with contextlib.suppress(OSError):
            options.output.parent.mkdir(parents=True, exist_ok=True)
        for problem in unwritable("--output", str(options.output)):
            raise Bad(problem)
        if options.output.exists() and not options.output.is_file():  # whose end a reader may never see
            raise Bad(f"--output {options.output} is not a regular file: rows are read from it, too")
        for word in options.overrides:
            if says := ELSEWHERE.get(word.lstrip("+").partition("=")[0]):
                raise Bad(f"{word}: {says} says it; leave it out")
        with alone(options), told_to_stop(programs):
            return run_pieces(plan, options, programs)
    except Bad as bad:
        parser.error(str(bad))


def run_pieces(plan: dict, options: argparse.Namespace, programs: Programs) -> int:
    """Runs the pieces; returns the exit code. Raises Bad."""
    together = stages(options.pieces or list(plan["pieces"]), plan)
    check_best(together, plan, options)
    failed: list[Run] = []
    waiting: list[str] = []  # pieces that may read the rows of failed runs
    left: list[Run] = []
    for index, pieces in enumerate(together):
        waiting += [piece for piece in pieces if failed and reads_rows(plan["pieces"][piece])]
        begin = [piece for piece in pieces if piece not in waiting]
        if not begin:
            continue
        say(f"{'piece' if len(begin) == 1 else 'pieces'} {', '.join(begin)}")
        grids = [grid for piece in begin for grid in plan["pieces"][piece]]
        left, more = run_grids(grids, plan, options, programs)
        failed += more
        if left:
            later = [f"piece {piece}" for piece in itertools.chain(*together[index + 1 :])]
            say("\n  ".join(["time is up. Left:", *(run.name for run in left), *later]))
            say("the same command goes on from here")
            break
    if failed:
        waited = [f"piece {piece}: not begun, since it reads the best of other runs" for piece in waiting]
        say("\n  ".join(["failed:", *(run.name for run in failed), *waited]))
        return FAILED
    if left:
        return TIME_UP
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
