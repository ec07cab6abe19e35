"""
Files in, an action when they have changed: looks at them every few moments, as `reloader` does.

A change is acted on when two looks have seen the same, so that a key is not read before its certificate.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence

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


class FileWatcher:
    """Looks at all *watches* every *interval_s* seconds, in a thread of its own."""

    def __init__(self, watches: Sequence[FileWatch], interval_s: float) -> None:
        self._watches = watches
        self._interval_s = interval_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nnserver-files", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._interval_s):
            for watch in self._watches:
                watch.look()


def _stamp(path: str) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
