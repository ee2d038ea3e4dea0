"""An answer as bytes: JSON, or a header and arrays.

    length of the header, 4 bytes, little endian | header as JSON | spaces up to a multiple of 8 | arrays, each so aligned

The header's `arrays` says of each array its dtype, shape and offset from where arrays begin. Numbers of tables, lines and
matrices travel so: a browser makes typed arrays of them without parsing, and NaN, which JSON does not have, stays NaN.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

_ALIGN = 8


def text(content: Any) -> bytes:
    """As JSON; numbers that are not finite become null."""
    return json.dumps(_finite(content), separators=(",", ":"), default=str).encode()


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """A header and arrays."""
    described: dict[str, Any] = {}
    bodies: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        body = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        described[name] = {"dtype": str(array.dtype), "shape": list(array.shape), "offset": offset}
        bodies.append(_padded(body))
        offset += len(bodies[-1])
    head = text({**header, "arrays": described})
    head += b" " * (-(4 + len(head)) % _ALIGN)
    return struct.pack("<I", len(head)) + head + b"".join(bodies)


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of `pack`, as the pages do it."""
    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    arrays = {
        name: np.frombuffer(data, each["dtype"], math.prod(each["shape"]), 4 + length + each["offset"]).reshape(
            each["shape"]
        )
        for name, each in header.pop("arrays").items()
    }
    return header, arrays


def _padded(body: bytes) -> bytes:
    return body + b"\0" * (-len(body) % _ALIGN)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(name): _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, np.generic):
        return _finite(content.item())
    return content
