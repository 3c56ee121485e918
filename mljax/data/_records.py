"""Records by number from array_record shards, from any thread or process."""

import bisect
import itertools
import threading
from collections.abc import Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore[reportMissingImports]

from mljax.errors import UserError
from mljax.waiting import bounded


class Records:
    """`records[i]`: the bytes of one record; shards are opened on first use, and again after pickling.

    Args:
      paths: the shards, in order.
      lengths: records in each.
    """

    def __init__(self, paths: Sequence[str], lengths: Sequence[int]):
        self.paths, self.ends = tuple(paths), tuple(itertools.accumulate(lengths))
        self._open: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> bytes:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self.ends, index)
        reader = self._open.get(shard) or self._reader(shard)
        try:
            row = index - (self.ends[shard - 1] if shard else 0)
            return bounded(lambda: reader.read([row])[0], self.paths[shard])
        except RuntimeError as error:
            raise OSError(f"Record {index} in {self.paths[shard]!r} cannot be read ({error}): pack it again.") from None

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard not in self._open:
                self._open[shard] = open_shard(self.paths[shard], self._length(shard))
            return self._open[shard]

    def _length(self, shard: int) -> int:
        return self.ends[shard] - (self.ends[shard - 1] if shard else 0)

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "ends": self.ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths, self.ends = state["paths"], state["ends"]
        self._open, self._lock = {}, threading.Lock()


def open_shard(path: str, length: int | None = None) -> ArrayRecordReader:
    """A thread-safe reader of one shard.

    Raises:
      UserError: it cannot be opened, is cut short, or has another number of records than `length`.
    """
    reader: Any = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
    found = reader.num_records() if reader.ok() else None
    if found is None:
        raise UserError(f"The shard {path!r} is cut short, damaged or not there: remove it and make it again.")
    if length is not None and found != length:
        raise UserError(f"The shard {path!r} has {found} records where {length} are expected: make it again.")
    return reader
