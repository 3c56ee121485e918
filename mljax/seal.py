"""Digests by which a flipped bit in a JSON file, a line of JSON or an .npz is noticed: the content holds its own.

A digest covers the values, not the bytes: a file that was indented anew is still what was saved. Files of a version
that kept no digests have none, and are read as they are.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

KEY = "digest"


class Broken(ValueError):
    """The content does not have the digest that it was sealed with."""


def digest(content: Mapping[str, Any]) -> str:
    """CRC-32 of JSON content without its own digest, as 8 hex digits."""
    rest = {key: value for key, value in content.items() if key != KEY}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON holds it (tuples become lists), with its digest last."""
    plain = json.loads(json.dumps({k: v for k, v in content.items() if k != KEY}))
    return {**plain, KEY: digest(plain)}


def unsealed(content: Mapping[str, Any], *, required: bool = False) -> dict[str, Any]:
    """The content without its digest.

    Args:
      required: whether content without a digest is damaged, rather than of an older version.
    Raises:
      Broken: the digest is another one.
    """
    if KEY not in content and not required:
        for name, value in content.items():  # the flipped bit may be in the digest's own name
            rest = {key: other for key, other in content.items() if key != name}
            if isinstance(value, str) and len(value) == 8 and value == digest(rest):
                raise Broken("its content is not what was saved")
        return dict(content)
    if content.get(KEY) != digest(content):
        raise Broken("its content is not what was saved")
    return {key: value for key, value in content.items() if key != KEY}


def crc(array: np.ndarray) -> str:
    """CRC-32 of the bytes: finds every flipped bit and every burst of up to 32 bits, at more than a GB/s."""
    return (
        f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}" if array.size else "00000000"
    )


def of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """The digest of named arrays: names, dtypes, shapes and bytes."""
    return digest({name: [x.dtype.str, list(x.shape), crc(x)] for name, x in arrays.items() if name != KEY})
