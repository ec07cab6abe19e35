"""
Name and version in, served model out: the models being served.

A look-up takes no lock: a name's versions are one object, replaced as a whole. Who has looked a model up
keeps it until its answer is made, whatever is put in its place meanwhile; then its memory is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from nnserver.errors import NotFound
from nnserver.model_folder import quoted
from nnserver.served_model import ServedModel

__all__ = ["Repository", "ServedModel"]

# A gRPC status text is a header: with much more than 8 KiB of them, clients give up the call.
_NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class _Versions:
    """The versions of one name."""

    default: ServedModel
    by_version: dict[str, ServedModel]


class Repository:
    """The models being served, by name and version. Methods may be called from any thread."""

    def __init__(self, models: Iterable[ServedModel] = ()) -> None:
        self._names: dict[str, _Versions] = {}
        # Grows after every change: what was looked up before may not be what is served any more.
        self.generation = 0
        self._watchers: list[Callable[[], None]] = []
        by_name: dict[str, list[ServedModel]] = {}
        for model in models:
            by_name.setdefault(model.name, []).append(model)
        for versions in by_name.values():
            self.put(versions)

    def __iter__(self) -> Iterator[ServedModel]:
        """All versions of all names, sorted by both."""
        for name in self.names():
            yield from self.versions(name)

    def get(self, name: str, version: str = "") -> ServedModel:
        """Return the model; without a version, its default one. Raises NotFound, naming what there is."""
        versions = self._names.get(name)
        if versions is None:
            if not name:
                raise NotFound(f"no model was named; this server has {self._list_names()}")
            raise NotFound(f"unknown model {quoted(name)}; this server has {self._list_names()}")
        if not version:
            return versions.default
        model = versions.by_version.get(version)
        if model is None:
            there = _listed([f"'{model.version}'" for model in _ascending(versions)])
            raise NotFound(f"model '{name}' has no version {quoted(version)}; it has version {there}")
        return model

    def has(self, name: str) -> bool:
        return name in self._names

    def names(self) -> list[str]:
        """Return the names of all models, sorted."""
        return sorted(self._names.copy())

    def versions(self, name: str) -> list[ServedModel]:
        """Return the versions of *name*, ascending; empty if it is not served."""
        versions = self._names.get(name)
        return [] if versions is None else _ascending(versions)

    def put(self, models: Sequence[ServedModel]) -> None:
        """Serve *models*, all of one name, in place of what the name had; the last is the default."""
        default = models[-1]
        self._names[default.name] = _Versions(default, {model.version: model for model in models})
        self._note_change()

    def remove(self, name: str) -> None:
        """Serve *name* no longer."""
        self._names.pop(name, None)
        self._note_change()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call *watcher* after every change, in the thread that made it."""
        self._watchers.append(watcher)

    def _note_change(self) -> None:
        self.generation += 1
        for watcher in self._watchers:
            watcher()

    def _list_names(self) -> str:
        return _listed([f"'{name}'" for name in self.names()]) or "no models"


def _ascending(versions: _Versions) -> list[ServedModel]:
    return sorted(versions.by_version.values(), key=lambda model: int(model.version))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
