"""What wandb's offline copy of a run holds: the last step whose values reached the disk.

wandb keeps up to 15 s of metrics in a process of its own, which kill -9 takes along. A .wandb file is a log in the
layout of LevelDB: 7 bytes of file header, then blocks of 32 KiB, in which a record is crc (4 bytes), length (2,
little-endian), kind (1: whole, 2 first, 3 middle, 4 last part) and a piece of a protobuf `Record` message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

FILE_HEADER, RECORD_HEADER, BLOCK = 7, 7, 32 * 1024
WHOLE, FIRST, LAST = 1, 2, 4


def last_step_in(folder: Path, run_id: str) -> int:
    """The largest step among the histories that `folder` (wandb/) holds of run `run_id`; 0 where there is none."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = 0
    # [offline-]run-TIME-ID, and run-TIME-ID-1 where two processes began in the same second
    for path in folder.glob(f"*run-*/run-{run_id}.wandb"):
        for message in messages(path.read_bytes()):
            record = Record.FromString(message)
            for item in record.history.item:
                if item.key == "_step" or list(item.nested_key) == ["_step"]:
                    found = max(found, int(json.loads(item.value_json)))
    return found


def messages(content: bytes) -> Iterator[bytes]:
    """The messages of a .wandb file, up to one that was cut short."""
    at, parts = FILE_HEADER, b""
    while at + RECORD_HEADER <= len(content):
        if BLOCK - at % BLOCK < RECORD_HEADER:
            at += BLOCK - at % BLOCK  # the end of a block has no room for a header
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        at += RECORD_HEADER
        piece = content[at : at + length]
        at += length
        if len(piece) < length or not length:
            return
        parts = piece if kind in (WHOLE, FIRST) else parts + piece
        if kind in (WHOLE, LAST):
            yield parts
