"""The file of an offline W&B run, cut where a resumed run goes on.

It is a log in LevelDB's format (blocks of 32 KiB; fragments of ``crc32, length, type``), whose records are W&B's own
protobuf messages; W&B writes it and has no way to take a step back.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER_BYTES = 7  # of the file, ":W&B" and a version, and of each fragment
BLOCK_BYTES = 32768
WHOLE, LAST = 1, 4  # types of the fragments that end a record


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """(where it ends, the message) of each record; half a last one is left out."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), HEADER_BYTES, b""
    while place + HEADER_BYTES <= len(data):
        rest = BLOCK_BYTES - place % BLOCK_BYTES
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if rest < HEADER_BYTES or kind == 0:  # padding
            place += rest
            continue
        parts += data[place + HEADER_BYTES : place + HEADER_BYTES + length]
        place += HEADER_BYTES + length
        if place <= len(data) and kind in (WHOLE, LAST):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(parts)
            yield place, message
            parts = b""


def steps_of(path: Path) -> list[tuple[int, int]]:
    """(where it ends, ``_step``) of each record of metrics."""
    found = []
    for place, message in records(path):
        if message.WhichOneof("record_type") == "history":
            values = {item.key or "/".join(item.nested_key): item.value_json for item in message.history.item}
            found.append((place, int(json.loads(values["_step"]))))
    return found


def is_finished(path: Path) -> bool:
    """Whether the run ended by itself."""
    ends = [m.exit.exit_code for _, m in records(path) if m.WhichOneof("record_type") == "exit"]
    return ends[-1:] == [0]


def keep_through(path: Path, last_step: int) -> None:
    """Cut off what was recorded after ``last_step``."""
    later = [step for _, step in steps_of(path) if step > last_step]
    if later:
        # What comes before the first metrics describes the run.
        first = next(place for place, m in records(path) if m.WhichOneof("record_type") in ("telemetry", "summary"))
        kept = [place for place, step in steps_of(path) if step <= last_step]
        os.truncate(path, max([first, *kept]))
