"""tf.train.Example without TensorFlow: a map of names to lists of bytes, floats or integers, in protobuf's wire format.

message Example { Features features = 1; }             message Features { map<string, Feature> feature = 1; }
message Feature { oneof { BytesList = 1; FloatList = 2; Int64List = 3; } }      each list: repeated value = 1
"""

from collections.abc import Collection, Iterator

import numpy as np


class BadExample(ValueError):
    """These bytes are not an Example."""


def parse(data: bytes, wanted: Collection[str] | None = None) -> dict[str, list[bytes] | np.ndarray]:
    """The features of a serialised Example.

    Args:
      data: one record.
      wanted: only these names; None: all. What is not wanted is passed over, not copied.
    Returns:
      {name: list of bytes, or (n) float32, or (n) int64}; an empty feature is an empty list.
    Raises:
      BadExample: cut short, or something else.
    """
    view = memoryview(data)
    found: dict[str, list[bytes] | np.ndarray] = {}
    for _, features in _fields(view, {1: 2}):
        for _, entry in _fields(features, {1: 2}):
            name, value = None, memoryview(b"")
            for number, part in _fields(entry, {1: 2, 2: 2}):
                if number == 1:
                    name = bytes(part).decode("utf-8", "replace")
                else:
                    value = part
            if name is not None and (wanted is None or name in wanted):
                found[name] = _feature(value)
    return found


def _feature(view: memoryview) -> list[bytes] | np.ndarray:
    for kind, values in _fields(view, {1: 2, 2: 2, 3: 2}):
        if kind == 1:
            return [bytes(value) for _, value in _fields(values, {1: 2})]
        if kind == 2:
            return np.concatenate(
                [np.frombuffer(_whole(v, 4), "<f4") for _, v in _fields(values, {1: (2, 5)})] or [_NONE]
            )
        return np.array([i for _, v in _fields(values, {1: (2, 0)}) for i in _integers(v)], np.int64)
    return []


_NONE = np.zeros(0, np.float32)


def _whole(view: memoryview, size: int) -> memoryview:
    if len(view) % size:
        raise BadExample("a packed list is cut short")
    return view


def _integers(view: memoryview) -> Iterator[int]:
    position = 0
    while position < len(view):
        value, position = _varint(view, position)
        yield value - (1 << 64) if value >> 63 else value


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(view) and shift < 70:
        byte = view[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise BadExample("a number is cut short")


def _fields(view: memoryview, known: dict[int, int | tuple[int, ...]]) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the known fields of a message; others are passed over.

    Of a varint field the content is its bytes, so that packed and unpacked lists read alike.
    """
    position = 0
    while position < len(view):
        tag, position = _varint(view, position)
        number, wire = tag >> 3, tag & 7
        start = position
        if wire == 2:
            length, start = _varint(view, position)
            position = start + length
        elif wire == 0:
            _, position = _varint(view, position)
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        else:
            raise BadExample(f"wire type {wire}")
        if position > len(view):
            raise BadExample("a field is cut short")
        expected = known.get(number)
        if expected is None:
            continue
        if wire not in ((expected,) if isinstance(expected, int) else expected):
            raise BadExample(f"field {number} has wire type {wire}")
        yield number, view[start:position]
