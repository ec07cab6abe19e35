"""A tensor's shape -> text for an error message."""

from __future__ import annotations


def shape_text(shape: tuple[int, ...]) -> str:
    """Return the shape as Python writes it, cut short: a client chooses its length."""
    return (
        str(shape) if len(shape) <= 8 else f"({', '.join(map(str, shape[:8]))}, ...: {len(shape)} dimensions)"
    )
