"""
Message bytes in, message bytes out: the seam between transports and apis.

A transport knows sockets and frames, and nothing of protobuf or models. An api knows
messages and models, and nothing of sockets. They meet here:

    transport                                  api
    --------------------------------------------------------------------------
    finds methods[path], calls start(call)  -> returns a Listener
    delivers what was asked for             <- call.request(n)
    listener.on_message(bytes)              -> decodes, submits
    listener.on_half_close()                   no more messages will come
    listener.on_cancel()                       nobody waits for the answer any more
    listener.on_drain()                        finish what was received, then end
    sends, in order                         <- call.reply(bytes)
    ends the call                           <- call.finish() or call.fail(error)
    sends beside them                       <- call.add_metadata(initial, trailing)

A method with one message each way may have *handle_all* as well: it takes the calls that have arrived
together, each with its message, and ends each by call.answer(bytes) or call.fail(error), then or later. A
transport that collects whole requests makes no listener for them.

A method may have a *gate*: it looks at call.caller and returns why the call is refused, or None. A transport
asks it as soon as it knows the call's head, before anything of the request is kept.

This is the shape of grpc-java's ServerCall: pushed messages and explicit demand. It fits an
event loop and threads alike, and demand bounds memory: a message that was not requested
stays in the transport's flow control. A request made after a reply counts from the moment
that reply was sent, so a client that does not read its answers is not read from either.

Once it has delivered all that it had read, a transport calls *after_messages*: this is
where waiting rows are run, in one batch a tick on an event loop.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nnserver.errors import ServerError

Metadata = tuple[tuple[str, str | bytes], ...]

# Trailing metadata by which a server tells after how many milliseconds to try again (gRPC's proposal A6).
RETRY_PUSHBACK = "grpc-retry-pushback-ms"

# A caller's clock may be so much before ours: what it was told of the time that is left took time to arrive.
_EARLY_S = 10e-3

_NAME = re.compile(r"[0-9a-z_.-]+")
_TEXT = re.compile(r"[\x20-\x7e]*")
_NAMES_OF_HTTP = frozenset(("te", "content-type", "content-length", "host"))


class Caller:
    """
    Who calls, as far as a transport can tell.

    One object stands for as many calls as the transport can tell to be the same caller's: for those of one
    connection with the same *authorization*, if it remembers connections.

    authorization: what came as metadata of that name; one item, unless the caller is confused.
    certificate: names in the certificate that the client has shown and an authority has vouched for: "CN:…"
    of its subject; "DNS:…", "URI:…" and "EMAIL:…" of its alternative names.
    grant: where a gate keeps what it has found out.
    """

    __slots__ = ("authorization", "certificate", "grant")

    def __init__(
        self, authorization: tuple[str, ...] = (), certificate: frozenset[str] = frozenset()
    ) -> None:
        self.authorization = authorization
        self.certificate = certificate
        self.grant: Any = None


class Call(ABC):
    """One RPC as an api sees it. Methods may be called from any thread."""

    method: str
    # Of what the caller sent, what could be sent back: see `is_metadata`.
    metadata: Metadata
    peer: str
    # On time.monotonic()'s clock, in seconds; None: the caller waits for ever.
    deadline: float | None
    # The same for calls of one connection, as far as the transport can tell.
    origin: Hashable
    # See batcher.Caller.
    is_patient = False

    @property
    @abstractmethod
    def caller(self) -> Caller:
        """Who calls."""

    @abstractmethod
    def is_cancelled(self) -> bool:
        """Whether the caller has gone away."""

    @abstractmethod
    def request(self, n: int) -> None:
        """Ask for *n* more messages."""

    @abstractmethod
    def reply(self, message: bytes) -> None:
        """Send one message; ignored after the end of the call."""

    @abstractmethod
    def add_metadata(self, initial: Metadata = (), trailing: Metadata = ()) -> None:
        """
        Send metadata of the api's own: *initial* before the first reply, *trailing* with the status.

        Ignored once that reply or the end of the call was asked for. Raises ValueError for what gRPC
        cannot carry, see `is_metadata`.
        """

    @abstractmethod
    def finish(self) -> None:
        """End the call with status OK; ignored after the end of the call."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """End the call with the status of *error*; ignored after the end of the call."""

    def reply_all(self, messages: Sequence[bytes]) -> None:
        """Send *messages*, in order; ignored after the end of the call."""
        for message in messages:
            self.reply(message)

    def answer(self, message: bytes) -> None:
        """Send the one message of the call, and end it with status OK."""
        self.reply(message)
        self.finish()


class Listener(Protocol):
    """
    What an api wants to hear of a call. One thread at a time calls a listener.

    A listener may have on_messages(list) as well: then a transport that has several hands them over together.
    """

    def on_message(self, message: bytes) -> None: ...

    def on_half_close(self) -> None: ...

    def on_cancel(self) -> None: ...

    def on_drain(self) -> None: ...


Requests = Sequence[tuple[Call, bytes]]


# Compared by identity: a transport looks methods up for each call.
@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """
    One RPC method: its path, whether each side streams, and how a call of it begins: see `single`.

    gate: says why a call is refused, if it is.
    """

    path: str
    start: Callable[[Call], Listener]
    client_streams: bool = False
    server_streams: bool = False
    handle_all: Callable[[Requests], None] | None = None
    gate: Callable[[Call], ServerError | None] | None = None

    def refusal(self, call: Call) -> BaseException | None:
        """Return why *call* is refused, or None; a gate that fails lets nobody in."""
        if self.gate is None:
            return None
        try:
            return self.gate(call)
        except Exception as error:
            return error


Methods = Mapping[str, Method]


def is_late(deadline: float | None, now: float) -> bool:
    """Whether a caller that has gone went because of its deadline, and not for reasons of its own."""
    return deadline is not None and now >= deadline - _EARLY_S


def is_metadata(name: str, value: str | bytes) -> bool:
    """
    Whether gRPC can carry *value* under *name*.

    Names are made of 0-9, a-z, "_", "-" and "."; those that begin with "grpc-" are gRPC's, and a few are
    HTTP's. A name that ends in "-bin" goes with bytes, any other with printable ASCII.
    """
    if not _NAME.fullmatch(name) or name.startswith("grpc-") or name in _NAMES_OF_HTTP:
        return False
    if name.endswith("-bin"):
        return isinstance(value, bytes)
    return isinstance(value, str) and _TEXT.fullmatch(value) is not None


def check_metadata(metadata: Metadata) -> None:
    """Raise ValueError unless gRPC can carry *metadata*; spaces around a text will not be sent."""
    for name, value in metadata:
        if not is_metadata(name, value):
            raise ValueError(f"{name!r} with {value!r} is no metadata that gRPC can carry")


class UnaryListener:
    """One message -> handler(call, message), which answers when it can."""

    def __init__(self, call: Call, handler: Callable[[Call, bytes], None]) -> None:
        self._call = call
        self._handler = handler
        call.request(1)

    def on_message(self, message: bytes) -> None:
        try:
            self._handler(self._call, message)
        except Exception as error:
            self._call.fail(error)

    def on_half_close(self) -> None:
        pass

    def on_cancel(self) -> None:
        pass

    def on_drain(self) -> None:
        pass  # It was received, so it is answered.


def single(path: str, handler: Callable[[Call, bytes], None]) -> Method:
    """Return a method with one message each way; *handler* may answer later, from any thread."""

    def handle_all(requests: Requests) -> None:
        for call, message in requests:
            try:
                handler(call, message)
            except Exception as error:
                call.fail(error)

    return Method(path, lambda call: UnaryListener(call, handler), handle_all=handle_all)


def unary(path: str, answer: Callable[[bytes], bytes]) -> Method:
    """Return a method with one message each way whose *answer* is ready at once."""
    return single(path, lambda call, message: call.answer(answer(message)))
