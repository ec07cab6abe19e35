"""grpc.health.v1 by way of the seam: checks, watchers and what they hear of a drain."""

import pytest
from grpc_health.v1 import health_pb2 as pb
from support.calls import FakeCall

from nnserver.api.health import SERVICE, HealthApi
from nnserver.errors import InvalidArgument, NotFound

SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
def api():
    return HealthApi({"iris", SERVICE}.__contains__)


def start(api, name, message):
    call = FakeCall()
    listener = api.methods()[f"/{SERVICE}/{name}"].start(call)
    listener.on_message(message)
    return call, listener


def ask(api, name, service=""):
    return start(api, name, pb.HealthCheckRequest(service=service).SerializeToString())


def statuses(call):
    return [pb.HealthCheckResponse.FromString(reply).status for reply in call.replies]


@pytest.mark.parametrize("service", ["", "iris", SERVICE])
def test_check_answers_for_the_server_its_services_and_models(api, service):
    """Each known name is SERVING, and NOT_SERVING once draining; the call ends with its answer."""
    before, _ = ask(api, "Check", service)
    api.drain()
    after, _ = ask(api, "Check", service)
    assert (statuses(before), statuses(after)) == ([SERVING], [NOT_SERVING])
    assert before.is_finished
    assert after.is_finished


def test_check_of_an_unknown_name_is_not_found(api):
    """As the health protocol has it; the text says what the empty name is for."""
    call, _ = ask(api, "Check", "rose")
    assert isinstance(call.error, NotFound)
    assert str(call.error) == "no service or model of this name; use the empty name for the whole server"
    assert call.replies == []


@pytest.mark.parametrize("name", ["Check", "Watch"])
def test_bytes_that_are_no_request_are_refused(api, name):
    """Undecodable bytes are INVALID_ARGUMENT, and no watcher is left behind."""
    call, _ = start(api, name, b"\xff")
    assert isinstance(call.error, InvalidArgument)
    assert "grpc.health.v1.HealthCheckRequest" in str(call.error)
    api.drain()
    assert call.replies == []


@pytest.mark.parametrize("service", ["", "iris"])
def test_watch_tells_the_status_now_and_every_change(api, service):
    """SERVING at once, NOT_SERVING at the drain, each once; the call ends when the server drains."""
    call, listener = ask(api, "Watch", service)
    assert statuses(call) == [SERVING]
    assert not call.has_ended
    api.drain()
    api.drain()
    assert statuses(call) == [SERVING, NOT_SERVING]
    listener.on_drain()
    assert call.is_finished


def test_watch_of_an_unknown_name_waits_for_it(api):
    """SERVICE_UNKNOWN is a status, not an error: the watcher stays."""
    call, _ = ask(api, "Watch", "rose")
    assert statuses(call) == [SERVICE_UNKNOWN]
    api.drain()
    assert statuses(call) == [SERVICE_UNKNOWN]
    assert not call.has_ended


def test_watch_during_a_drain_is_not_serving(api):
    """A watcher that comes late hears NOT_SERVING first."""
    api.drain()
    call, _ = ask(api, "Watch")
    assert statuses(call) == [NOT_SERVING]


def test_half_closing_does_not_end_a_watch(api):
    """Every client half-closes after its one request; the watcher goes on listening."""
    call, listener = ask(api, "Watch")
    listener.on_half_close()
    api.drain()
    assert statuses(call) == [SERVING, NOT_SERVING]


def test_a_watcher_that_has_gone_is_forgotten(api):
    """After on_cancel nothing is sent to the call."""
    call, listener = ask(api, "Watch")
    listener.on_cancel()
    api.drain()
    assert statuses(call) == [SERVING]


def test_a_watcher_hears_of_a_model_that_comes_and_goes():
    """As its models change, the server refreshes; who watches another name hears nothing new."""
    names = {"iris"}
    api = HealthApi(names.__contains__)
    (of_rose, _), (of_iris, _) = ask(api, "Watch", "rose"), ask(api, "Watch", "iris")
    names.add("rose")
    api.refresh()
    names.remove("rose")
    api.refresh()
    assert statuses(of_rose) == [SERVICE_UNKNOWN, SERVING, SERVICE_UNKNOWN]
    assert statuses(of_iris) == [SERVING]
    assert api.is_serving()
    api.drain()
    assert not api.is_serving()
