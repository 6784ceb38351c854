"""Shared by all command lines of the package: help texts, one-line errors, exit codes."""

import argparse
import functools
import sys
from collections.abc import Callable

from data_pipeline.describe import settings_text
from data_pipeline.errors import InputError, StageError
from data_pipeline.files import NO_ROOM


def command(main: Callable[[list[str]], int | None]) -> Callable[..., int]:
    """Decorator: `main(arguments)` as a command line; default arguments: sys.argv. Returns the exit code: main's result
    or 0; 2 for bad input, with a line per problem; 1 when a stage failed or the disk is full; 130 when interrupted."""

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


def parser(module: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, with the module's docstring as help."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=text, epilog=epilog, formatter_class=raw)


def overrides(module: str, text: str, arguments: list[str], settings: type) -> list[str]:
    """The arguments of a command line that takes only Hydra overrides of the fields of dataclass `settings`."""
    given = parser(module, text, settings_text(settings) if {"-h", "--help"} & set(arguments) else "")
    given.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, in Hydra's grammar")
    return given.parse_args(arguments).overrides
