"""
Tasks -> threads that wait for them: the helpers of a call that is worth more than one thread.

Helpers are started when first needed and then sleep until they are given a task; they belong to the process,
not to a model. Whoever finds none idle does without: a call is never queued behind another.

Numba's own parallel layers are not used: of those that it brings along, one aborts the process when two
threads enter it at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable

__all__ = ["borrow_helpers", "usable_cores"]


class Helper:
    """A thread that runs one task at a time, and is idle in between."""

    def __init__(self) -> None:
        self._task: Callable[[], None] | None = None
        self._awake = threading.Lock()
        self._awake.acquire()
        self._avoided = -1
        self._thread = threading.Thread(target=self._run, name="nncore-helper", daemon=True)
        self._thread.start()

    def start(self, task: Callable[[], None]) -> None:
        """Run *task*, which must not raise, and be idle again after it. Returns at once."""
        self._task = task
        self._leave_core(_current_core())
        self._awake.release()

    def _leave_core(self, core: int) -> None:
        """
        Keep this helper off *core*, its caller's.

        Linux may wake a thread on the core of the one that wakes it and move it off only milliseconds later:
        8,192 rows of 64-64-32-10 took 1037 us on two threads, 1058 on one; kept apart, 698.
        """
        if core in (self._avoided, -1):
            return
        others = os.sched_getaffinity(0) - {core}
        if others and self._thread.native_id:
            with contextlib.suppress(OSError):  # a sandbox may forbid it: then it is slower
                os.sched_setaffinity(self._thread.native_id, others)
            self._avoided = core

    def _run(self) -> None:
        while True:
            self._awake.acquire()
            task, self._task = self._task, None
            assert task is not None
            task()
            del task
            _idle.append(self)


_idle: list[Helper] = []
_started = 0
_starting = threading.Lock()


def borrow_helpers(count: int) -> list[Helper]:
    """
    Up to *count* idle helpers; each must be given a task.

    There are at most as many in the process as cores that it may use.
    """
    global _started
    helpers: list[Helper] = []
    while len(helpers) < count:
        try:
            helpers.append(_idle.pop())
        except IndexError:
            with _starting:
                if _started >= usable_cores():
                    break
                _started += 1
            helpers.append(Helper())
    return helpers


@functools.cache
def _core_reader() -> Callable[[], int]:
    """What tells the core that a thread runs on, or -1 where that cannot be known."""
    reader = getattr(ctypes.CDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
    return reader or (lambda: -1)


def _current_core() -> int:
    return _core_reader()()


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _forget_helpers() -> None:
    """After a fork the child has none of its parent's threads."""
    global _started, _starting
    _idle.clear()
    _started = 0
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
