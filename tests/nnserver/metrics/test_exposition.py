"""MetricsServer and render: what a scraper reads, in both formats, and what is refused."""

import contextlib
import socket
import urllib.error
import urllib.request

import pytest
from support.prometheus import parse, scrape

from nnserver.errors import ConfigError
from nnserver.metrics.definitions import METRICS
from nnserver.metrics.exposition import MetricsServer, render
from nnserver.metrics.snapshot import Snapshot
from nnserver.statistics import SECONDS, Distribution

OPENMETRICS = "application/openmetrics-text;version=1.0.0"
COUNTS = (1, 2, *[0] * (len(SECONDS) - 2), 4)
SNAPSHOT: Snapshot = {
    "nnserve_requests_total": {("iris", "1", "predict", "OK"): 3.0},
    "nnserve_queue_seconds": {("iris", "1"): Distribution(COUNTS, 50.0)},
    "nnserve_connections": {(): 2.0},
}


@pytest.fixture
def server():
    server = MetricsServer("127.0.0.1:0", lambda: SNAPSHOT)
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("accept", ["", "text/plain", OPENMETRICS])
def test_both_formats_say_the_same(accept):
    text, content_type = render(SNAPSHOT, accept)
    found = parse(text.decode(), openmetrics=content_type.startswith("application/openmetrics-text"))
    labels = {"model": "iris", "version": "1"}
    assert found.get("nnserve_requests_total", kind="predict", status="OK", **labels) == 3
    assert found.get("nnserve_connections") == 2
    assert found.get("nnserve_queue_seconds_bucket", le="1e-05", **labels) == 1
    assert found.get("nnserve_queue_seconds_bucket", le="2.5e-05", **labels) == 3
    assert found.get("nnserve_queue_seconds_bucket", le="10.0", **labels) == 3
    assert found.get("nnserve_queue_seconds_bucket", le="+Inf", **labels) == 7
    assert found.get("nnserve_queue_seconds_count", **labels) == 7
    assert found.get("nnserve_queue_seconds_sum", **labels) == 50
    found.check_histograms()
    family = found.families["nnserve_queue_seconds"]
    assert (family.type, family.documentation) == ("histogram", METRICS["nnserve_queue_seconds"].help)


def test_metrics_are_at_one_path(server):
    assert scrape(server.address).get("nnserve_connections") == 2
    assert scrape(server.address, {"Accept": "text/plain"}).get("nnserve_connections") == 2
    for path in ("/", "/metrics/x", "/debug"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://{server.address}{path}")
        with caught.value as answer:
            assert answer.code == 404
            assert answer.read() == b"only /metrics is here\n"


def test_an_answer_says_nothing_of_a_fault(caplog):
    """A scrape that cannot be collected is an error for the scraper; the log has why."""

    def broken():
        raise RuntimeError("secret")

    server = MetricsServer("127.0.0.1:0", broken)
    server.start()
    try:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://{server.address}/metrics")
        with caught.value as answer:
            assert answer.code == 500
            assert b"secret" not in answer.read()
    finally:
        server.stop()
    assert "secret" in caplog.text


def test_idle_connections_do_not_keep_a_scraper_out(server):
    """Sixteen may be open; for one more the oldest is closed, and none keeps the server from stopping."""
    host, port = server.address.split(":")
    idle = [socket.create_connection((host, int(port)), timeout=10) for _ in range(15)]
    try:
        assert scrape(server.address).get("nnserve_connections") == 2
        surplus = [socket.create_connection((host, int(port)), timeout=10) for _ in range(2)]
        assert idle[0].recv(1) == b""
        for connection in surplus:
            connection.close()
    finally:
        for connection in idle:
            connection.close()


def test_peers_that_dawdle_do_not_keep_a_scraper_out(server):
    """As many as there are places, and more, each with a request that never ends: the oldest is let go."""
    host, _, port = server.address.rpartition(":")
    dawdling = [socket.create_connection((host, int(port)), 30) for _ in range(40)]
    try:
        for sock in dawdling:
            with contextlib.suppress(OSError):  # It may be closed already.
                sock.sendall(b"GET /metrics HTTP/1.1\r\nx-")
        for _ in range(5):
            assert scrape(server.address).get("nnserve_connections") == 2
        assert dawdling[0].recv(1) == b""
    finally:
        for sock in dawdling:
            sock.close()


def test_a_server_that_was_never_started_can_be_stopped():
    MetricsServer("127.0.0.1:0", dict).stop()


def test_an_address_that_is_taken_is_named(server):
    with pytest.raises(ConfigError, match=f"cannot listen on {server.address} for metrics: "):
        MetricsServer(server.address, dict)
