"""wandb's offline files of a run: the last step in them, and their end after a kill.

wandb buffers up to 15 s of metrics in its own process, lost on kill -9. A .wandb file has the LevelDB log layout: 7
bytes of file header, then blocks of 32 KiB, in which a record is crc (4 bytes), length (2, little-endian), kind (1:
whole, 2: first, 3: middle, 4: last part) and a piece of a protobuf `Record` message.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_tn.config import regular

FILE_HEADER, RECORD_HEADER, BLOCK = 7, 7, 32 * 1024
WHOLE, FIRST, LAST = 1, 2, 4
MAGIC = b":W&B"  # a file begins with it
RUN_RECORD = 2  # the number of the message with the run's id and settings; the first has wandb's version


def last_step_in(folder: Path, run_id: str) -> int:
    """The largest step in the history records of run `run_id` below `folder` (wandb/); 0 where there are none. Damaged
    records are skipped, and files that cannot be read."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = 0
    # [offline-]run-TIME-ID, and run-TIME-ID-1 where two processes began in the same second
    for path in folder.glob(f"*run-*/run-{run_id}.wandb"):
        content = b""
        with contextlib.suppress(OSError):
            content = regular(path).read_bytes()
        for message, _ in messages(content):
            with contextlib.suppress(Exception):  # of protobuf or json, or no number
                for item in Record.FromString(message).history.item:
                    if item.key == "_step" or list(item.nested_key) == ["_step"]:
                        found = max(found, int(json.loads(item.value_json)))
    return found


def mend_files(folder: Path) -> None:
    """Cut the offline files below wandb/ after their last whole message, and remove those without a run's record. A
    kill leaves the beginning of another message, or a file's header alone; there `wandb sync` ends, and it does not
    come to the files of the run's later starts. No process may be writing to a file: it would go on behind the cut."""
    for path in folder.glob("offline-run-*/*.wandb"):
        with contextlib.suppress(OSError):
            content = regular(path).read_bytes()
            if not MAGIC.startswith(content[: len(MAGIC)]):
                continue
            ends = [end for _, end in messages(content)]
            if len(ends) < RUN_RECORD:
                path.unlink()
            elif ends[-1] < len(content):
                os.truncate(path, ends[-1])


def messages(content: bytes) -> Iterator[tuple[bytes, int]]:
    """The messages of a .wandb file, up to the first truncated one, and where each ends."""
    at, parts = FILE_HEADER, b""
    while at + RECORD_HEADER <= len(content):
        if BLOCK - at % BLOCK < RECORD_HEADER:
            at += BLOCK - at % BLOCK  # no room for a record header before the block's end
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        at += RECORD_HEADER
        piece = content[at : at + length]
        at += length
        if len(piece) < length or not length:
            return
        parts = piece if kind in (WHOLE, FIRST) else parts + piece
        if kind in (WHOLE, LAST):
            yield parts, at
