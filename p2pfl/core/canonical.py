"""One encoding of plain values to bytes, for hashing and signing; it is never decoded.

Each value is `tag | length (8 bytes, big endian) | content`, so no two different values share an encoding: a list
cannot be mistaken for its flattened self, nor `"1"` for `1`. Tables are encoded in the order of their keys.
"""

import struct
from collections.abc import Mapping, Sequence

Value = None | bool | int | float | str | bytes | Sequence["Value"] | Mapping[str, "Value"]


def canonical(value: Value) -> bytes:
    """Encode `value`.

    Raises:
        TypeError: a value of another type is in it.
    """
    tag, content = _content(value)
    return tag + len(content).to_bytes(8, "big") + content


def _content(value: Value) -> tuple[bytes, bytes]:
    match value:
        case None:
            return b"n", b""
        case bool():
            return b"t", bytes([value])
        case int():
            return b"i", str(value).encode()
        case float():
            return b"f", struct.pack(">d", value)
        case str():
            return b"s", value.encode()
        case bytes():
            return b"b", value
        case Mapping():
            return b"m", b"".join(canonical(key) + canonical(value[key]) for key in sorted(value))
        case list() | tuple():
            return b"l", b"".join(map(canonical, value))
    raise TypeError(f"no canonical encoding for {type(value).__name__}")
