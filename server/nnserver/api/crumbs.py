"""
A message's bytes in, nothing out unless parsing them would take far more than they are.

A parser makes an object of 80 bytes of a submessage of two: 16 MiB of those took 1.5 s, in which nobody else
was answered, and 704 MiB. An honest large message is a few fields, most of them numbers in one piece.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from nnserver.errors import InvalidArgument

# Parsed in 6 ms, whatever is in it.
UNCHECKED_BYTES = 64 << 10
MOST_FIELDS = 20_000
# Bytes of a shape: more dimensions than a tensor has.
MOST_SHAPE_BYTES = 1 << 10

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES = 10


def refuse_crumbs(kind: type[Message], message: bytes) -> None:
    """
    Raise InvalidArgument if a large *message* of *kind* has more than MOST_FIELDS, in all its submessages.

    Bytes that are no message of *kind* may pass: to say so is the parser's part.
    """
    if len(message) <= UNCHECKED_BYTES:
        return
    left = MOST_FIELDS
    waiting: list[tuple[Any, int, int]] = [(kind.DESCRIPTOR, 0, len(message))]
    while waiting:
        descriptor, at, end = waiting.pop()
        submessages, shapes = _fields_of(descriptor)
        while at < end:
            left -= 1
            if not left:
                raise InvalidArgument(
                    f"the message's {len(message)} bytes are more than {MOST_FIELDS} fields; "
                    "send a tensor's numbers as bytes, or packed"
                )
            tag, at = _read_varint(message, at, end)
            wire, number = tag & 7, tag >> 3
            if wire == _VARINT:
                _, at = _read_varint(message, at, end)
            elif wire == _BYTES:
                size, at = _read_varint(message, at, end)
                if number in submessages:
                    waiting.append((submessages[number], at, min(at + size, end)))
                elif number in shapes and size > MOST_SHAPE_BYTES:
                    raise InvalidArgument(f"a shape takes {size} bytes; expected one or two dimensions")
                at += size
            elif wire == _FIXED64:
                at += 8
            elif wire == _FIXED32:
                at += 4
            # The others begin and end groups, whose fields are counted like any.


@lru_cache(maxsize=256)
def _fields_of(descriptor: Any) -> tuple[dict[int, Any], frozenset[int]]:
    """Return the fields of a message that are messages, and those that are shapes, by their numbers."""
    submessages = {
        field.number: field.message_type
        for field in descriptor.fields
        if field.type == FieldDescriptor.TYPE_MESSAGE
    }
    return submessages, frozenset(field.number for field in descriptor.fields if field.name == "shape")


def _read_varint(message: bytes, at: int, end: int) -> tuple[int, int]:
    """Return the number at message[at], and where it ends; at *end* if it does not end before."""
    value = shift = 0
    for at in range(at, min(at + _VARINT_BYTES, end)):  # noqa: B020 - from where it was
        digit = message[at]
        value |= (digit & 127) << shift
        if digit < 128:
            return value, at + 1
        shift += 7
    return value, end
