"""
Changes of files in, loads and unloads out: looks at the repository's folders every few moments.

A change is acted on when two looks, one interval apart, have seen the same: what is still being copied is
left alone. Looking costs a stat a file and works on every file system; notifications do not reach network
mounts, and not the folders through which Kubernetes swaps a volume's files.
"""

from __future__ import annotations

import logging

from nnserver.catalog import Catalog
from nnserver.errors import ConfigError
from nnserver.file_watch import FileWatcher
from nnserver.model_folder import Problem, Stamps

logger = logging.getLogger(__name__)


class Reloader:
    """Keeps what *catalog* serves up to date with its files, in a thread of its own."""

    def __init__(self, catalog: Catalog, interval_s: float) -> None:
        self._catalog = catalog
        self._seen: dict[str, Stamps | Problem] | None = None
        self._trouble = ""
        self._watcher = FileWatcher([self], interval_s, "models", "nnserver-reload")

    def start(self) -> None:
        self._watcher.start()

    def stop(self) -> None:
        """End; a load that is under way is waited for."""
        self._watcher.stop()

    def look(self) -> None:
        """Look at all files; load and unload what has changed and then stood still since the last look."""
        try:
            files = self._catalog.files()
        except (ConfigError, OSError) as error:
            # What is served goes on: a folder that cannot be read is not a folder without models.
            if str(error) != self._trouble:
                self._trouble = str(error)
                logger.error("cannot look for changed models: %s", error)
            return
        self._trouble = ""
        seen, self._seen = self._seen, files
        if seen is None:
            return
        for name in sorted({*files, *self._catalog.names()}):
            now = files.get(name)
            if now == seen.get(name) and not self._catalog.is_current(name, now):
                self._catalog.bring_up_to_date(name)
