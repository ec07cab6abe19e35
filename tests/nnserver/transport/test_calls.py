"""One api behind both transports: calls of every kind, and metadata that the api adds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import unquote

import grpc
import pytest
from support.h2 import Chat, Collect, RawClient, Special, wait_for

from nnserver.call import Call, Metadata, Method, Methods, UnaryListener, check_metadata
from nnserver.errors import INTERNAL_TEXT
from nnserver.transport.grpcio_server import GrpcioOptions, GrpcioServer
from nnserver.transport.h2_server import H2Options, H2Server

INITIAL: Metadata = (("x-first", "1"), ("x-first", "a, b"), ("x-bytes-bin", bytes(range(256))))
TRAILING: Metadata = (("x-last", "2"), ("x-empty-bin", b""), ("x-bytes-bin", b"\xab\xab\xab"))


def labelled(call: Call, message: bytes) -> None:
    """Answer with metadata; fail if the message says so, before or after a reply."""
    call.add_metadata(initial=INITIAL[:1])
    call.add_metadata(INITIAL[1:], TRAILING)
    if b"fail at once" in message:
        raise Special("as asked")
    call.reply(message)
    if b"fail" in message:
        raise Special("as asked")
    call.finish()


def unfit(call: Call, message: bytes) -> None:
    call.add_metadata(trailing=((message.decode(), "value"),))


class LabelledChat(Chat):
    def __init__(self, call: Call) -> None:
        call.add_metadata(INITIAL, TRAILING)
        super().__init__(call)


def count(call: Call, message: bytes) -> None:
    for i in range(int(message)):
        call.reply(b"%d" % i)
    call.finish()


def echo_metadata(call: Call, message: bytes) -> None:
    """Send back what came with the call, as metadata and as text."""
    call.add_metadata(call.metadata, call.metadata)
    call.reply(repr((call.metadata, call.deadline)).encode())
    call.finish()


def say(call: Call, message: bytes) -> None:
    """Fail with the text that the message is."""
    raise Special(message.decode())


class Kept:
    """A call of either kind that the test answers itself, by the message that it began with."""

    calls: ClassVar[dict[bytes, Kept]] = {}

    def __init__(self, call: Call) -> None:
        self.call = call
        self.cancelled = threading.Semaphore(0)
        call.request(1)

    def on_message(self, message: bytes) -> None:
        self.calls[message] = self
        self.call.request(1)

    def on_half_close(self) -> None:
        pass

    def on_cancel(self) -> None:
        self.cancelled.release()

    def on_drain(self) -> None:
        pass


def kept(message: bytes) -> Kept:
    """The call that began with *message*, once it has."""
    wait_for(lambda: message in Kept.calls)
    return Kept.calls.pop(message)


def broken(call: Call) -> UnaryListener:
    raise RuntimeError("a secret of the api")


def methods() -> Methods:
    found = (
        Method("/t.T/Labelled", lambda call: UnaryListener(call, labelled)),
        Method("/t.T/Unfit", lambda call: UnaryListener(call, unfit)),
        Method("/t.T/EchoMetadata", lambda call: UnaryListener(call, echo_metadata)),
        Method("/t.T/LabelledMany", lambda call: UnaryListener(call, labelled), server_streams=True),
        Method("/t.T/LabelledChat", LabelledChat, client_streams=True, server_streams=True),
        Method("/t.T/Count", lambda call: UnaryListener(call, count), server_streams=True),
        Method("/t.T/Collect", Collect, client_streams=True),
        Method("/t.T/Say", lambda call: UnaryListener(call, say)),
        Method("/t.T/SayStream", lambda call: UnaryListener(call, say), server_streams=True),
        Method("/t.T/Keep", Kept),
        Method("/t.T/KeepStream", Kept, client_streams=True, server_streams=True),
        Method("/t.T/Broken", broken),
        Method("/t.T/BrokenStream", broken, client_streams=True, server_streams=True),
    )
    return {method.path: method for method in found}


def server(transport: str) -> H2Server | GrpcioServer:
    limits: dict[str, Any] = {"max_message_bytes": 1 << 20, "max_streams": 8, "max_concurrent_calls": 64}
    if transport == "h2":
        return H2Server(methods(), lambda: None, H2Options("127.0.0.1:0", **limits))
    return GrpcioServer(methods(), lambda: None, GrpcioOptions("127.0.0.1:0", unary_threads=2, **limits))


@pytest.fixture(scope="module", params=["h2", "grpcio"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of the transport."""
    running = server(request.param)
    yield running.start()
    running.drain(0.0)


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as found:
        yield found


def own(metadata: Any) -> list[tuple[str, str | bytes]]:
    """The api's part of *metadata*, by name; values of one name keep their order."""
    return sorted(((k, v) for k, v in metadata if k.startswith("x-")), key=lambda item: item[0])


def by_name(metadata: Metadata) -> list[tuple[str, str | bytes]]:
    return sorted(metadata, key=lambda item: item[0])


def test_a_client_stream_has_one_answer(channel: grpc.Channel) -> None:
    method = channel.stream_unary("/t.T/Collect")
    assert method(iter([b"ab", b"", bytes(100_000)]), timeout=30) == b"100002"
    assert method(iter(()), timeout=30) == b"0"


def test_a_server_stream_has_one_question(channel: grpc.Channel) -> None:
    method = channel.unary_stream("/t.T/Count")
    assert list(method(b"3", timeout=30)) == [b"0", b"1", b"2"]
    assert list(method(b"0", timeout=30)) == []


@pytest.mark.parametrize("path", [b"/t.T/Say", b"/t.T/SayStream"])
@pytest.mark.parametrize("text", ["plain", "", "100 % \t☺", "\n"])
def test_an_error_has_its_text_and_no_message(address: str, path: bytes, text: str) -> None:
    with RawClient(address) as client:
        answer = client.call(path, text.encode())
    fields = {**answer.headers, **answer.trailers}
    assert fields[b"grpc-status"] == b"2"
    assert unquote(fields.get(b"grpc-message", b"").decode()) == text
    assert answer.messages == []


def test_a_text_with_spaces_around_it_does_not_lose_the_status(address: str) -> None:
    """HTTP/2 allows none around a value, and a peer may refuse the trailers (RFC 9113, 8.2.1)."""
    with RawClient(address) as client:
        assert client.call(b"/t.T/Say", b"  a text ").status == 2


@pytest.mark.parametrize("path", ["/t.T/Broken", "/t.T/BrokenStream"])
def test_a_fault_of_the_api_is_internal_and_tells_nothing(channel: grpc.Channel, path: str) -> None:
    call = channel.unary_unary(path).future(b"x", timeout=30)
    assert call.code() is grpc.StatusCode.INTERNAL
    assert call.details() == INTERNAL_TEXT


@pytest.mark.parametrize("path", ["/t.T/Keep", "/t.T/KeepStream"])
def test_an_api_hears_once_that_nobody_waits_any_more(channel: grpc.Channel, path: str) -> None:
    begun = channel.stream_stream(path)(iter((b"to be cancelled",)), timeout=30)
    found = kept(b"to be cancelled")
    assert not found.call.is_cancelled()
    begun.cancel()
    assert found.cancelled.acquire(timeout=30)
    assert found.call.is_cancelled()
    assert not found.cancelled.acquire(blocking=False)


@pytest.mark.parametrize("path", ["/t.T/Keep", "/t.T/KeepStream"])
def test_an_api_hears_of_a_deadline_as_of_a_cancellation(channel: grpc.Channel, path: str) -> None:
    begun = channel.stream_stream(path)(iter((b"to expire",)), timeout=0.3)
    assert kept(b"to expire").cancelled.acquire(timeout=30)
    assert begun.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("path", ["/t.T/Keep", "/t.T/KeepStream"])
def test_an_answered_call_is_not_a_cancelled_one(channel: grpc.Channel, path: str) -> None:
    begun = channel.stream_stream(path)(iter((b"to be answered",)), timeout=30)
    found = kept(b"to be answered")
    found.call.reply(b"answer")
    found.call.finish()
    assert list(begun) == [b"answer"]
    # Once a second call has ended on the connection, the end of the first is known to all.
    assert list(channel.unary_stream("/t.T/Count")(b"1", timeout=30)) == [b"0"]
    assert not found.cancelled.acquire(blocking=False)


@pytest.mark.parametrize("kind", ["unary_unary", "stream_stream"])
@pytest.mark.parametrize("path", ["/t.T/None", "/no.Service/Count", "/t.T/count"])
def test_an_unknown_method_is_named(channel: grpc.Channel, path: str, kind: str) -> None:
    method = getattr(channel, kind)(path)
    call = method.future(b"x", timeout=30) if kind == "unary_unary" else method(iter((b"x",)), timeout=30)
    assert call.code() is grpc.StatusCode.UNIMPLEMENTED
    assert call.details() == f"unknown method {path}"


def test_metadata_goes_before_and_after_a_unary_answer(channel: grpc.Channel) -> None:
    answer, call = channel.unary_unary("/t.T/Labelled").with_call(b"hello", timeout=30)
    assert answer == b"hello"
    assert own(call.initial_metadata()) == by_name(INITIAL)
    assert own(call.trailing_metadata()) == by_name(TRAILING)


@pytest.mark.parametrize("message", [b"fail", b"fail at once"])
def test_metadata_goes_with_an_error(channel: grpc.Channel, message: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/t.T/Labelled")(message, timeout=30)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNKNOWN, "as asked")
    assert own(caught.value.initial_metadata()) == by_name(INITIAL)
    assert own(caught.value.trailing_metadata()) == by_name(TRAILING)


@pytest.mark.parametrize(
    ("message", "answers"), [(b"x", [b"x"]), (b"fail", [b"fail"]), (b"fail at once", [])]
)
def test_metadata_goes_with_a_stream_of_answers(
    channel: grpc.Channel, message: bytes, answers: list[bytes]
) -> None:
    call = channel.unary_stream("/t.T/LabelledMany")(message, timeout=30)
    assert [next(call) for _ in answers] == answers
    with pytest.raises(grpc.RpcError if b"fail" in message else StopIteration):
        next(call)
    assert call.details() == ("as asked" if b"fail" in message else "")
    assert own(call.initial_metadata()) == by_name(INITIAL)
    assert own(call.trailing_metadata()) == by_name(TRAILING)


@pytest.mark.parametrize("messages", [[], [b"a", b"b"]])
def test_metadata_goes_with_a_chat(channel: grpc.Channel, messages: list[bytes]) -> None:
    call = channel.stream_stream("/t.T/LabelledChat")(iter(messages), timeout=30)
    assert list(call) == messages
    assert own(call.initial_metadata()) == by_name(INITIAL)
    assert own(call.trailing_metadata()) == by_name(TRAILING)


def test_what_came_can_be_sent_back(address: str) -> None:
    """HTTP allows more than gRPC: what an api is given is what it may send (PROTOCOL-HTTP2, ASCII-Value)."""
    sent = [(b"a", b"\xe4"), (b"b", "☺".encode()), (b"c", b"1\t2"), (b"d", b"x y"), (b"e-bin", b"YQ")]
    with RawClient(address) as client:
        answer = client.call(b"/t.T/EchoMetadata", b"", *sent, (b"grpc-anything", b"x"), (b"host", b"h"))
    assert answer.status == 0
    assert answer.messages == [repr(((("d", "x y"), ("e-bin", b"a")), None)).encode()]
    for headers in (answer.headers, answer.trailers):
        assert {(k, v) for k, v in headers.items() if len(k) == 1 or k.endswith(b"-bin")} == {*sent[3:]}


def test_metadata_that_grpc_cannot_carry_is_a_fault_of_the_api(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/t.T/Unfit")(b"grpc-reserved", timeout=30)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "reserved" not in caught.value.details()


@pytest.mark.parametrize(
    "item",
    [
        ("Upper", "x"),
        ("with space", "x"),
        ("", "x"),
        (":path", "x"),
        ("grpc-status", "0"),
        ("grpc-anything", "0"),
        ("umlaut", "ä"),
        ("te", "trailers"),
        ("content-length", "5"),
        ("line", "a\nb"),
        ("tab", "\t"),
        ("text", b"bytes"),
        ("bytes-bin", "text"),
    ],
)
def test_what_is_no_metadata_is_refused(item: Any) -> None:
    with pytest.raises(ValueError):
        check_metadata((("fine", "x"), item))


def test_what_is_metadata_is_taken() -> None:
    check_metadata((("a_b-c.9", " ~"), ("x-bin", b"\0\xff"), ("empty", ""), ("empty-bin", b"")))
