"""The order of calls within a step: microbatches, the last of them, the update."""


class Phase:
    """State of an engine's gradient sums: "empty" -> "adding" (some microbatches) -> "whole" (all, reduced) -> "empty".

    A host-side flag; no call waits for the device.
    """

    def __init__(self) -> None:
        self.name = "empty"

    def add(self, last: bool) -> None:
        """A microbatch is about to add its gradients. last: whether it is the step's last.

        Raises:
            RuntimeError: the sums are whole.
        """
        if self.name == "whole":
            raise RuntimeError(
                "forward_backward was called after the step's last microbatch (last=True): its gradients would be "
                "added to sums that are already reduced over ranks; call step first"
            )
        self.name = "whole" if last else "adding"

    def take(self) -> None:
        """The optimizer is about to read the sums.

        Raises:
            RuntimeError: the sums are not whole.
        """
        if self.name != "whole":
            raise RuntimeError(
                f"step was called while the gradient sums are {self.name!r}, not 'whole': call forward_backward with "
                "last=True for the step's last microbatch first"
            )
        self.name = "empty"
