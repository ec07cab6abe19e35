"""
gRPC status -> exception: one tree, with messages that a person can act on.

    NnclientError
    ├── InvalidInput (also a ValueError)    refused here before sending, or INVALID_ARGUMENT
    │   └── MessageTooLarge                 above the server's --max-message-bytes
    ├── NotFound                            NOT_FOUND, UNIMPLEMENTED
    ├── Overloaded                          RESOURCE_EXHAUSTED
    ├── DeadlineExceeded (a TimeoutError)   DEADLINE_EXCEEDED
    ├── Unavailable                         UNAVAILABLE, ABORTED
    ├── Unauthenticated                     UNAUTHENTICATED
    ├── PermissionDenied                    PERMISSION_DENIED
    ├── Cancelled                           CANCELLED
    └── InternalError                       anything else: a fault of the server or of this client
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import grpc


class NnclientError(Exception):
    """
    Base of everything that nnclient raises on purpose.

    status: name of the gRPC status ("NOT_FOUND"), or None if the fault was found before sending.
    batch_index: index in the stream's input of the batch that failed, or None outside of streams.
    retry_after_s: pause that the server asked for before the next try, or None.
    """

    def __init__(
        self, message: str, *, status: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.retry_after_s = retry_after_s
        self.batch_index: int | None = None

    def __str__(self) -> str:
        return self.message if self.batch_index is None else f"batch {self.batch_index}: {self.message}"


class InvalidInput(NnclientError, ValueError):
    """The request cannot be answered as it is; sending it again will not help."""


class MessageTooLarge(InvalidInput):
    """One message is larger than this client sends or the server accepts."""


class NotFound(NnclientError):
    """The server has no such model, version or service."""


class Overloaded(NnclientError):
    """The server's queue is full; try again later."""


class DeadlineExceeded(NnclientError, TimeoutError):
    """No answer came within the time given."""


class Unavailable(NnclientError):
    """No server answered, or it is starting up or draining."""


class Unauthenticated(NnclientError):
    """The server does not know who is asking."""


class PermissionDenied(NnclientError):
    """The server knows who is asking and refuses."""


class Cancelled(NnclientError):
    """The call was cancelled, by this side or by the server."""


class InternalError(NnclientError):
    """The server failed in a way that is not the request's fault, or broke the protocol."""


CLASS_OF_STATUS: dict[str, type[NnclientError]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "FAILED_PRECONDITION": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "NOT_FOUND": NotFound,
    "UNIMPLEMENTED": NotFound,
    "RESOURCE_EXHAUSTED": Overloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAVAILABLE": Unavailable,
    "ABORTED": Unavailable,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "CANCELLED": Cancelled,
}

# Trailing metadata by which a server that is overloaded says when to come back: gRPC's own (proposal A6),
# which nnserver sends, and what others do.
RETRY_AFTER_KEYS = ("grpc-retry-pushback-ms", "retry-after-ms")

_STATUS_OF_NUMBER = {code.value[0]: code.name for code in grpc.StatusCode}
_TOO_LARGE = re.compile(r"message larger than max \((\d+) vs\. (\d+)\)", re.IGNORECASE)
# The core's own words for a connection that never came about or broke; any other UNAVAILABLE
# is the server's text. Each: (pattern, what to tell instead).
_CONNECTION_FAULTS = [
    (
        r"handshake fail|SSL_ERROR|CERTIFICATE_VERIFY",
        "the TLS handshake with {target} failed; does the server use TLS, and do you trust its certificate?",
    ),
    (
        r"http1\.x server|Failed parsing HTTP/2",
        "{target} answered, but not in gRPC; is that port an nnserver's, and does it use TLS?",
    ),
    (
        r"errors? resolving|DNS resolution|address lookup|not known|Domain name",
        "the host name in {target} could not be resolved; is it spelled right?",
    ),
    (
        r"connection refused",
        "no server answered at {target} (connection refused); is nnserver running there?",
    ),
    (
        r"no such file",
        "no server answered at {target} (no such socket file); is nnserver running there?",
    ),
    (
        r"failed to connect|connect failed|connection attempt timed out|no route|unreachable",
        "no server answered at {target} ({cause}); is nnserver running there, and is it reachable from here?",
    ),
    (
        r"socket closed|connection (reset|aborted)|broken pipe|recvmsg|GOAWAY|transport closed|keepalive",
        "the connection to {target} was lost ({cause}); the server may have stopped or restarted",
    ),
]


def error_from_status(
    status: str,
    details: str,
    *,
    target: str,
    timeout_s: float | None = None,
    trailing_metadata: Iterable[tuple[str, Any]] | None = None,
) -> NnclientError:
    """
    Return the exception for a gRPC status.

    status: its name; details: its text, the server's or the gRPC core's.
    timeout_s: the time that the call was given, for the message.
    """
    too_large = _TOO_LARGE.search(details) if status == "RESOURCE_EXHAUSTED" else None
    if too_large:
        return MessageTooLarge(
            f"a message of {int(too_large[1]):,} bytes is larger than the server at {target} accepts "
            f"({int(too_large[2]):,}); send fewer rows at once (message_bytes), "
            "or start nnserver with a larger --max-message-bytes",
            status=status,
        )
    if status == "RESOURCE_EXHAUSTED" and "max-message-bytes" in details:
        return MessageTooLarge(
            f"{details} (message_bytes), or start nnserver with a larger limit", status=status
        )
    return CLASS_OF_STATUS.get(status, InternalError)(
        _message(status, details, target, timeout_s),
        status=status,
        retry_after_s=_retry_after_s(trailing_metadata) if status == "RESOURCE_EXHAUSTED" else None,
    )


def error_from_rpc(error: Any, *, target: str, timeout_s: float | None = None) -> NnclientError:
    """Return the exception for a grpc.RpcError or grpc.aio.AioRpcError."""
    return error_from_status(
        error.code().name,
        error.details() or "",
        target=target,
        timeout_s=timeout_s,
        trailing_metadata=error.trailing_metadata(),
    )


def error_from_answer(code: int, message: str, *, target: str, retry_after_ms: int = 0) -> NnclientError:
    """Return the exception for the Error of one response of a stream; retry_after_ms: 0 for no hint."""
    hint = ((RETRY_AFTER_KEYS[0], str(retry_after_ms)),) if retry_after_ms else ()
    return error_from_status(
        _STATUS_OF_NUMBER.get(code, "UNKNOWN"), message, target=target, trailing_metadata=hint
    )


def _message(status: str, details: str, target: str, timeout_s: float | None) -> str:
    match status:
        case "INVALID_ARGUMENT" | "FAILED_PRECONDITION" | "OUT_OF_RANGE" | "NOT_FOUND" if details:
            return details
        case "UNIMPLEMENTED":
            return (
                f"the server at {target} does not offer nnproto.v1.Inference "
                f"({details or 'unimplemented'}); is that port an nnserver's?"
            )
        case "RESOURCE_EXHAUSTED":
            return (
                f"the server at {target} is overloaded ({details or 'its queue is full'}); "
                "try again later, or send fewer requests at once"
            )
        case "DEADLINE_EXCEEDED":
            within = "in time" if timeout_s is None else f"within {timeout_s:g} s"
            # The core's own words add nothing; the server's do.
            cause = "" if not details or "deadline exceeded" in details.lower() else f" ({details})"
            return f"no answer from {target} {within}{cause}; allow more with timeout_s, or send fewer rows"
        case "UNAVAILABLE" | "ABORTED":
            return _unavailable_message(details, target)
        case "UNAUTHENTICATED":
            return (
                f"the server at {target} asks for credentials or refuses these "
                f"({details or 'unauthenticated'}); see Client(token=..., credentials=...)"
            )
        case "PERMISSION_DENIED":
            return f"the server at {target} does not allow this ({details or 'permission denied'})"
        case "CANCELLED":
            return f"the call to {target} was cancelled" + (f" ({details})" if details else "")
        case _:
            return f"the server at {target} failed: {details or 'no details'} ({status})"


def _unavailable_message(details: str, target: str) -> str:
    # "failed to connect to all addresses; last error: UNKNOWN: ipv4:…: Connection refused":
    # only what follows the last colon says something to a person.
    cause = details.rsplit(": ", 1)[-1].strip().rstrip(".").lower() or "unavailable"
    for pattern, text in _CONNECTION_FAULTS:
        if re.search(pattern, details, re.IGNORECASE):
            return text.format(target=target, cause=cause)
    return f"the server at {target} is not available: {details or 'it gave no reason'}; try again later"


def _retry_after_s(metadata: Iterable[tuple[str, Any]] | None) -> float | None:
    for key, value in metadata or ():
        if key in RETRY_AFTER_KEYS:
            try:
                milliseconds = float(value)
            except ValueError:
                return None
            # Less than nothing: do not come back, says the proposal.
            return milliseconds / 1000 if milliseconds >= 0 else None
    return None
