"""The errors that a command line shows without a traceback."""


class InputError(ValueError):
    """Bad input: a setting, a file or an argument. `problems` holds one line each; command lines print them, exit 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self):
        # The default would hand the joined text back as one problem when the error crosses a process boundary.
        return type(self), self.problems


class StageError(RuntimeError):
    """A stage failed for a reason that is not the input's; running again continues with it."""
