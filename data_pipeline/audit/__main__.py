"""Human audit of a filter: `python -m data_pipeline.audit [draw | judge | summary] samples=FILE ...`.

draw     draws a sample from scored shards: manifest=... filter=conf/score_filter.yaml [each=20 ...]
judge    (the default) serves the page: one document at a time, keep / drop / unsure by keyboard
summary  prints the agreement of filter and human verdicts

Arguments are Hydra overrides of conf/audit.yaml. Exit code 2 with a line per problem for bad input.
"""

import json
import os
import secrets
import shlex
import sys
from pathlib import Path

from data_pipeline.audit.settings import AuditSettings
from data_pipeline.cli import command, overrides
from data_pipeline.config import compose_settings
from data_pipeline.errors import InputError


def draw(settings: AuditSettings) -> None:
    """Writes settings.samples from the shards of settings.manifest."""
    from rich.console import Console

    from data_pipeline.audit.draw import draw as draw_samples
    from data_pipeline.audit.samples import write_samples
    from data_pipeline.shards.manifest import Manifest
    from data_pipeline.stream.score_filter import ScoreFilter

    if missing := [name for name in ("manifest", "filter") if getattr(settings, name) is None]:
        raise InputError(*(f"{name}: missing; draw needs {name}=..." for name in missing))
    inline = isinstance(settings.filter, dict)
    chosen = ScoreFilter.load(json.dumps(settings.filter) if inline else settings.filter)
    manifest = Manifest.load(settings.manifest)
    console = Console(stderr=True, highlight=False)
    with console.status("drawing") as status:
        samples = draw_samples(
            manifest,
            chosen,
            each=settings.each,
            seed=settings.seed,
            border=settings.border,
            max_characters=settings.max_characters,
            progress=lambda stage, done, total: status.update(f"{stage}: {done} of {total} shards"),
        )
        count = write_samples(Path(settings.samples), samples, overwrite=settings.overwrite)
    print(f"{settings.samples}: {count} documents of {manifest.totals.documents}; judge them with")
    print(f"  python -m data_pipeline.audit samples={shlex.quote(settings.samples)}")


def judge(settings: AuditSettings) -> None:
    """Serves the audit page until Ctrl-C."""
    from data_pipeline.audit.app import Audit
    from data_pipeline.audit.samples import Samples
    from data_pipeline.audit.server import AuditServer

    samples = Samples.load(settings.samples)
    answers = _answers(settings)
    folder = answers.path.absolute().parent
    target = answers.path if answers.path.exists() else next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(target, os.W_OK):
        raise InputError(f"answers={answers.path}: {target} may not be written to")
    audit = Audit(samples, answers, settings.auditor_name, show_verdict=settings.show_verdict)
    token = settings.token or (secrets.token_urlsafe(24) if settings.ask_token else None)
    server = AuditServer(audit, settings.host, settings.port, token)
    for problem in answers.problems():
        print(f"warning: {problem}", file=sys.stderr)
    done = audit.session()["answered"]
    print(f"{len(samples)} documents, {done} judged by {audit.auditor}; answers go to {answers.path}")
    print(f"open {server.url} (Ctrl-C stops it; every answer is saved as it is given)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


def summarise(settings: AuditSettings) -> None:
    """Prints the audit's summary as tables."""
    from data_pipeline.audit.agreement import summary
    from data_pipeline.audit.samples import Samples
    from data_pipeline.audit.tables import show

    samples = Samples.load(settings.samples)
    answers = _answers(settings)
    if not answers.path.exists():
        raise InputError(f"answers={answers.path}: there is no such file; judge some documents first")
    show(summary(samples.entries, answers.all()), answers.problems())


def _answers(settings: AuditSettings):
    from data_pipeline.audit.answers import AnswersFile

    path = Path(settings.answers_path)
    if path.exists() and path.samefile(settings.samples):
        raise InputError(f"answers={path} is the file of samples={settings.samples}")
    return AnswersFile(path)


COMMANDS = {"draw": draw, "judge": judge, "summary": summarise}


@command
def main(arguments: list[str]) -> None:
    given = overrides("data_pipeline.audit", __doc__, arguments, AuditSettings)
    name = given.pop(0) if given and "=" not in given[0] else "judge"
    if name not in COMMANDS:
        raise InputError(f"{name}: no such command; there are {', '.join(COMMANDS)}, then KEY=VALUE")
    COMMANDS[name](compose_settings("audit", given, AuditSettings))


if __name__ == "__main__":
    sys.exit(main())
