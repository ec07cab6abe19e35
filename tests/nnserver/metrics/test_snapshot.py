"""Snapshots: what adding them up makes of each metric, and their way through bytes."""

import pytest

from nnserver.metrics.definitions import METRICS
from nnserver.metrics.snapshot import Snapshot, add, decode, encode
from nnserver.statistics import Distribution

ONE: Snapshot = {
    "nnserve_requests_total": {("iris", "1", "predict", "OK"): 3.0},
    "nnserve_queue_seconds": {("iris", "1"): Distribution((1, 0, 2), 0.5)},
    "nnserve_ready": {(): 1.0},
    "nnserve_model_served": {("iris", "1"): 1.0},
    "process_start_time_seconds": {(): 100.0},
}
OTHER: Snapshot = {
    "nnserve_requests_total": {("iris", "1", "predict", "OK"): 4.0, ("", "", "infer", "NOT_FOUND"): 1.0},
    "nnserve_queue_seconds": {("iris", "1"): Distribution((0, 5, 1), 0.25)},
    "nnserve_ready": {(): 0.0},
    "nnserve_model_served": {("iris", "1"): 1.0, ("rose", "2"): 1.0},
    "process_start_time_seconds": {(): 99.0},
}


def test_counters_and_histograms_are_summed_and_the_rest_as_defined():
    """Two workers: requests and buckets add up; served is served; ready only if both are."""
    assert add([ONE, OTHER]) == {
        "nnserve_requests_total": {
            ("iris", "1", "predict", "OK"): 7.0,
            ("", "", "infer", "NOT_FOUND"): 1.0,
        },
        "nnserve_queue_seconds": {("iris", "1"): Distribution((1, 5, 3), 0.75)},
        "nnserve_ready": {(): 0.0},
        "nnserve_model_served": {("iris", "1"): 1.0, ("rose", "2"): 1.0},
        "process_start_time_seconds": {(): 99.0},
    }


def test_adding_changes_neither_and_nothing_adds_nothing():
    before = encode(ONE), encode(OTHER)
    add([ONE, OTHER, ONE])
    assert (encode(ONE), encode(OTHER)) == before
    assert add([ONE]) == ONE
    assert add([]) == {}
    assert add([{}, ONE]) == ONE


def test_bytes_carry_a_snapshot():
    for snapshot in (ONE, OTHER, {}):
        assert decode(encode(snapshot)) == snapshot


def test_a_histogram_is_not_added_to_a_number():
    with pytest.raises(ValueError, match="nnserve_ready is a histogram in one snapshot"):
        add([{"nnserve_ready": {(): 1.0}}, {"nnserve_ready": {(): Distribution((1,), 1.0)}}])


def test_every_metric_is_named_as_prometheus_wants_it():
    """Counters end in _total, times in _seconds, sizes in _bytes; buckets ascend."""
    for metric in METRICS.values():
        assert metric.name.startswith(("nnserve_", "process_"))
        assert metric.name.endswith("_total") == (metric.type == "counter")
        assert (metric.type == "histogram") == bool(metric.bounds)
        assert list(metric.bounds) == sorted(set(metric.bounds))
        assert not metric.help.endswith(".")
