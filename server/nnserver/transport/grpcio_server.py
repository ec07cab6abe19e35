"""
Connections in, calls out, over grpcio: raw bytes, threads, no protobuf.

Unary calls run on a few threads (more of them only pass the GIL around: each costs a switch).
Streams have threads of their own, two each, so that idle streams keep nobody waiting.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NoReturn

import grpc

from nnserver.call import (
    RETRY_PUSHBACK,
    Call,
    Caller,
    Listener,
    Metadata,
    Method,
    Methods,
    check_metadata,
    is_late,
    is_metadata,
)
from nnserver.errors import (
    ConfigError,
    Draining,
    Expired,
    NotInTime,
    QueueFull,
    Status,
    TooManyStreams,
    Unimplemented,
    retry_after_ms,
    status_and_text,
)
from nnserver.transport.lined_pool import LinedPool
from nnserver.transport.load import TransportLoad
from nnserver.transport.sockets import require_free
from nnserver.transport.tls import GrpcCredentials, TlsFiles, names_of_grpc

logger = logging.getLogger(__name__)

_STATUS = {Status(code.value[0]): code for code in grpc.StatusCode}

# grpcio's core refuses larger messages with a text of its own, which names no setting of ours.
# It is let through up to this multiple of the limit, so that the api can say what to do.
_CORE_LIMIT_FACTOR = 4
# Longer than any deadline: 99,999,999 hours is the longest that gRPC can write.
_ENDLESS_S = 1e15
# How long a draining server says so to whoever still calls.
_LINGER_S = 0.25


@dataclass(frozen=True, slots=True)
class GrpcioOptions:
    """What the transport needs to know; see the settings of the same names."""

    listen: str
    max_message_bytes: int
    unary_threads: int
    max_streams: int
    max_concurrent_calls: int
    reuse_port: bool = False
    # Of unary calls, for a thread.
    max_wait_s: float = math.inf
    tls: TlsFiles | None = None
    # Whether load() is to know of connections: the core then keeps books for its channelz service.
    counts_connections: bool = False


class GrpcioServer:
    """
    A gRPC server for *methods*.

    *after_messages* is called each time a listener was given what had arrived.
    """

    def __init__(
        self, methods: Methods, after_messages: Callable[[], object], options: GrpcioOptions
    ) -> None:
        self._after_messages = after_messages
        self._options = options
        self._tls = GrpcCredentials(options.tls) if options.tls else None
        self._unary_pool = LinedPool(options.unary_threads, options.max_wait_s)
        # Who is refused does not wait for the others.
        self._refusals = ThreadPoolExecutor(1, thread_name_prefix="nnserver-refusal")
        # A few more threads than streams: they tell the surplus caller that there are too many.
        self._stream_pool = ThreadPoolExecutor(options.max_streams + 4, thread_name_prefix="nnserver-stream")
        self._streams: set[_StreamCall] = set()
        self._streams_lock = threading.Lock()
        self._is_draining = False
        core_limit = min(_CORE_LIMIT_FACTOR * options.max_message_bytes, 2**31 - 1)
        self._server = grpc.server(
            self._unary_pool,
            handlers=[
                _Handlers(
                    {path: self._handler(method) for path, method in methods.items()},
                    {path for path, method in methods.items() if method.handle_all is not None},
                    self._end_of_line,
                )
            ],
            options=[
                ("grpc.max_receive_message_length", core_limit),
                ("grpc.max_send_message_length", -1),
                # Unless told, a second server on the port would start, and take half of the connections.
                ("grpc.so_reuseport", int(options.reuse_port)),
                ("grpc.enable_channelz", int(options.counts_connections)),
            ],
            maximum_concurrent_rpcs=options.max_concurrent_calls,
        )

    def start(self) -> str:
        """Listen and serve; return the address, with the port that was chosen if 0 was asked for."""
        listen = self._options.listen
        # The core would print a line of its own, and say no more than "failed".
        require_free(listen, reuse_port=self._options.reuse_port)
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, self._tls.credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(f"cannot listen on {listen}: the address is in use or not this machine's")
        self._server.start()
        return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"

    def load(self) -> TransportLoad:
        """Return what is open now; from any thread."""
        connections = _count_connections() if self._options.counts_connections else 0
        return TransportLoad(connections, len(self._streams))

    def renew_tls(self, files: TlsFiles) -> None:
        """Use *files* for new connections; raises ConfigError, and changes nothing, if they are unfit."""
        assert self._tls is not None
        self._tls.renew(files)

    def drain(self, grace_s: float) -> None:
        """Take no more calls, finish those in flight within *grace_s* seconds, cut off the rest."""
        end = time.monotonic() + grace_s
        with self._streams_lock:
            self._is_draining = True
            streams = list(self._streams)
        for stream in streams:
            stream.drain()
        # The core answers CANCELLED to a call that arrives while it stops. Until clients that send all
        # the time have heard UNAVAILABLE from us, and have gone elsewhere, it goes on taking calls.
        time.sleep(min(_LINGER_S, grace_s))
        self._server.stop(max(0.0, end - time.monotonic())).wait()
        self._unary_pool.shutdown(wait=True)
        self._refusals.shutdown(wait=True)
        self._stream_pool.shutdown(wait=True)

    def _handler(self, method: Method) -> grpc.RpcMethodHandler:
        if not (method.client_streams or method.server_streams):
            return grpc.unary_unary_rpc_method_handler(
                lambda message, context: self._serve_unary(method, message, context)
            )

        def serve(messages: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._serve_stream(method, messages, context)

        # grpcio looks for this attribute on the behaviour; without it, an idle stream would
        # occupy a thread of the unary calls.
        serve.experimental_thread_pool = self._stream_pool  # type: ignore[attr-defined]
        if method.client_streams:
            # Whether one answer comes or many is the api's affair: they look the same on the wire.
            return grpc.stream_stream_rpc_method_handler(serve)
        return grpc.unary_stream_rpc_method_handler(serve)

    def _serve_unary(self, method: Method, message: bytes, context: grpc.ServicerContext) -> bytes:
        call = _UnaryCall(method.path, context)
        # What is left is never below 0: who has waited for longer than allowed seems to have been given more.
        allowed_s = 0.0
        if call.deadline is not None:
            allowed_s = call.deadline - time.monotonic() + self._unary_pool.waited_s()
        refusal = self._refusal(method, call)
        if refusal is not None:
            call.fail(refusal)
            return call.wait(context)
        try:
            call.start(method, message)
            if not context.add_callback(call.end):
                call.end()
            self._after_messages()
        except Exception as error:  # grpcio would show its text to the client.
            call.fail(error)
        try:
            return call.wait(context)
        finally:
            if call.deadline is not None:
                self._unary_pool.note_end(was_late=call.was_late(), allowed_s=allowed_s)

    def _end_of_line(self) -> grpc.RpcMethodHandler | None:
        """Return what refuses a call that would wait too long for a thread; None for one that would not."""
        wait_s = self._unary_pool.wait_s()
        if wait_s <= self._unary_pool.most_s:
            return None
        error = QueueFull(
            f"{1e3 * wait_s:.0f} ms of calls wait for a thread (max_queue_ms); try again later", wait_s
        )

        def refuse(messages: Any, context: grpc.ServicerContext) -> NoReturn:
            context.set_trailing_metadata(_hint(error))
            _abort(context, error)

        refuse.experimental_thread_pool = self._refusals  # type: ignore[attr-defined]
        # As a stream, whose messages nobody has to wait for.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _serve_stream(self, method: Method, messages: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        call = _StreamCall(method.path, context)
        with self._streams_lock:
            limit = self._options.max_streams
            refusal = self._refusal(method, call)
            if refusal is None and len(self._streams) >= limit:
                refusal = TooManyStreams(
                    f"{limit} streams are open, the most this server keeps (max_streams)"
                )
            if refusal is None:
                self._streams.add(call)
        if refusal is not None:
            call.fail(refusal)
            return call.messages_out(context)
        try:
            call.start(method, messages if method.client_streams else iter((messages,)), self._after_messages)
        except Exception as error:
            call.fail(error)
        if not context.add_callback(lambda: self._forget(call)):
            self._forget(call)
        if self._is_draining:
            call.drain()  # A drain that came before the listener did was not heard.
        return call.messages_out(context)

    def _refusal(self, method: Method, call: Call) -> BaseException | None:
        if self._is_draining:
            return Draining("the server is draining; send the request to another")
        return method.refusal(call)

    def _forget(self, call: _StreamCall) -> None:
        with self._streams_lock:
            self._streams.discard(call)
        call.end()


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Path -> handler; for others one that fails with our text, where grpcio's would name no method."""

    def __init__(
        self,
        handlers: dict[str, grpc.RpcMethodHandler],
        bounded: set[str],
        refusal: Callable[[], grpc.RpcMethodHandler | None],
    ) -> None:
        """bounded: paths of calls that *refusal* may take the place of."""
        self._handlers = handlers
        self._bounded = bounded
        self._refusal = refusal

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Return the handler of a call, as soon as it has arrived."""
        path: str = details.method
        if path in self._bounded and (refusing := self._refusal()) is not None:
            return refusing
        return self._handlers.get(path) or grpc.stream_stream_rpc_method_handler(
            lambda messages, context: _abort(context, Unimplemented(f"unknown method {path[:200]}"))
        )


class _GrpcioCall(Call):
    """What unary and streaming calls have in common: the facts of the RPC."""

    def __init__(self, path: str, context: grpc.ServicerContext) -> None:
        self.method = path
        self.metadata: Metadata = tuple(
            (name, value) for name, value in context.invocation_metadata() if is_metadata(name, value)
        )
        self.peer: str = context.peer()
        self.origin = self.peer
        self._context = context
        remaining = context.time_remaining()
        # Where there is no deadline grpcio says that there are 2^63 seconds.
        is_endless = remaining is None or remaining > _ENDLESS_S
        self.deadline = None if is_endless else time.monotonic() + remaining
        self._cancelled = False
        self._initial: list[tuple[str, str | bytes]] = []
        self._trailing: list[tuple[str, str | bytes]] = []

    @functools.cached_property
    def caller(self) -> Caller:
        authorization = tuple(
            value for name, value in self.metadata if name == "authorization" and isinstance(value, str)
        )
        return Caller(authorization, names_of_grpc(self._context.auth_context()))

    def is_cancelled(self) -> bool:
        return self._cancelled

    def add_metadata(self, initial: Metadata = (), trailing: Metadata = ()) -> None:
        check_metadata((*initial, *trailing))
        self._initial += _stripped(initial)
        self._trailing += _stripped(trailing)

    def _send_initial(self, context: grpc.ServicerContext) -> None:
        """Send the metadata that goes before the first reply; to be called once."""
        if self._initial:
            context.send_initial_metadata(self._initial)

    def _end(self, context: grpc.ServicerContext, error: BaseException | None) -> None:
        """Set the metadata that goes with the end of the call; if there is an *error*, raise what ends it."""
        trailing = self._trailing if error is None else [*self._trailing, *_hint(error)]
        if trailing:
            context.set_trailing_metadata(trailing)
        if error is not None:
            _abort(context, error)


class _UnaryCall(_GrpcioCall):
    """A unary call, which keeps its thread until it has ended."""

    def __init__(self, path: str, context: grpc.ServicerContext) -> None:
        super().__init__(path, context)
        self._ended = threading.Event()
        self._message = b""
        self._error: BaseException | None = None
        self._listener: Listener | None = None

    def start(self, method: Method, message: bytes) -> None:
        """Give the one message to the api."""
        self._listener = method.start(self)
        self._listener.on_message(message)
        self._listener.on_half_close()

    def request(self, n: int) -> None:
        pass  # grpcio hands over the one message with the call.

    def reply(self, message: bytes) -> None:
        self._message = message

    def finish(self) -> None:
        self._ended.set()

    def fail(self, error: BaseException) -> None:
        if not self._ended.is_set():
            self._error = error
            self._ended.set()

    def end(self) -> None:
        """The RPC has terminated; if it was not answered, nobody waits for that any more."""
        self._cancelled = True
        if not self._ended.is_set():
            self._ended.set()
            if self._listener is not None:
                self._listener.on_cancel()

    def was_late(self) -> bool:
        """Whether its caller's time was up, or would have been."""
        if self._cancelled:
            return is_late(self.deadline, time.monotonic())
        return isinstance(self._error, Expired | NotInTime)

    def wait(self, context: grpc.ServicerContext) -> bytes:
        """Return the answer once there is one; end the call with its status if it is an error."""
        self._ended.wait()
        if not self._cancelled:
            self._send_initial(context)
            self._end(context, self._error)
        return self._message


@dataclass(frozen=True, slots=True)
class _Credit:
    """So many more messages may be read once everything before this was sent."""

    messages: int


class _End:
    """The call's end; the error of a failed one."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _StreamCall(_GrpcioCall):
    """
    A streaming call: one thread reads, grpcio's own thread writes.

    Replies, credits and the end travel through one queue, in order. A credit counts when the
    writer meets it, that is, when the replies before it have passed flow control: a client that
    does not read its answers is not read from.
    """

    _ids = itertools.count(1)

    def __init__(self, path: str, context: grpc.ServicerContext) -> None:
        super().__init__(path, context)
        self._out: SimpleQueue[bytes | _Credit | _End] = SimpleQueue()
        self._credits = threading.Semaphore(0)
        self._ended = False
        self._listener: Listener | None = None
        # A listener hears from one thread at a time: the reader, or whoever drains or cancels.
        self._listener_lock = threading.Lock()

    def request(self, n: int) -> None:
        self._out.put(_Credit(n))

    def reply(self, message: bytes) -> None:
        self._out.put(message)

    def finish(self) -> None:
        self._out.put(_End())

    def fail(self, error: BaseException) -> None:
        self._out.put(_End(error))

    def start(self, method: Method, messages: Iterator[bytes], after_messages: Callable[[], object]) -> None:
        """Begin to read."""
        self._listener = method.start(self)
        threading.Thread(
            target=self._read,
            args=(messages, after_messages),
            name=f"nnserver-reader-{next(self._ids)}",
            daemon=True,
        ).start()

    def drain(self) -> None:
        """Tell the api to finish what was received and end."""
        self._tell(lambda listener: listener.on_drain())

    def end(self) -> None:
        """The RPC has terminated: wake both threads; if the api did not end it, let it know."""
        was_ended = self._ended
        self._cancelled = True
        self._out.put(_End())
        self._credits.release()
        if not was_ended:
            self._tell(lambda listener: listener.on_cancel())

    def messages_out(self, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yield the replies in order until the end, which may be an error."""
        has_begun = False
        while True:
            item = self._out.get()
            if isinstance(item, bytes):
                if not has_begun:
                    has_begun = True
                    self._send_initial(context)
                yield item
            elif isinstance(item, _Credit):
                self._credits.release(item.messages)
            else:
                self._ended = True
                self._credits.release()
                if not self._cancelled:
                    if not has_begun:
                        self._send_initial(context)
                    self._end(context, item.error)
                return

    def _read(self, messages: Iterator[bytes], after_messages: Callable[[], object]) -> None:
        try:
            while True:
                self._credits.acquire()
                if self._ended or self._cancelled:
                    return
                message = next(messages, None)
                if message is None:
                    self._tell(lambda listener: listener.on_half_close())
                    return
                self._deliver(message)
                after_messages()
        except grpc.RpcError:
            pass  # The RPC has terminated; end() says so to the api.
        except Exception as error:
            self.fail(error)

    def _deliver(self, message: bytes) -> None:
        with self._listener_lock:
            # Under the lock: a listener that has been told of the end hears nothing after it.
            if self._listener is not None and not self._cancelled:
                self._listener.on_message(message)

    def _tell(self, what: Callable[[Listener], None]) -> None:
        if self._listener is not None:
            with self._listener_lock:
                what(self._listener)


def _abort(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    """Raise what makes grpcio end the call with the status of *error*."""
    status, text = status_and_text(error)
    # With set_code a unary call would send an empty message, too. grpcio encodes no spaces, and HTTP
    # allows none around a value: a peer may refuse the trailers.
    context.abort(_STATUS[status], text.strip(" "))
    raise AssertionError("abort raises")


def _count_connections() -> int:
    """
    Return how many connections this process's servers have.

    grpcio offers no call for it; grpcio-channelz, its package of that service, asks the core so, too.
    """
    from grpc._cython import cygrpc

    connections = 0
    for server in json.loads(cygrpc.channelz_get_servers(0)).get("server", ()):
        server_id, start, is_complete = int(server["ref"]["serverId"]), 0, False
        while not is_complete:
            page = json.loads(cygrpc.channelz_get_server_sockets(server_id, start, 0))
            sockets = page.get("socketRef", ())
            connections += len(sockets)
            is_complete = page.get("end", False) or not sockets
            start = int(sockets[-1]["socketId"]) + 1 if sockets else 0
    return connections


def _hint(error: BaseException) -> Metadata:
    """Return the metadata that says after what time to try again, if *error* does."""
    pause_ms = retry_after_ms(error)
    return () if pause_ms is None else ((RETRY_PUSHBACK, str(pause_ms)),)


def _stripped(metadata: Metadata) -> Metadata:
    """Return *metadata* without spaces around texts, which HTTP does not allow."""
    return tuple((name, value.strip(" ") if isinstance(value, str) else value) for name, value in metadata)
