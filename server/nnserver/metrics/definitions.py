"""Every metric: its name, type, labels and meaning, and how the numbers of several processes become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nnserver.statistics import ROWS, SECONDS

_MODEL = ("model", "version")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. *merge*: what several processes' numbers of it become."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    merge: Literal["sum", "max", "min"] = "sum"
    # Upper bounds of a histogram's buckets, but for the last one.
    bounds: tuple[float, ...] = ()


def _times(name: str, help_: str) -> Metric:
    return Metric(name, "histogram", _MODEL, help_, bounds=SECONDS)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "nnserve_requests_total",
            "counter",
            (*_MODEL, "kind", "status"),
            "Requests, of streams too, by what became of them; no model: none that is served was named",
        ),
        Metric("nnserve_rows_total", "counter", _MODEL, "Rows that were computed"),
        Metric(
            "nnserve_batch_rows",
            "histogram",
            _MODEL,
            "Rows of a batch, which is one run of the kernel",
            bounds=tuple(map(float, ROWS)),
        ),
        _times("nnserve_decode_seconds", "Time to decode a request; those of one tick: their mean"),
        _times("nnserve_queue_seconds", "Time that a request waited for its batch"),
        _times("nnserve_compute_seconds", "Time that the kernel took for a batch"),
        _times("nnserve_encode_seconds", "Time to encode a batch's answers and to hand them over"),
        Metric("nnserve_requests_in_flight", "gauge", _MODEL, "Requests that wait or are being computed"),
        Metric("nnserve_queue_requests", "gauge", _MODEL, "Requests that wait"),
        Metric("nnserve_queue_rows", "gauge", _MODEL, "Rows of the requests that wait"),
        Metric(
            "nnserve_queue_limit_requests", "gauge", _MODEL, "Requests that may wait (max_queue_requests)"
        ),
        Metric(
            "nnserve_model_served", "gauge", _MODEL, "1 for each model version that is served", merge="max"
        ),
        Metric(
            "nnserve_model_loads_total",
            "counter",
            ("model", "result"),
            "Loads of a model: loaded or failed; and unloads: unloaded",
        ),
        Metric("nnserve_connections", "gauge", (), "Connections that are open"),
        Metric("nnserve_open_streams", "gauge", (), "Streams that are open"),
        Metric(
            "nnserve_errors_total",
            "counter",
            ("status",),
            "Errors that clients were told, of calls of any method and of requests of streams",
        ),
        Metric("nnserve_ready", "gauge", (), "1 while requests are taken, 0 when draining", merge="min"),
        Metric("nnserve_build_info", "gauge", ("version", "transport"), "1; what is running", merge="max"),
        # Of the process; Prometheus's own names.
        Metric("process_cpu_seconds_total", "counter", (), "Processor time, user and system, in seconds"),
        Metric("process_resident_memory_bytes", "gauge", (), "Resident memory, in bytes"),
        Metric("process_virtual_memory_bytes", "gauge", (), "Virtual memory, in bytes"),
        Metric("process_open_fds", "gauge", (), "Open file descriptors"),
        Metric("process_max_fds", "gauge", (), "File descriptors that may be open", merge="min"),
        Metric(
            "process_start_time_seconds", "gauge", (), "When the process began, since the epoch", merge="min"
        ),
    )
}
