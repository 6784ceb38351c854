"""What must be true of a run after faults: the same steps, data, losses and weights as an undisturbed one's, bit for
bit, and nothing left behind."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.soak.faults import trainers_of
from megatron_tn.checkpoint.manifest import CheckpointManifest
from megatron_tn.training.run_folder import RunFolder

LEFTOVERS = ("*.tmp", ".slurm-*", "checkpoints/*.tmp", "checkpoints/*.old", "checkpoints/*-again")


@dataclass(frozen=True)
class Outcome:
    """state, step: of status.json. losses: (step, loss, gradient norm, learning rate) of every record, in its order.
    data: (step, samples, tokens) likewise. position: of the data stream, in the checkpoint of the last step. weights:
    file of that checkpoint -> sha256 of its bytes (masters, moments, states of random numbers). leftovers: files and
    processes that no ended run has."""

    state: str
    step: int
    losses: Sequence[tuple]
    data: Sequence[tuple]
    position: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    leftovers: Sequence[str] = ()


def outcome_of(folder: RunFolder) -> Outcome:
    """The outcome of a run that has ended."""
    status, records = folder.status(), folder.records("loss")
    step = status.get("step", 0)
    position, weights = {}, {}
    if (checkpoint := folder.saved().get(step)) is not None:
        position = CheckpointManifest.read(checkpoint).training["stream"]
        files = sorted(checkpoint.glob("*.safetensors"))
        weights = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    left = [str(path.relative_to(folder.path)) for pattern in LEFTOVERS for path in folder.path.glob(pattern)]
    left += [f"process {pid} of rank {rank}" for rank, pid in trainers_of(folder.path).items()]
    if holder := folder.claim():
        left.append(f"run.lock, held by {holder}")
    folder.release()
    return Outcome(
        status.get("state", "none"),
        step,
        [(record["step"], record["loss"], record["grad_norm"], record["lr"]) for record in records],
        [(record["step"], record["samples"], record["tokens"]) for record in records],
        position,
        weights,
        left,
    )


def problems(found: Outcome, wanted: Outcome) -> list[str]:
    """One line for each thing that is not as in `wanted`, an undisturbed run's outcome; empty when all is."""
    lines = []
    if found.step != wanted.step:
        lines.append(f"it ended at step {found.step}, not {wanted.step} (state {found.state})")
    elif not found.weights:
        lines.append(f"there is no checkpoint of step {found.step}")
    numbers = [row[0] for row in found.losses]
    if numbers != list(range(1, found.step + 1)):
        lines.append(f"the journal does not have every step once and in order: {_odd(numbers)}")
    for name, these, those in (("data", found.data, wanted.data), ("losses", found.losses, wanted.losses)):
        if first := next((pair for pair in zip(these, those, strict=False) if pair[0] != pair[1]), None):
            lines.append(f"{name} differ: {first[0]}, not {first[1]}")
    if found.step == wanted.step:
        if found.position != wanted.position:
            lines.append(f"the data stream stands at {found.position}, not {wanted.position}")
        names = found.weights.keys() | wanted.weights.keys()
        if differ := sorted(name for name in names if found.weights.get(name) != wanted.weights.get(name)):
            lines.append(f"final weights differ in {', '.join(differ)}")
    return lines + [f"left behind: {one}" for one in found.leftovers]


def _odd(numbers: Sequence[int]) -> str:
    """The place in `numbers` where they first differ from 1, 2, 3, ..., for a message."""
    place = next((index for index, number in enumerate(numbers) if number != index + 1), len(numbers))
    return f"{numbers[max(place - 1, 0) : place + 2]} ..., {len(numbers)} records"
