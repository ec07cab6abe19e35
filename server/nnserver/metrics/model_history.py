"""
The models being served in, what each has counted since the process began out, whatever came and went.

A model's statistics begin when it is loaded. Here those of a version that was unloaded or replaced are kept:
once nothing refers to it any more, and nothing can be counted, they are added to what its name and version
had before. So counters never go down.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from nnserver.batcher import Batcher
from nnserver.metrics.snapshot import add_distributions
from nnserver.repository import Repository
from nnserver.statistics import Details, ModelStatistics

# Name and version.
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Followed:
    """The statistics of one load of a model, and whether any request can still be counted in them."""

    statistics: ModelStatistics
    batcher: weakref.ref[Batcher]


class ModelHistory:
    """Details of all models that *repository* serves or has served. Methods may be called from any thread."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._lock = threading.Lock()
        self._followed: dict[Key, list[_Followed]] = {}
        self._past: dict[Key, Details] = {}
        repository.watch(self.note_change)
        self.note_change()

    def note_change(self) -> None:
        """Follow models that are served and were not before."""
        with self._lock:
            for model in self._repository:
                batcher = model.lane.batcher
                loads = self._followed.setdefault((model.name, model.version), [])
                if all(load.statistics is not batcher.statistics for load in loads):
                    loads.append(_Followed(batcher.statistics, weakref.ref(batcher)))
            self._bury()

    def details(self) -> dict[Key, Details]:
        """Return what was counted for each name and version since the process began."""
        with self._lock:
            self._bury()
            return {
                key: _sum(([self._past[key]] if key in self._past else []), loads)
                for key, loads in self._followed.items()
            }

    def batchers(self) -> dict[Key, list[Batcher]]:
        """Return the queues that may hold requests: of models being served, or finishing what they began."""
        with self._lock:
            alive = {
                key: [
                    each
                    for load in loads
                    if (batcher := load.batcher()) is not None
                    for each in (batcher, *batcher.siblings)
                ]
                for key, loads in self._followed.items()
            }
        return {key: batchers for key, batchers in alive.items() if batchers}

    def _bury(self) -> None:
        """Add to the past what nothing can be added to any more."""
        for key, loads in self._followed.items():
            gone = [load for load in loads if load.batcher() is None]
            if gone:
                self._past[key] = _sum([self._past[key]] if key in self._past else [], gone)
                self._followed[key] = [load for load in loads if load not in gone]


def _sum(past: Iterable[Details], loads: Iterable[_Followed]) -> Details:
    total: Details | None = None
    for details in (*past, *(load.statistics.details() for load in loads)):
        total = details if total is None else _add(total, details)
    assert total is not None, "a name is followed from its first load on"
    return total


def _add(one: Details, other: Details) -> Details:
    outcomes = dict(one.outcomes)
    for outcome, count in other.outcomes.items():
        outcomes[outcome] = outcomes.get(outcome, 0) + count
    return Details(
        outcomes=outcomes,
        batch_rows=add_distributions(one.batch_rows, other.batch_rows),
        compute=add_distributions(one.compute, other.compute),
        encode=add_distributions(one.encode, other.encode),
        decode=add_distributions(one.decode, other.decode),
        queue=add_distributions(one.queue, other.queue),
    )
