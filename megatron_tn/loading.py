"""Finding what a command line names: a checkpoint or a released model, and its tokenizer."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from data_pipeline.shards.manifest import Manifest
from megatron_tn.checkpoint.load import CheckpointWeights, model_of
from megatron_tn.checkpoint.manifest import FORMAT, MANIFEST, format_of
from megatron_tn.config import ConfigError, ModelConfig
from megatron_tn.device.allocator import use_expandable_segments
from megatron_tn.device.free_memory import is_out_of_memory
from megatron_tn.engine.base import DTYPES
from megatron_tn.model.base import Model
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import join_world, leave_world, world_size
from megatron_tn.released.weights import ReleasedWeights
from megatron_tn.training.run_folder import RunFolder, find_checkpoint

log = logging.getLogger(__name__)

MOST_NAMED = 4  # folders, in a message
TIMEOUT_S = 1800  # seconds that a collective waits for the other ranks


def load_any_model(
    path: str, device: str, precision: str, context: ParallelContext | None = None, *, fp8_weights: bool = False
) -> Model:
    """The model in a checkpoint folder, in the newest of a folder of checkpoints, or in a released model's folder.

    precision "trained" keeps what the weights were trained or stored in; device "auto" takes a GPU where there is one.
    context: each of its tensor-parallel ranks loads its own part. fp8_weights: see `model_of`.

    Raises:
        ConfigError: there is none of these at `path`, no such device, a model that does not fit the layout, or a GPU
            that cannot convert fp8 numbers.
    """
    directory = resolve_checkpoint(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        use_expandable_segments()  # a Transformer's cache grows by a window at a time
    try:
        torch.empty(0, device=device).tolist()  # the meta device holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device={device} is not available here: {str(error).splitlines()[0]}") from None
    with unreadable(path, directory), open_weights(directory) as weights:
        stored = set(weights.dtypes.values())
        trained = torch.bfloat16 if stored == {torch.bfloat16} else torch.float32
        return model_of(weights, context, device, DTYPES.get(precision, trained), fp8_weights=fp8_weights)


@contextlib.contextmanager
def tensor_parallel(device: str, tp: int = 0) -> Iterator[tuple[ParallelContext, str]]:
    """The processes of the launcher in tensor-parallel groups of `tp` (0: of all), and this process's device: with
    device "auto" that of its rank where there are several."""
    if world_size() == 1:
        yield ParallelContext(), device
        return
    joined = join_world(TIMEOUT_S)
    try:
        yield ParallelContext.create(tp or world_size()), str(joined) if device == "auto" else device
    finally:
        leave_world()


@contextlib.contextmanager
def unreadable(checkpoint: str, directory: Path) -> Iterator[None]:
    """Problems with files in `directory`, the folder of weights that `checkpoint` names, begin with that setting."""
    try:
        yield
    except ConfigError as error:
        begin = f"checkpoint={checkpoint} cannot be read: "
        raise ConfigError(
            [f"{begin if problem.startswith(str(directory)) else ''}{problem}" for problem in error.problems]
        ) from None


@contextlib.contextmanager
def memory_is_named(settings: str) -> Iterator[None]:
    """PyTorch's error of a tensor that does not fit into memory becomes a ConfigError that begins with `settings`, by
    which the tensors grow. It is logged on a rank above 0, which may have been alone with it: command lines print the
    problems of rank 0."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        problem = f"{settings}: out of memory: {' '.join(str(error).split())[:200]}"
        if dist.is_initialized() and dist.get_rank() > 0:
            log.error("rank %d: %s", dist.get_rank(), problem)
        raise ConfigError(problem) from None


def open_weights(directory: Path) -> CheckpointWeights | ReleasedWeights:
    """The weights in a checkpoint or a released folder, as `resolve_checkpoint` found it; a context manager."""
    if (directory / MANIFEST).is_file():
        return CheckpointWeights(directory)
    try:
        return ReleasedWeights(directory)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None


def model_config(checkpoint: str) -> ModelConfig:
    """The settings of the model that `checkpoint` names; of its weights the headers alone are read."""
    directory = resolve_checkpoint(checkpoint)
    with unreadable(checkpoint, directory), open_weights(directory) as weights:
        return weights.config


def problems_of_vocabulary(tokenizer: Tokenizer, model: ModelConfig, checkpoint: str) -> list[str]:
    """One line where the tokenizer has ids that the model of `checkpoint` has no embedding of."""
    if (entries := 1 + max(tokenizer.get_vocab().values(), default=-1)) <= model.vocab_size:
        return []
    size = model.vocab_size
    return [f"checkpoint={checkpoint}: its tokenizer has {entries} entries, more than model.vocab_size={size}"]


def load_tokenizer(path: str, checkpoint: str) -> Tokenizer:
    """tokenizer.json at `path`, or, where that is empty, in the checkpoint's folder or its run's. It neither cuts nor
    pads nor drops merges, whatever the file says, adds no entries, and reads `</s>` in a text as those four characters.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if (place := tokenizer_path(path, checkpoint)) is not None:
        return read_tokenizer(place)
    if not path:
        raise ConfigError(f"tokenizer is not set, and no tokenizer.json is beside checkpoint={checkpoint}")
    why = "is a folder: name a tokenizer.json" if Path(path).is_dir() else "is not there: name a tokenizer.json"
    raise ConfigError(f"tokenizer={path} {why}")


def read_tokenizer(place: Path) -> Tokenizer:
    """As `load_tokenizer`, of the file at `place`."""
    try:
        tokenizer = Tokenizer.from_file(str(place))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"tokenizer={place} cannot be read as a tokenizer.json: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None  # it would add a bos, and leave white space out of a token's place in the text
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def tokenizer_path(path: str, checkpoint: str) -> Path | None:
    """Path of the tokenizer.json that `load_tokenizer` reads; None where there is none."""
    directory = resolve_checkpoint(checkpoint)
    near = [folder / "tokenizer.json" for folder in (directory, *list(directory.absolute().parents)[:2])]
    return next((place for place in ([Path(path)] if path else near) if place.is_file()), None)


def other_tokenizer(
    manifest: Manifest, setting: str, path: str, checkpoint: str, named: str = "checkpoint"
) -> list[str]:
    """One line where shards were made with another tokenizer than the checkpoint's model was trained with; none where
    either tokenizer.json is not there. setting: the one that names the shards, with its value; named: the setting that
    names the checkpoint; path: see `load_tokenizer`."""
    ours, theirs = tokenizer_path(path, checkpoint), manifest.directory / manifest.tokenizer.file
    if ours is None or not theirs.is_file() or ours.read_bytes() == theirs.read_bytes():
        return []
    if load_tokenizer(str(ours), checkpoint).get_vocab() == load_tokenizer(str(theirs), checkpoint).get_vocab():
        return []
    return [f"{setting} was made with another tokenizer than {ours}, that of {named}={checkpoint}"]


def resolve_checkpoint(path: str, setting: str = "checkpoint") -> Path:
    """The folder of weights that `path`, the value of `setting`, names: a released model's, a checkpoint, or the newest
    one of a run. Raises ConfigError where there is none."""
    if not path:
        raise ConfigError(f"{setting} is not set: name a checkpoint's folder or a released model's")
    directory = Path(path)
    patterns = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "pytorch_model.bin.index.json")
    weights = (path for pattern in patterns for path in directory.glob(pattern))
    if (directory / "config.json").is_file() and any(weights):
        return directory
    if found := find_checkpoint(directory):
        if (kind := format_of(found)) not in (FORMAT, ""):
            raise ConfigError(
                f"{setting}={path}: no checkpoint, run or released model is there: {found / MANIFEST} is of the format "
                f"{kind!r}, not {FORMAT!r}"
            )
        return found
    raise ConfigError(f"{setting}={path}: no checkpoint, run or released model is there{_instead(directory)}")


def _instead(directory: Path) -> str:
    """What a folder without weights is, where it is a run's or has runs below it."""
    if RunFolder(directory).is_there:
        return ": the run has no whole checkpoint yet"
    if below := [path.name for path in sorted(directory.glob("*")) if _has_checkpoint(path)]:
        return f", but in folders of it: {', '.join(below[:MOST_NAMED])}{', ...' if below[MOST_NAMED:] else ''}"
    return ""


def _has_checkpoint(directory: Path) -> bool:
    with contextlib.suppress(PermissionError):
        return directory.is_dir() and (found := find_checkpoint(directory)) is not None and format_of(found) == FORMAT
    return False
