"""Rounds of self-cleaning: `python -m data_pipeline.selfclean manifest=.../manifest.json output=FOLDER rounds=N ...`.

Arguments are Hydra overrides of conf/rounds.yaml. A stopped run continues where it stopped. Exit code 0: all rounds are
done, or a sample awaits human verdicts; 2 with a line per problem for bad input; 1 when training or scoring fails.
"""

import sys

from data_pipeline.cli import command, overrides
from data_pipeline.config import compose_settings
from data_pipeline.selfclean.rounds import WaitingForPeople, run_rounds, table
from data_pipeline.selfclean.settings import RoundsSettings


@command
def main(arguments: list[str]) -> None:
    given = overrides("data_pipeline.selfclean", __doc__, arguments, RoundsSettings)
    settings = compose_settings("rounds", given, RoundsSettings)
    try:
        reports = run_rounds(settings)
    except WaitingForPeople as waiting:
        print(waiting)
        return
    from rich.console import Console

    Console(highlight=False, markup=False).print(table(reports))
    last = f"{settings.output}/round_{settings.rounds:02d}/filter.json"
    print(f"train on what is kept with data.manifest={settings.manifest} data.filter={last}")


if __name__ == "__main__":
    sys.exit(main())
