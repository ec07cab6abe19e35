"""
Snapshots in, their sum out: the metrics of a process at one moment, as plain numbers.

A snapshot holds the samples of each metric by the values of its labels. Several processes' can be added up,
and bytes carry one from a process to another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nnserver.metrics.definitions import METRICS
from nnserver.statistics import Distribution

Labels = tuple[str, ...]
Sample = float | Distribution
Samples = Mapping[Labels, Sample]
Snapshot = Mapping[str, Samples]

_MERGE: dict[str, Callable[[Iterable[Any]], Any]] = {"max": max, "min": min}


def add(snapshots: Iterable[Snapshot]) -> dict[str, dict[Labels, Sample]]:
    """Return the metrics of all *snapshots* as one: sums, but for what says otherwise in METRICS."""
    total: dict[str, dict[Labels, Sample]] = {}
    for snapshot in snapshots:
        for name, samples in snapshot.items():
            merged = total.setdefault(name, {})
            for labels, sample in samples.items():
                merged[labels] = _merge(name, merged[labels], sample) if labels in merged else sample
    return total


def add_distributions(one: Distribution, other: Distribution) -> Distribution:
    """Return the observations of both, which have the same buckets."""
    counts = tuple(a + b for a, b in zip(one.counts, other.counts, strict=True))
    return Distribution(counts, one.sum + other.sum)


def encode(snapshot: Snapshot) -> bytes:
    """Return *snapshot* as bytes (JSON)."""
    return json.dumps(
        {
            name: [
                [labels, [sample.counts, sample.sum] if isinstance(sample, Distribution) else sample]
                for labels, sample in samples.items()
            ]
            for name, samples in snapshot.items()
        }
    ).encode()


def decode(data: bytes) -> dict[str, dict[Labels, Sample]]:
    """Return the snapshot that *encode* made *data* of."""
    return {
        name: {
            tuple(labels): Distribution(tuple(value[0]), value[1]) if isinstance(value, list) else value
            for labels, value in samples
        }
        for name, samples in json.loads(data).items()
    }


def _merge(name: str, one: Sample, other: Sample) -> Sample:
    if isinstance(one, Distribution) and isinstance(other, Distribution):
        return add_distributions(one, other)
    merge = METRICS[name].merge
    if isinstance(one, Distribution) or isinstance(other, Distribution):
        raise ValueError(f"{name} is a histogram in one snapshot and a number in the other")
    return one + other if merge == "sum" else _MERGE[merge]((one, other))
