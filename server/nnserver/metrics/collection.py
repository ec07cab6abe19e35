"""The server's rooms in, a snapshot of all metrics out: all is looked up when asked, nothing before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prometheus_client import ProcessCollector

from nnserver import __version__
from nnserver.catalog import Catalog
from nnserver.errors import errors_told
from nnserver.metrics.definitions import METRICS
from nnserver.metrics.model_history import ModelHistory
from nnserver.metrics.snapshot import Labels, Sample
from nnserver.repository import Repository
from nnserver.request_watch import RequestWatch
from nnserver.transport.load import TransportLoad


class Transport(Protocol):
    """What metrics ask of a transport."""

    def load(self) -> TransportLoad: ...


class Metrics:
    """
    The metrics of one process: *snapshot* takes them.

    transport_name: which one is running.  is_ready: whether requests are taken.
    """

    def __init__(
        self,
        repository: Repository,
        catalog: Catalog,
        watch: RequestWatch,
        transport: Transport,
        transport_name: str,
        is_ready: Callable[[], bool],
    ) -> None:
        self._repository = repository
        self._catalog = catalog
        self._watch = watch
        self._transport = transport
        self._transport_name = transport_name
        self._is_ready = is_ready
        self._history = ModelHistory(repository)
        # Registered nowhere: it is only asked what it knows.
        self._process = ProcessCollector(registry=None)

    def snapshot(self) -> dict[str, dict[Labels, Sample]]:
        """Return all metrics as they are now."""
        return {
            **self._of_models(),
            "nnserve_model_served": {(model.name, model.version): 1.0 for model in self._repository},
            "nnserve_model_loads_total": {
                (name, change.value): float(count)
                for (name, change), count in self._catalog.changes().items()
            },
            **self._of_transport(),
            "nnserve_errors_total": {(status.name,): float(count) for status, count in errors_told().items()},
            "nnserve_ready": {(): float(self._is_ready())},
            "nnserve_build_info": {(__version__, self._transport_name): 1.0},
            **self._of_process(),
        }

    def _of_models(self) -> dict[str, dict[Labels, Sample]]:
        samples: dict[str, dict[Labels, Sample]] = {
            name: {} for name, metric in METRICS.items() if metric.labels[:2] == ("model", "version")
        }
        for key, batchers in self._history.batchers().items():
            samples["nnserve_requests_in_flight"][key] = sum(map(len, batchers)) + sum(
                statistics.running() for statistics in {batcher.statistics for batcher in batchers}
            )
            samples["nnserve_queue_requests"][key] = sum(map(len, batchers))
            samples["nnserve_queue_rows"][key] = sum(batcher.waiting_rows for batcher in batchers)
            samples["nnserve_queue_limit_requests"][key] = batchers[-1].limits.max_requests
        requests: dict[Labels, float] = {}
        for (model, version, kind, status), count in self._watch.refusals().items():
            requests[model, version, kind, status.name] = count
        for key, details in self._history.details().items():
            for (kind, status), count in details.outcomes.items():
                labels = (*key, kind, status.name)
                requests[labels] = requests.get(labels, 0) + count
            samples["nnserve_rows_total"][key] = details.batch_rows.sum
            samples["nnserve_batch_rows"][key] = details.batch_rows
            samples["nnserve_decode_seconds"][key] = details.decode
            samples["nnserve_queue_seconds"][key] = details.queue
            samples["nnserve_compute_seconds"][key] = details.compute
            samples["nnserve_encode_seconds"][key] = details.encode
        samples["nnserve_requests_total"].update(requests)
        return samples

    def _of_transport(self) -> dict[str, dict[Labels, Sample]]:
        load = self._transport.load()
        return {
            "nnserve_connections": {(): load.connections},
            "nnserve_open_streams": {(): load.streams},
        }

    def _of_process(self) -> dict[str, dict[Labels, Sample]]:
        return {
            sample.name: {(): float(sample.value)}
            for family in self._process.collect()
            for sample in family.samples
            if sample.name in METRICS
        }
