"""The one error that a user's input may raise: each problem a line of its own, shown without a traceback."""


class InputError(ValueError):
    """Bad input: a setting, a file or an argument. `problems` holds one line each; command lines print them, exit 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self):
        # The default would hand the joined text back as one problem when the error crosses a process boundary.
        return type(self), self.problems
