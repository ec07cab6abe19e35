"""Bytes that a message has, or would have -> nothing, or the error that names the limit."""

from __future__ import annotations

from nnserver.errors import InvalidArgument, MessageTooLarge

# What a request may have beside its numbers, and what a number takes at most: a varint has ten bytes.
_BALLAST_BYTES = 64 << 10
_NUMBER_BYTES = 10
# Bytes of an answer besides its rows, id and names, at most: versions, shapes, the tensors' heads.
_ENVELOPE_BYTES = 256


def check_message_size(size: int, limit: int) -> None:
    """Raise MessageTooLarge if a message of *size* bytes is more than this server takes."""
    if size > limit:
        raise MessageTooLarge(
            f"the message has {size} bytes; this server takes {limit} (max_message_bytes, "
            "--max-message-bytes); send fewer rows a message"
        )


def check_ballast(size: int, numbers: int) -> None:
    """
    Raise InvalidArgument if a message of *size* bytes is far more than its *numbers* take.

    A stream holds its requests until they are answered, and a queue counts rows only: with a megabyte of
    unknown fields each, requests of one row would fill the memory while a model is busy.
    """
    if size > _BALLAST_BYTES + numbers * _NUMBER_BYTES:
        raise InvalidArgument(
            f"the message has {size} bytes for {numbers} numbers; expected at most {_NUMBER_BYTES} a number, "
            f"and {_BALLAST_BYTES} for names, id and parameters"
        )


def check_answer_size(rows: int, row_bytes: int, other_bytes: int, limit: int) -> None:
    """
    Raise MessageTooLarge if the answer would be more than this server sends.

    Before it is computed: a small request can ask for a large answer.
    """
    size = rows * row_bytes + other_bytes + _ENVELOPE_BYTES
    if size > limit:
        raise MessageTooLarge(
            f"the answer to {rows} rows would have about {size} bytes; this server sends {limit} "
            "(max_message_bytes, --max-message-bytes); send fewer rows a message"
        )
