"""Rounds of self-cleaning: `python -m data_pipeline.selfclean manifest=.../manifest.json output=FOLDER rounds=N ...`.

Arguments are Hydra overrides of conf/rounds.yaml. A run that was stopped goes on where it was. Exit code 0: all rounds
are done, or people are to judge a sample first; 2 and a line a problem for bad input, or where training or scoring
fails.
"""

import sys

from data_pipeline.errors import InputError
from data_pipeline.selfclean.rounds import WaitingForPeople, run_rounds, table
from data_pipeline.selfclean.settings import compose_rounds


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    try:
        settings = compose_rounds(arguments)
        reports = run_rounds(settings, say=lambda line: print(line, flush=True))
    except InputError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return 2
    except WaitingForPeople as waiting:
        print(waiting)
        return 0
    except KeyboardInterrupt:
        return 130
    from rich.console import Console

    Console(highlight=False).print(table(reports))
    last = f"{settings.output}/round_{settings.rounds:02d}/filter.json"
    print(f"train on what is kept with data.manifest={settings.manifest} data.filter={last}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
