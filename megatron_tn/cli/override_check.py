"""Composes the settings of every job of a command line: one error line for each override that is wrong."""

import difflib
import fnmatch
import itertools
import json
import re
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from megatron_tn.cli.overrides import CommandLine, files_in, kinds_of, settings
from megatron_tn.config import ConfigError, from_mapping, known_keys, out_of_bounds, to_mapping, unknown_key


def check_overrides(line: CommandLine) -> None:
    """Compose the config as Hydra will, and turn Hydra's errors into one line each. All jobs of a sweep are
    composed and checked first, so that no job is refused after hours of earlier jobs.

    Raises:
        ConfigError: an unknown key, an unknown choice of a group, an invalid value, a word that is not KEY=VALUE, a
            sweep without --multirun, a sweep without values, or one in which two jobs have the same settings.
    """
    parsed, problems = [], []
    if line.config_dir and not Path(line.config_dir).is_dir():
        raise ConfigError(f"--config-dir {line.config_dir}: there is no such folder")
    for word in line.overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([word])
        except HydraException as error:
            problems.append(
                f"not an override: {word!r}: {_first_line(error)}; it must be KEY=VALUE, and a value with spaces "
                """or signs such as = ~ [ ( { , goes in quotes of its own: "KEY='a, b'\""""
            )
    swept = [override for override in parsed if override.is_sweep_override()]
    if swept and not line.multirun and not problems:
        needed = "needs --multirun" if "run_dir" in kinds_of(line.kind) else f"is not for {line.config_name}"
        problems = [f"{override.input_line}: a sweep over several values {needed}" for override in swept]
    values = []
    for override in [] if problems else parsed:
        try:
            values.append(_values(line, override))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    swept_places = [place for place, each in enumerate(values) if len(each) > 1]
    names: dict[str, str] = {}  # settings -> the swept words of the first job that has them
    for job in itertools.product(*values):
        config, found = _job(line, job, values=bool(swept))
        problems += found
        name = " ".join(job[place] for place in swept_places)
        if config is None:
            continue
        if first := names.get(key := json.dumps(to_mapping(config))):
            problems.append(
                f"{name} has the settings of {first}: leave one out, or the word that replaces what differs in them"
            )
        names.setdefault(key, name)
    if problems := list(dict.fromkeys(problems)):
        raise ConfigError(problems)


def _values(line: CommandLine, override: Override) -> list[str]:
    """KEY=VALUE for each value of a (swept) override. Raises ConfigError for a sweep without values, or with a
    value twice."""
    if not override.is_sweep_override():
        return [override.input_line]
    name = override.input_line.partition("=")[0]
    if override.value_type == ValueType.INTERVAL_SWEEP:
        if any(word.startswith("hydra/sweeper=") for word in line.overrides):
            return []  # a sweeper plugin draws values from the interval: jobs cannot be checked in advance
        raise ConfigError(
            f"{override.input_line}: an interval has no list of values to sweep over; name them, as in "
            f"{name}=0.1,0.2 or {name}=range(1,4)"
        )
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        choices, globs = line.groups.get(name.lstrip("+"), []), override.value()
        values = [choice for choice in choices if any(fnmatch.fnmatch(choice, glob) for glob in globs.include)]
        values = [value for value in values if not any(fnmatch.fnmatch(value, glob) for glob in globs.exclude)]
    else:
        try:
            values = list(override.sweep_string_iterator())
        except (HydraException, ValueError, TypeError) as error:
            raise ConfigError(f"{override.input_line}: {_first_line(error)}") from None
    if not values:
        raise ConfigError(f"{override.input_line}: there is no value to sweep over")
    if repeated := [value for value, count in Counter(values).items() if count > 1]:
        raise ConfigError(
            f"{override.input_line}: two jobs would have {name}={value}: name it once" for value in repeated
        )
    return [f"{name}={value}" for value in values]


def _job(line: CommandLine, words: Sequence[str], *, values: bool) -> tuple[Any, list[str]]:
    """One job's config, of a sweep, and its error lines. values: of a sweep, whose values are checked as well, not
    only names."""
    try:
        composed = line.compose(line.choices_win(words)) if values else line.composed
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return None, _explain(line, error, words)
    if not values:
        return None, []
    try:
        config = from_mapping(line.kind, settings(composed))
    except ConfigError as error:
        return None, error.problems
    except OmegaConfBaseException:
        return None, []  # an interpolation such as ${hydra:...}, resolved only when the job runs
    return config, config.job_problems()


def _explain(line: CommandLine, error: Exception, words: Sequence[str]) -> list[str]:
    """Error lines of words that cannot be composed: unknown names, and then values that are wrong by themselves.
    Relations are not checked, since a misspelt setting may be one side of them."""
    if unknown := dict(_unknown(line, words, _first_line(error))):
        return [*unknown.values(), *_wrong_values(line, [word for word in words if word not in unknown])]
    return [_first_line(error) + (f": {_first_line(error.__cause__)}" if error.__cause__ else "")]


def _wrong_values(line: CommandLine, words: Sequence[str]) -> list[str]:
    try:
        config = from_mapping(line.kind, settings(line.compose(line.choices_win(words))))
    except ConfigError as error:
        return error.problems
    except (HydraException, OmegaConfBaseException, ValueError):
        return []
    return list(out_of_bounds(config).values())


def _unknown(line: CommandLine, words: Sequence[str], failed: str) -> Iterator[tuple[str, str]]:
    """(word, error line) of each word that names no setting, no group, or no choice of a group; or a new key of a
    setting whose keys are the user's, such as data.mixture, without the + that Hydra wants for it. failed: Hydra's
    words for the first of them; where they name another setting, such a key may be in a file, and so no new one."""
    known = known_keys(line.kind)
    free = [name for name, kind in kinds_of(line.kind).items() if typing.get_origin(kind[0]) is dict]
    is_new = any(f"'{name}'" in failed or f"'{name}." in failed for name in free)
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if setting := next((name for name in free if f"{key}.".startswith(f"{name}.")), ""):
            if is_new and word.startswith(key) and (key != setting or (value.startswith("{") and value != "{}")):
                yield word, f"{word}: a new key of {setting} needs a + in front: +{word}"
        elif (choices := line.groups.get(key)) is not None:
            if value not in choices:
                if inside := files_in(value, choices):
                    yield (
                        word,
                        f"{word}: conf/{key}/{value} is a folder of {len(inside)} files: name one, such as "
                        f"{key}={inside[0]}, or run all of them with --multirun",
                    )
                    continue
                choices = [choice for choice in choices if not choice.startswith("_")]  # _X: part of others
                close = difflib.get_close_matches(value, choices, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                yield word, f"{key}={value}: conf/{key} has {', '.join(choices)}{hint}"
        elif key not in known and not key.startswith(("hydra.", "hydra/")):
            yield word, unknown_key(key, sorted({*known, *line.groups}))


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error).strip().split("\n")[0])
