"""TensorBoard events, written at once: a full disk is an error here, not in a thread of tensorboardX at the exit."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Events:
    """One file of events in a run directory; every scalar is on the disk when `add` returns."""

    def __init__(self, folder: Path):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab", buffering=0)
        self._write(wall_time=time.time(), file_version="brain.Event:2")

    def add(self, step: int, values: Mapping[str, float], when: float) -> None:
        """Scalars of a step by name, measured at `when` (seconds since 1970)."""
        scalars = [{"tag": name, "simple_value": float(value)} for name, value in values.items()]
        self._write(wall_time=when, step=step, summary={"value": scalars})

    def _write(self, **fields: Any) -> None:
        """A record: length, its checksum, the event, its checksum."""
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c

        kind: Any = event_pb2
        event = kind.Event(**fields).SerializeToString()
        head = struct.pack("<Q", len(event))
        self._file.write(
            head + struct.pack("<I", masked_crc32c(head)) + event + struct.pack("<I", masked_crc32c(event))
        )

    def close(self) -> None:
        self._file.close()
