"""
Ctrl-C -> the end of the process with status 130, after what must not be left behind is cleaned up.

Without an exception: KeyboardInterrupt can strike while gRPC, in the same thread, is between
taking or giving back a lock and noting so. One in ten, sent just when a request was, ended in a
RuntimeError from the lock, or in a channel that waited for ever to be closed.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

STATUS = 130

_cleanups: list[Callable[[], object]] = []


@contextlib.contextmanager
def cleaned_up_on_interrupt(cleanup: Callable[[], object]) -> Iterator[None]:
    """Have *cleanup* called if Ctrl-C ends the process within the block; what it raises is ignored."""
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        _cleanups.remove(cleanup)


@contextlib.contextmanager
def interrupt_ends_process() -> Iterator[None]:
    """Have Ctrl-C do so within the block, unless the caller has other plans for it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def interrupt_ignored() -> Iterator[None]:
    """Ignore Ctrl-C within the block; a process that is started there goes on ignoring it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: object) -> None:
    for cleanup in reversed(_cleanups):
        with contextlib.suppress(Exception):
            cleanup()
    os._exit(STATUS)
