"""
Files in, an action when they have changed: looks at them every few moments.

A change is acted on when two looks have seen the same, so that a key is not read before its certificate.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from nnserver.errors import ConfigError

logger = logging.getLogger(__name__)

# What a file is known by; None if it cannot be looked at.
Stamp = tuple[int, int, int] | None


class FileWatch:
    """Calls *action* when one of *paths*, asked for anew at each look, has changed and then stood still."""

    def __init__(self, what: str, paths: Callable[[], Sequence[str]], action: Callable[[], None]) -> None:
        self._what = what
        self._paths = paths
        self._action = action
        self._acted = self._seen = self._stamps()

    def look(self) -> None:
        """Look once. What the action refuses is logged, and tried again when the files change again."""
        seen, self._seen = self._seen, self._stamps()
        if self._seen != seen or seen == self._acted:
            return
        self._acted = seen
        try:
            self._action()
        except ConfigError as error:
            logger.error("%s not reloaded, those before stay in use: %s", self._what, error)
        except Exception:
            logger.exception("internal error while %s were reloaded", self._what)

    def _stamps(self) -> list[tuple[str, Stamp]]:
        return [(path, _stamp(path)) for path in self._paths()]


class Watch(Protocol):
    """What is to be looked at again and again."""

    def look(self) -> None: ...


class FileWatcher:
    """
    Looks at all *watches* every *interval_s* seconds, in a thread of its own, if there are any.

    what: what a log calls that which is watched.  name: of the thread.
    """

    def __init__(
        self, watches: Sequence[Watch], interval_s: float, what: str = "files", name: str = "nnserver-files"
    ) -> None:
        self._watches = watches
        self._what = what
        self._interval_s = interval_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True) if watches else None

    def start(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def stop(self) -> None:
        """End; what is being done about a change is waited for."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._interval_s):
            for watch in self._watches:
                try:
                    watch.look()
                except Exception:
                    logger.exception("internal error while looking for changed %s", self._what)


def _stamp(path: str) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
