"""Message bytes -> where its fields lie, and fields -> bytes: as much of protobuf's wire format as we use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Field(NamedTuple):
    """A field of a message: number, wire type, and where its tag begins, its content begins and it ends."""

    number: int
    kind: int
    start: int
    content: int
    end: int

    @property
    def is_bytes(self) -> bool:
        """Whether it is a string, a message or bytes."""
        return self.kind == _BYTES


def fields(message: bytes, start: int, end: int) -> Iterator[Field]:
    """Yield the fields of the message in message[start:end], which must be valid; ValueError for groups."""
    while start < end:
        tag, content = _read_varint(message, start)
        kind = tag & 7
        if kind == _VARINT:
            stop = _read_varint(message, content)[1]
        elif kind == _BYTES:
            size, content = _read_varint(message, content)
            stop = content + size
        elif kind in (_FIXED64, _FIXED32):
            stop = content + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"field {tag >> 3} is of wire type {kind}")
        yield Field(tag >> 3, kind, start, content, stop)
        start = stop


def bytes_field(number: int, size: int) -> bytes:
    """Return the tag and length of a field of *size* bytes: a string, a message or bytes."""
    return varint(number << 3 | _BYTES) + varint(size)


def varint(value: int) -> bytes:
    """Return *value*, at least 0, in base 128, the lowest digit first."""
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _read_varint(message: bytes, start: int) -> tuple[int, int]:
    """Return the number at message[start] and where it ends."""
    value = shift = 0
    while True:
        digit = message[start]
        start += 1
        value |= (digit & 127) << shift
        if digit < 128:
            return value, start
        shift += 7
