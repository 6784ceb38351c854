"""Command lines: words to a checked config, sweeps, exit codes. A program imports these names and no more."""

from megatron_tn.cli.overrides import CONF
from megatron_tn.cli.program import (
    BAD_INPUT,
    bad_input_exits,
    closed_pipe_exits,
    command,
    is_first_process,
    of_words,
    run_program,
    unusable_files_are_named,
)

__all__ = [
    "BAD_INPUT",
    "CONF",
    "bad_input_exits",
    "closed_pipe_exits",
    "command",
    "is_first_process",
    "of_words",
    "run_program",
    "unusable_files_are_named",
]
