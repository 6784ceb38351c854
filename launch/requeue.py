"""What a job of launch/train.sbatch does before its trainers start and after they ended: a script of Python's standard
library alone, since the host of a job's shell may have no packages where the trainers run in a container.

    python3 launch/requeue.py ready RUN_DIR SETTINGS CHAIN     exit code 0: there is something to train
    python3 launch/requeue.py after RUN_DIR ...                exit code 0: requeue the job; REFUSED: do not

A job is requeued as often as it gets further: a requeue is refused when the job's last `failures` requeues found the
same newest checkpoint. run_dir/requeues.log has a line for each decision; `records` reads it.
"""

import argparse
import json
import os
import re
import sys
import time

REFUSED = 10  # exit code; Python's own failures are 1 and 2
PREEMPTED = 3  # requeues of a job that was told to stop, at the same step, where failures=0
BAD_SETTINGS = 2  # exit code of the trainers
GUARD = "TrainingAborted:"  # begins the error of a run that its own settings (guard.*) ended
SKEW_S = 5  # largest difference between the clocks of two hosts


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    ready = commands.add_parser("ready")
    ready.add_argument("run_dir")
    ready.add_argument("settings", help="config.json of the submission")
    ready.add_argument("chain", help="name that the jobs of a chain share")
    after = commands.add_parser("after")
    after.add_argument("run_dir")
    after.add_argument("--job", required=True)
    after.add_argument("--restart", required=True)
    after.add_argument("--code", type=int, required=True, help="exit code of the trainers")
    after.add_argument(
        "--since", type=float, required=True, help="Unix time in seconds at which the trainers were started"
    )
    after.add_argument(
        "--failures",
        type=int,
        required=True,
        help="requeues in a row without a new checkpoint before giving up; 0: never requeue a failure",
    )
    after.add_argument("--chain", default="")
    options = parser.parse_args()
    decide = ready_to_train if options.command == "ready" else requeued
    yes, said = decide(options)
    print("launch/train.sbatch: " + said, flush=True)
    sys.exit(0 if yes else REFUSED)


def ready_to_train(options):
    """Whether a job of a chain has anything to do: not where the run is finished, or an earlier job of it gave up."""
    status, settings = read(options.run_dir, "status.json"), read(options.settings)
    schedule = settings.get("schedule")
    steps = number(schedule if isinstance(schedule, dict) else {}, "steps")
    last = min(number(settings, "stop_after") or steps, steps)
    if status.get("state") == "finished" and last and number(status, "step") >= last:
        return False, "the run has reached step {}, its last: nothing to do".format(status["step"])
    before = records(options.run_dir)
    if before and before[-1].get("chain") == options.chain != "" and "gave-up" in before[-1]:
        return False, "job {} of this chain gave up, so this one does not start".format(before[-1].get("job"))
    return True, f"the run goes on from step {max(newest(options.run_dir), 0)}"


def requeued(options):
    """Whether to requeue the job, by the trainers' exit code, status.json and the newest checkpoint."""
    status, saved = read(options.run_dir, "status.json"), newest(options.run_dir)
    if number(status, "time") < options.since - SKEW_S:
        status = {}  # status.json is of an earlier start
    told = options.code == 0
    cause = "told to stop" if told else status.get("error") or in_words(options.code)
    cause = "".join(letter if letter.isprintable() else " " for letter in str(cause))[:500]
    limit = options.failures or (PREEMPTED if told else 0)
    alike = 0
    for record in reversed(records(options.run_dir)):
        if record.get("job") != options.job or record.get("saved", record.get("step")) != str(saved):
            break
        alike += 1
    final = ""
    if not told and cause.startswith(GUARD):
        final = "its settings end the run"
    elif options.code == BAD_SETTINGS and not has_trained(options):
        final = "the settings are wrong"
    elif not limit:
        final = "jobs that failed are not requeued (failures=0)"
    elif alike >= limit:
        final = f"requeued {alike} times at the same newest checkpoint"
    line = [time.strftime("%Y-%m-%dT%H:%M:%S%z"), "job=" + options.job, "restart=" + options.restart]
    line += [f"code={options.code}", "cause=" + json.dumps(cause)]
    line += ["chain=" + json.dumps(options.chain)] if options.chain else []
    line += ["gave-up"] if final else []
    line += [f"saved={saved}", "step={}".format(status.get("step", max(saved, 0)))]
    if not append(options.run_dir, " ".join(line)) and int(options.restart) >= limit:
        final = final or f"requeues.log cannot be written, and it was restarted {options.restart} times"
    where = f"step {saved}" if saved >= 0 else "its beginning"
    if final:
        return False, f"{cause}: {final}; giving up"
    count = "" if told else f" ({alike + 1} of {limit + 1} failures without a new checkpoint)"
    return True, f"{cause}{count}: requeueing; the job goes on from {where}"


def has_trained(options):
    """Whether this job has trained with its settings before: then it is its host's view of files that is wrong."""
    job = read(options.run_dir, "job.json")
    return int(options.restart) > 0 and job.get("job") == options.job and bool(job.get("begun"))


def newest(run_dir):
    """Step of the newest whole checkpoint; -1 where there is none."""
    steps = [-1]
    folder = os.path.join(run_dir, "checkpoints")
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        found = re.match(r"step_(\d{8,})(-again)?$", name)
        if found and os.path.isfile(os.path.join(folder, name, "manifest.json")):
            steps.append(int(found.group(1)))
    return max(steps)


def records(run_dir):
    """The lines of requeues.log as dictionaries, each with the local time of the decision as "at"."""
    try:
        with opened(run_dir, "requeues.log") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        values = {"at": line.partition(" ")[0]}
        for key, quoted, plain in re.findall(r'([\w-]+)(?:=(?:("(?:[^"\\]|\\.)*")|(\S*)))?(?= |$)', line):
            try:
                values[key] = json.loads(quoted) if quoted else plain
            except ValueError:
                values[key] = quoted
        found.append(values)
    return found


def append(run_dir, line):
    """Whether the line could be written; not to a FIFO that nobody reads, whose open would wait."""
    try:
        with open(os.path.join(run_dir, "requeues.log"), "a", opener=without_waiting) as file:
            file.write(line + "\n")
    except OSError:
        return False
    return True


def without_waiting(path, flags):
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def read(*path):
    """The JSON object in a file; empty where there is none."""
    try:
        with opened(*path) as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def opened(*path):
    """A regular file of text, open for reading; raises OSError for any other: who opens a FIFO waits."""
    path = os.path.join(*path)
    if not os.path.isfile(path):
        raise OSError(f"{path} is no regular file")
    return open(path, errors="replace")


def number(values, key):
    """A number of a JSON object; 0 where it has none, as in a damaged file."""
    found = values.get(key)
    return found if isinstance(found, (int, float)) else 0


def in_words(code):
    """An exit code as the cause of a job's end."""
    if code == 75:
        return "a hang (exit code 75)"
    if code > 128:
        return f"a rank was killed by signal {code - 128} (exit code {code})"
    return f"exit code {code}"


if __name__ == "__main__":
    main()
