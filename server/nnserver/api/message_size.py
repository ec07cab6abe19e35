"""Bytes that a message has, or would have -> nothing, or the error that names the limit."""

from __future__ import annotations

from nnserver.errors import MessageTooLarge

# Bytes of an answer besides its rows, id and names, at most: versions, shapes, the tensors' heads.
_ENVELOPE_BYTES = 256


def check_message_size(size: int, limit: int) -> None:
    """Raise MessageTooLarge if a message of *size* bytes is more than this server takes."""
    if size > limit:
        raise MessageTooLarge(
            f"the message has {size} bytes; this server takes {limit} (max_message_bytes, "
            "--max-message-bytes); send fewer rows a message"
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
