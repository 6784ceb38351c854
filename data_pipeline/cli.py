"""What all command lines here have in common: their help, and errors that are lines and an exit code."""

import argparse
import functools
import sys
from collections.abc import Callable

from data_pipeline.errors import InputError, StageError
from data_pipeline.files import NO_ROOM


def command(main: Callable[[list[str]], int | None]) -> Callable[..., int]:
    """Decorator: `main(arguments)` as a command line that takes the process's arguments when it is given none, and
    returns an exit code: what main returns, or else 0; 2 for bad input, a line a problem; 1 where a stage failed or a
    disk is full; 130 when interrupted."""

    @functools.wraps(main)
    def guarded(arguments: list[str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if arguments is None else arguments) or 0
        except InputError as error:
            print(*error.problems, sep="\n", file=sys.stderr)
            return 2
        except StageError as error:
            print(error, file=sys.stderr)
            return 1
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            print(f"{error}: make room and run the same command again", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted: run the same command again", file=sys.stderr)
            return 130

    return guarded


def parser(module: str, text: str) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, whose help is the module's own text."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def overrides(module: str, text: str, arguments: list[str]) -> list[str]:
    """The arguments of a command line that takes Hydra overrides alone."""
    given = parser(module, text)
    given.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, in Hydra's grammar")
    return given.parse_args(arguments).overrides
