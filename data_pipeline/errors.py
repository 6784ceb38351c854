"""Errors that command lines print without a traceback. Their texts hold no secrets (see `redaction`)."""

from data_pipeline.redaction import lines_of, shown


class InputError(ValueError):
    """Bad input: a setting, a file or an argument. `problems` holds one line each; command lines print them, exit 2."""

    def __init__(self, *problems: str):
        self.problems = tuple(lines_of(problems))
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        # By default, unpickling in another process would make one problem of the joined text.
        return type(self), self.problems


class StageError(RuntimeError):
    """A stage failed, not because of its input; another run continues with this stage."""

    def __init__(self, problem: str):
        super().__init__(shown(problem))
