"""Methods in, an H2Server in this process out, and a client that speaks HTTP/2 frame by frame."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ngh2
from ngh2.events import DataReceived, ResponseReceived, StreamClosed, StreamReset, TrailersReceived

from nnserver.call import Call, Method, Methods, UnaryListener, single
from nnserver.errors import ServerError, Status
from nnserver.transport.h2_server import H2Options, H2Server

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, END_HEADERS, PADDED = 0x1, 0x4, 0x8
ACK = 0x1
PATIENCE_S = 20.0


class Special(ServerError):
    """An error with a text that a header cannot hold as it is."""

    status = Status.UNKNOWN


SPECIAL_TEXT = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"


class Chat:
    """A stream that answers each message with itself, one asked for at a time."""

    def __init__(self, call: Call, window: int = 1) -> None:
        self.call = call
        call.request(window)

    def on_message(self, message: bytes) -> None:
        self.call.reply(message)
        self.call.request(1)

    def on_half_close(self) -> None:
        self.call.finish()

    def on_cancel(self) -> None:
        pass

    def on_drain(self) -> None:
        self.call.finish()


class Collect(Chat):
    """A stream whose one answer is the length of all its messages."""

    total = 0

    def on_message(self, message: bytes) -> None:
        self.total += len(message)
        self.call.request(1)

    def on_half_close(self) -> None:
        self.call.reply(str(self.total).encode())
        self.call.finish()


class TestApi:
    """
    /t.T/Echo, /t.T/Sleep (never answers), /t.T/Grow (so many bytes), /t.T/Fail, /t.T/Break, /t.T/Info;
    /t.T/Count (a stream of that many messages), /t.T/Collect, /t.T/Chat; /t.T/Slow answers from a thread.
    Echo, Fail and Info take the requests of a tick together, the others one by one.

    sleeping: the calls of Sleep that wait.  cancelled: how many heard that nobody waits any more.
    """

    __test__ = False

    def __init__(self) -> None:
        self.sleeping: list[Call] = []
        self.cancelled = 0
        self.drained = 0
        self.ticks = 0

    def after_messages(self) -> None:
        self.ticks += 1

    def methods(self) -> Methods:
        def unary(name: str, answer: Callable[[Call, bytes], bytes]) -> Method:
            def handler(call: Call, message: bytes) -> None:
                call.reply(answer(call, message))
                call.finish()

            return Method(f"/t.T/{name}", lambda call: UnaryListener(call, handler))

        def together(name: str, answer: Callable[[Call, bytes], bytes]) -> Method:
            return single(f"/t.T/{name}", lambda call, message: call.answer(answer(call, message)))

        def fail(call: Call, message: bytes) -> bytes:
            raise Special(message.decode() or SPECIAL_TEXT)

        def info(call: Call, message: bytes) -> bytes:
            left = None if call.deadline is None else round(call.deadline - time.monotonic(), 1)
            return repr((call.method, call.metadata, call.peer.partition(":")[0], left)).encode()

        def count(call: Call, message: bytes) -> None:
            for i in range(int(message)):
                call.reply(str(i).encode())
            call.finish()

        def slow(call: Call, message: bytes) -> None:
            def answer() -> None:
                call.reply(message)
                call.finish()

            threading.Timer(0.01, answer).start()

        def broken(call: Call) -> Any:
            raise RuntimeError("a fault of the api")

        found = [
            together("Echo", lambda call, message: message),
            unary("Grow", lambda call, message: bytes(int(message))),
            together("Fail", fail),
            together("Info", info),
            Method("/t.T/Break", broken),
            Method("/t.T/BreakStream", broken, client_streams=True, server_streams=True),
            Method("/t.T/Sleep", lambda call: _Sleeper(self, call)),
            Method("/t.T/Slow", lambda call: UnaryListener(call, slow)),
            Method("/t.T/Count", lambda call: UnaryListener(call, count), server_streams=True),
            Method("/t.T/Collect", Collect, client_streams=True),
            Method("/t.T/Chat", Chat, client_streams=True, server_streams=True),
            Method("/t.T/Chat64", lambda call: Chat(call, 64), client_streams=True, server_streams=True),
        ]
        return {method.path: method for method in found}


class _Sleeper(UnaryListener):
    def __init__(self, api: TestApi, call: Call) -> None:
        self._api = api
        super().__init__(call, lambda call, message: api.sleeping.append(call))

    def on_cancel(self) -> None:
        self._api.cancelled += 1

    def on_drain(self) -> None:
        self._api.drained += 1


def started(listen: str = "127.0.0.1:0", api: TestApi | None = None, **options: Any) -> Running:
    """A server of TestApi that the test drains itself."""
    api = api or TestApi()
    settings: dict[str, Any] = {
        "max_message_bytes": 1 << 20,
        "max_streams": 64,
        "max_concurrent_calls": 256,
        **options,
    }
    server = H2Server(api.methods(), api.after_messages, H2Options(listen, **settings))
    return Running(api, server, server.start())


class Running:
    """A started server, its api and its address."""

    def __init__(self, api: TestApi, server: H2Server, address: str) -> None:
        self.api = api
        self.server = server
        self.address = address

    def client(self, **options: Any) -> RawClient:
        """A client that has said hello."""
        return RawClient(self.address, **options)

    def wait_until_idle(self) -> None:
        """Wait until the server holds no connection, call or byte."""
        server = self.server
        wait_for(
            lambda: not server.connections and not server.open_calls,
            lambda: f"{len(server.connections)} connections, {server.open_calls} calls",
        )
        assert server.open_streams == 0
        assert server.buffered_bytes == 0
        assert not server.timed_calls


@contextlib.contextmanager
def serving(listen: str = "127.0.0.1:0", api: TestApi | None = None, **options: Any) -> Iterator[Running]:
    """Run a server of TestApi for the block, then drain it."""
    running = started(listen, api, **options)
    try:
        yield running
    finally:
        running.server.drain(0.2)
    server = running.server
    assert not server.connections
    assert server.open_calls == server.open_streams == server.buffered_bytes == 0


def connect(address: str) -> socket.socket:
    """A connected socket to HOST:PORT or unix:PATH."""
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        sock.connect(address.removeprefix("unix:"))
        return sock
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)), PATIENCE_S)
    # Else a second small write waits up to 40 ms for the first one's acknowledgement.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream_id) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """One HPACK field, not indexed, without Huffman coding."""
    return b"\0" + _integer(len(name)) + name + _integer(len(value)) + value


def _integer(n: int) -> bytes:
    if n < 127:
        return bytes((n,))
    n -= 127
    out = bytearray((127,))
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes((*out, n))


def head(path: bytes = b"/t.T/Echo", *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """The headers of a gRPC request."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"test"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *more,
    ]


def block(path: bytes = b"/t.T/Echo", *more: tuple[bytes, bytes]) -> bytes:
    """The same as a header block that needs no state of HPACK's."""
    return b"".join(literal(name, value) for name, value in head(path, *more))


def prefixed(message: bytes, compressed: int = 0) -> bytes:
    """A message as it is in the body."""
    return struct.pack(">BI", compressed, len(message)) + message


class Answer:
    """What came back on one stream."""

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.trailers: dict[bytes, bytes] = {}
        self.body = b""
        self.reset: int | None = None
        self.is_closed = False
        self.is_over = False

    @property
    def status(self) -> int:
        """grpc-status, of the trailers or of headers that are trailers too."""
        return int({**self.headers, **self.trailers}[b"grpc-status"])

    @property
    def messages(self) -> list[bytes]:
        found, body = [], self.body
        while body:
            size = int.from_bytes(body[1:5], "big")
            found.append(body[5 : 5 + size])
            body = body[5 + size :]
        return found


class RawClient:
    """A connection whose frames the test makes: by ngh2 where it should be right, by hand where wrong."""

    def __init__(
        self, address: str, settings: dict[int, int] | None = None, wrap: Callable[..., Any] | None = None
    ) -> None:
        self.sock = connect(address)
        if wrap is not None:
            self.sock = wrap(self.sock)
        self.begin(settings)

    def begin(self, settings: dict[int, int] | None) -> None:
        """Say hello."""
        self.h2 = ngh2.Connection(ngh2.Role.CLIENT)
        self.h2.initiate_connection(settings or {})
        self.answers: dict[int, Answer] = {}
        self.events: list[Any] = []
        self.is_over = False
        self.flush()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def request(
        self,
        path: bytes = b"/t.T/Echo",
        body: bytes | None = None,
        *more: tuple[bytes, bytes],
        ends: bool = True,
    ) -> int:
        """Begin a call with *body*, a body as it is on the wire; return its stream."""
        stream_id = self.h2.send_request(head(path, *more))
        self.answers[stream_id] = Answer()
        if body is not None:
            self.h2.send_data(stream_id, body, end_stream=ends)
        self.flush()
        return stream_id

    def call(self, path: bytes, message: bytes, *more: tuple[bytes, bytes]) -> Answer:
        """Make a whole call and return its answer."""
        return self.wait(self.request(path, prefixed(message), *more))

    def flush(self) -> None:
        """Send what ngh2 has to say."""
        self.send(self.h2.data_to_send())

    def send(self, data: bytes) -> None:
        """Send bytes as they are; a server that has closed the connection is no error."""
        try:
            self.sock.sendall(data)
        except OSError:
            self.is_over = True

    def receive(self, timeout: float = PATIENCE_S) -> bool:
        """Read once and digest it; False at the end or if nothing came."""
        if not select.select([self.sock], [], [], timeout)[0]:
            return False
        try:
            data = self.sock.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self.is_over = True
            return False
        self.digest(data)
        return True

    def digest(self, data: bytes) -> None:
        """Understand what the server has sent, and answer what HTTP/2 wants answered."""
        with contextlib.suppress(ngh2.ConnectionStateError):  # After a GOAWAY that ends all.
            self.h2.receive_data(data)
        for event in self.h2.events():
            self.events.append(event)
            answer = self.answers.get(getattr(event, "stream_id", 0))
            if answer is None:
                continue
            if isinstance(event, ResponseReceived):
                answer.headers = dict(event.headers)
                answer.is_over = answer.is_over or event.end_stream
            elif isinstance(event, DataReceived):
                answer.body += event.data
                answer.is_over = answer.is_over or event.end_stream
            elif isinstance(event, TrailersReceived):
                answer.trailers = dict(event.headers)
                answer.is_over = True
            elif isinstance(event, StreamReset):
                answer.reset = event.error_code
            elif isinstance(event, StreamClosed):
                answer.is_closed = True
        with contextlib.suppress(ngh2.NGH2Error):
            self.flush()

    def wait(self, stream_id: int) -> Answer:
        """Read until the stream has its answer."""
        answer = self.answers[stream_id]
        while not (answer.is_over or answer.is_closed):
            assert self.receive(), f"no answer on stream {stream_id}"
        return answer

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Read until *condition* holds."""
        while not condition():
            assert self.receive(), "it did not happen"

    def own_stream(self) -> int:
        """Return a stream that ngh2 takes for opened, whose frames the test sends by hand."""
        stream_id = self.h2.send_request([(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/")])
        self.answers[stream_id] = Answer()
        self.h2.data_to_send()
        return stream_id

    def wait_for(self, kind: type[Any]) -> Any:
        """Read until an event of *kind* has come, and return it."""
        while True:
            for event in self.events:
                if isinstance(event, kind):
                    return event
            assert self.receive(), f"no {kind.__name__}"

    def wait_for_close(self) -> bytes:
        """Read until the server has closed the connection; return the bytes, undigested."""
        found = b""
        with contextlib.suppress(ConnectionError):
            while data := self.sock.recv(1 << 20):
                found += data
        self.is_over = True
        return found


def frames_in(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """The frames of bytes that a server has sent: kind, flags, stream, payload."""
    found = []
    while len(data) >= 9:
        size = int.from_bytes(data[:3], "big")
        found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + size]))
        data = data[9 + size :]
    return found


def goaway_code(data: bytes) -> int | None:
    """The error code of the last GOAWAY in *data*; None if there is none."""
    codes = [int.from_bytes(frame[3][4:8], "big") for frame in frames_in(data) if frame[0] == GOAWAY]
    return codes[-1] if codes else None


def wait_for(condition: Callable[[], Any], what: Callable[[], str] = lambda: "") -> None:
    """Wait until *condition* holds; fail with *what* after a while."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, what() or "it did not happen"
        time.sleep(0.002)
