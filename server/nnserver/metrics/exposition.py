"""A function that takes a snapshot in, GET /metrics out: Prometheus's text, or OpenMetrics, over HTTP."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6, SHUT_RDWR, socket

from prometheus_client import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from nnserver.errors import ConfigError
from nnserver.metrics.definitions import METRICS, Metric
from nnserver.metrics.snapshot import Sample, Samples, Snapshot
from nnserver.statistics import Distribution

logger = logging.getLogger(__name__)

# Whoever connects and does not get on is let go.
_PATIENCE_S = 10.0
_MOST_CONNECTIONS = 16


def render(snapshot: Snapshot, accept: str = "") -> tuple[bytes, str]:
    """Return *snapshot* in the format that the header *accept* asks for, and its content type."""
    encode, content_type = choose_encoder(accept)
    return encode(_SnapshotCollector(snapshot)), content_type


class _SnapshotCollector(Collector):
    """A snapshot, as prometheus_client wants to be given metrics."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Family]:
        for name, samples in self._snapshot.items():
            yield _family(METRICS[name], samples)


def _family(metric: Metric, samples: Samples) -> Family:
    family = Family(metric.name.removesuffix("_total"), metric.help, metric.type)
    for values, sample in samples.items():
        labels = dict(zip(metric.labels, values, strict=True))
        for suffix, extra, number in _lines(metric, sample):
            family.add_sample(family.name + suffix, labels | extra, number)
    return family


def _lines(metric: Metric, sample: Sample) -> Iterator[tuple[str, dict[str, str], float]]:
    """The samples of one set of labels: a suffix of the name, further labels, a number."""
    if not isinstance(sample, Distribution):
        yield ("_total" if metric.type == "counter" else ""), {}, sample
        return
    count = 0
    for bound, observed in zip((*map(repr, metric.bounds), "+Inf"), sample.counts, strict=True):
        count += observed
        yield "_bucket", {"le": bound}, count
    yield "_count", {}, count
    yield "_sum", {}, sample.sum


class MetricsServer:
    """
    An HTTP server on *listen* (HOST:PORT) that answers GET /metrics with what *take_snapshot* returns.

    Raises ConfigError if it cannot be listened on.
    """

    def __init__(self, listen: str, take_snapshot: Callable[[], Snapshot]) -> None:
        host, _, port = listen.rpartition(":")
        host = host.strip("[]")

        class Handler(_Handler):
            snapshot = staticmethod(take_snapshot)

        class Server(_Server):
            address_family = AF_INET6 if ":" in host else AF_INET

        try:
            self._server = Server((host, int(port)), Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {listen} for metrics: {error.strerror}") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="nnserver-metrics", daemon=True
        )
        self.address = f"{listen.rpartition(':')[0]}:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()
        logger.info("metrics on http://%s/metrics", self.address)

    def stop(self) -> None:
        if self._thread.is_alive():  # Else it was never started, and shutdown would wait for ever.
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """
    One thread a connection, and not more than a few: the oldest makes way for one more.

    To refuse the newest instead would let a few peers that send a byte every now and then keep scrapers out.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._lock = threading.Lock()
        # In order of arrival.
        self._open: dict[socket, None] = {}
        super().__init__(address, handler)

    def process_request(self, request: socket, client_address: object) -> None:  # type: ignore[override]
        with self._lock:
            if len(self._open) >= _MOST_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):  # Its peer may have gone.
                    oldest.shutdown(SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    def process_request_thread(self, request: socket, client_address: object) -> None:  # type: ignore[override]
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.pop(request, None)

    def handle_error(self, request: object, client_address: object) -> None:
        logger.info("a connection for metrics failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """GET /metrics; nothing else is here."""

    snapshot: Callable[[], Snapshot]
    timeout = _PATIENCE_S
    protocol_version = "HTTP/1.1"
    server_version = "nnserver"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self._answer(404, b"only /metrics is here\n", "text/plain")
            return
        try:
            body, content_type = render(self.snapshot(), self.headers.get("Accept", ""))
        except Exception:
            logger.exception("cannot collect metrics")
            self._answer(500, b"internal error; the server's log has the details\n", "text/plain")
            return
        self._answer(200, body, content_type)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug(format, *args)

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
