"""
A model's name in, the model served or not: loads, reloads and unloads by name while the server runs.

The catalog knows what is on disk and what of it is served. A load replaces a name's versions at once or
not at all: if any file is wrong, what was served goes on being served, and the reason is kept. Versions
whose files have not changed are kept as they are, with their queues and statistics.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from nnserver.batcher import QueueLimits
from nnserver.errors import ConfigError, LoadFailed, NotFound
from nnserver.model_folder import Found, ModelSource, Problem, Stamps, find_models, quoted
from nnserver.model_loader import LoadError, UnsettledError, load_versions
from nnserver.repository import Repository
from nnserver.served_model import ServedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the catalog; *version* is empty if no version of the model is served."""

    name: str
    version: str
    is_ready: bool
    reason: str


class Change(StrEnum):
    """What became of a load, or that there was an unload."""

    LOADED = "loaded"
    FAILED = "failed"
    UNLOADED = "unloaded"


@dataclass(slots=True)
class _Shelf:
    """What the catalog knows of one name."""

    # The files as they were when they were last loaded, or last failed to; by version, and all.
    stamps: Stamps = ()
    version_stamps: dict[str, Stamps] = field(default_factory=dict)
    # Why the last load failed, or why nothing is served.
    reason: str = ""
    is_unloaded: bool = False


class Catalog:
    """
    The models under *paths*, served through *repository*.

    Methods may be called from any thread; loads and unloads are done one after the other.
    """

    def __init__(
        self,
        paths: Sequence[str],
        limits: QueueLimits,
        repository: Repository,
        *,
        detailed_statistics: bool = False,
    ) -> None:
        self._paths = tuple(paths)
        self._limits = limits
        self._repository = repository
        self._detailed_statistics = detailed_statistics
        self._shelves: dict[str, _Shelf] = {}
        # What was done, and how often, by name: only of names that are on disk.
        self._changes: Counter[tuple[str, Change]] = Counter()
        self._lock = threading.Lock()

    def load_all(self, may_be_empty: bool = False) -> None:
        """
        Load every model there is, and run each once, so that the first request is fast.

        Raises ConfigError, naming the file and what is wrong with it.
        """
        with self._lock:
            try:
                found = find_models(self._paths)
            except OSError as error:
                raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
            for problem in found.problems.values():
                raise ConfigError(problem.text)
            if not found.sources and not may_be_empty:
                raise ConfigError(
                    f"{' and '.join(self._paths)} has no model in it (NAME.safetensors, NAME.onnx or "
                    "NAME/VERSION/model.safetensors)"
                )
            for source in found.sources.values():
                try:
                    self._load(source)
                except LoadError as error:
                    raise ConfigError(str(error)) from error

    def load(self, name: str) -> None:
        """
        Load *name*, or load it anew.

        Raises NotFound if there is no such model, LoadFailed, saying why, if it cannot be served; what was
        served before goes on being served.
        """
        with self._lock:
            self._load_name(name)

    def unload(self, name: str) -> None:
        """Serve *name* no longer, until it is loaded again. Raises NotFound if it is not served."""
        with self._lock:
            if not self._repository.has(name):
                raise NotFound(f"no model {quoted(name)} is being served")
            self._unload(name, _Shelf(reason="unloaded", is_unloaded=True))

    def look_again(self, paths: Sequence[str]) -> None:
        """
        Load, reload and unload until that is served which lies under *paths*; what fails stays as it was.

        What a client has unloaded stays so. Raises ConfigError or OSError, and changes nothing, if *paths*
        cannot be read.
        """
        find_models(paths, may_be_gone=True)
        self._paths = tuple(paths)
        files = self.files()
        for name in sorted({*files, *self.names()}):
            if not self.is_current(name, files.get(name)):
                self.bring_up_to_date(name)

    def names(self) -> list[str]:
        """Return the names of the models that are served."""
        return self._repository.names()

    def changes(self) -> dict[tuple[str, Change], int]:
        """Return how often each model was loaded, unloaded, or failed to load."""
        return dict(self._changes)

    def files(self) -> dict[str, Stamps | Problem]:
        """Return the state of the files of each name on disk; raises OSError if a folder cannot be read."""
        found = find_models(self._paths, may_be_gone=True)
        return {name: source.stamps() for name, source in found.sources.items()} | found.problems

    def is_current(self, name: str, files: Stamps | Problem | None) -> bool:
        """Whether *files*, one of files() or None for a name that is gone, asks for nothing to be done."""
        shelf = self._shelves.get(name)
        if shelf is not None and shelf.is_unloaded:
            return True
        if files is None:
            return not self._repository.has(name)
        if isinstance(files, Problem):
            return shelf is not None and shelf.reason == files.reason
        return shelf is not None and shelf.stamps == files

    def bring_up_to_date(self, name: str) -> None:
        """Load *name* as it is on disk, or unload it if it is gone; what fails is logged and kept."""
        with self._lock:
            shelf = self._shelves.get(name)
            if shelf is not None and shelf.is_unloaded:
                return  # By a client, meanwhile.
            try:
                self._load_name(name)
            except NotFound:
                if self._repository.has(name):
                    self._unload(name, _Shelf(reason="its files are gone"))
            except LoadFailed:
                pass  # It was logged, and the index has it.

    def index(self) -> list[IndexEntry]:
        """Return what is served, and what else is on disk with the reason why it is not."""
        with self._lock:
            try:
                found = self._find()
            except LoadFailed:
                found = Found()  # What is served can be told all the same.
            entries = []
            for name in sorted({*found.sources, *found.problems, *self._repository.names()}):
                shelf = self._shelves.get(name, _Shelf())
                problem = found.problems.get(name)
                reason = shelf.reason or (problem.reason if problem else "")
                served = self._repository.versions(name)
                if served:
                    entries += [IndexEntry(name, model.version, True, reason) for model in served]
                else:
                    entries.append(IndexEntry(name, "", False, reason or "not loaded"))
            return entries

    def _find(self) -> Found:
        try:
            return find_models(self._paths, may_be_gone=True)
        except (ConfigError, OSError) as error:
            logger.error("cannot look for models: %s", error)
            raise LoadFailed("the repository cannot be read; the server's log has the details") from error

    def _load_name(self, name: str) -> None:
        found = self._find()
        source = found.sources.get(name)
        if source is None:
            problem = found.problems.get(name)
            if problem is None:
                raise NotFound(f"the repository has no model {quoted(name)}")
            self._shelves.setdefault(name, _Shelf()).stamps = ()
            raise self._failed(name, problem.reason, problem.text)
        try:
            self._load(source)
        except Exception as error:
            raise self._failed(name, *_reason_and_text(error)) from error
        return_memory()

    def _load(self, source: ModelSource) -> None:
        name = source.name
        shelf = self._shelves.setdefault(name, _Shelf())
        stamps = source.stamps()
        version_stamps = {str(version): source.version_stamps(version) for version in source.versions}
        try:
            models = load_versions(
                source,
                self._limits,
                self._unchanged(name, shelf, version_stamps),
                detailed_statistics=self._detailed_statistics,
            )
        except UnsettledError:
            raise  # And so it is not known: it asks to be loaded again.
        except Exception:
            shelf.stamps = stamps
            raise
        self._repository.put(models)
        self._changes[name, Change.LOADED] += 1
        self._shelves[name] = _Shelf(stamps, version_stamps)

    def _unchanged(
        self, name: str, shelf: _Shelf, version_stamps: dict[str, Stamps]
    ) -> dict[str, ServedModel]:
        return {
            model.version: model
            for model in self._repository.versions(name)
            if shelf.version_stamps.get(model.version) == version_stamps.get(model.version)
        }

    def _unload(self, name: str, shelf: _Shelf) -> None:
        self._shelves[name] = shelf
        self._repository.remove(name)
        self._changes[name, Change.UNLOADED] += 1
        logger.info("model unloaded name=%s reason=%s", name, shelf.reason)
        return_memory()

    def _failed(self, name: str, reason: str, text: str) -> LoadFailed:
        """Note why *name* cannot be loaded, and return that as an error for a client."""
        self._changes[name, Change.FAILED] += 1
        served = ", ".join(f"'{model.version}'" for model in self._repository.versions(name))
        self._shelves.setdefault(name, _Shelf()).reason = reason
        logger.error("model not loaded name=%s still_served=%s: %s", name, served or "nothing", text)
        still = f"; version {served} is still served" if served else ""
        return LoadFailed(f"model '{name}' cannot be loaded: {reason}{still}")


def load_repository(paths: Sequence[str], limits: QueueLimits, may_be_empty: bool = False) -> Repository:
    """Return all models under *paths*, loaded and warm; raises ConfigError, naming the file that is wrong."""
    repository = Repository()
    Catalog(paths, limits, repository).load_all(may_be_empty)
    return repository


def _reason_and_text(error: Exception) -> tuple[str, str]:
    if isinstance(error, LoadError):
        return error.reason, str(error)
    logger.exception("internal error while a model was loaded")
    return "internal error; the server's log has the details", repr(error)


def return_memory() -> None:
    """
    Give what a model occupied back to the system.

    A model's arrays are freed with the last request that uses it, but glibc keeps what it was given back, up
    to 32 MiB an array, for itself.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc: Any = ctypes.CDLL(None)
            libc.malloc_trim(0)
