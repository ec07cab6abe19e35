"""gRPC statuses and texts -> exceptions whose messages help."""

from __future__ import annotations

import pickle

import grpc
import pytest

import nnclient
from nnclient.errors import (
    CLASS_OF_STATUS,
    InternalError,
    InvalidInput,
    MessageTooLarge,
    NnclientError,
    Overloaded,
    Unavailable,
    error_from_answer,
    error_from_status,
)

TARGET = "127.0.0.1:50051"


def message_of(status: str, details: str = "", **kwargs: object) -> str:
    return str(error_from_status(status, details, target=TARGET, **kwargs))  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_has_an_exception_that_names_it(code: grpc.StatusCode) -> None:
    """Whatever a server answers, the caller gets one of ours, with the status it had."""
    error = error_from_status(code.name, "why", target=TARGET)
    assert type(error) is CLASS_OF_STATUS.get(code.name, InternalError)
    assert error.status == code.name
    assert "why" in str(error)


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:50051: "
            "Failed to connect to remote host: Connection refused",
            f"no server answered at {TARGET} (connection refused); is nnserver running there?",
        ),
        (
            "failed to connect to all addresses; last error: FAILED_PRECONDITION: unix:/s: "
            "connect failed: addr: unix:/s error: No such file or directory",
            f"no server answered at {TARGET} (no such socket file); is nnserver running there?",
        ),
        (
            "errors resolving x.invalid:1: [field:hostname lookup error:"
            "address lookup failed for x.invalid:1: Domain name not found]",
            f"the host name in {TARGET} could not be resolved; is it spelled right?",
        ),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
            "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: WRONG_VERSION_NUMBER",
            f"the TLS handshake with {TARGET} failed; "
            "does the server use TLS, and do you trust its certificate?",
        ),
        (
            "failed to connect to all addresses; last error: INTERNAL: ipv4:127.0.0.1:1: "
            "Failed parsing HTTP/2 (Trying to connect an http1.x server (HTTP status 400))",
            f"{TARGET} answered, but not in gRPC; is that port an nnserver's, and does it use TLS?",
        ),
        (
            "recvmsg:Connection reset by peer",
            f"the connection to {TARGET} was lost (recvmsg:connection reset by peer); "
            "the server may have stopped or restarted",
        ),
        (
            "the server is draining",
            f"the server at {TARGET} is not available: the server is draining; try again later",
        ),
    ],
)
def test_unavailable_says_what_is_not_there(details: str, expected: str) -> None:
    """The core's text for a broken connection becomes one with the target and what to look at."""
    assert message_of("UNAVAILABLE", details) == expected


def test_too_large_names_the_servers_setting() -> None:
    """The core's refusal of a large message is no overload, and says which setting it hit."""
    error = error_from_status(
        "RESOURCE_EXHAUSTED",
        "SERVER: Received message larger than max (20000000 vs. 16777216)",
        target=TARGET,
    )
    assert type(error) is MessageTooLarge
    assert "--max-message-bytes" in str(error)
    assert "20,000,000" in str(error)


def test_too_large_in_the_servers_own_words_is_recognised() -> None:
    """A text that names --max-message-bytes is about size, not load."""
    text = "the message has 9 bytes; this server takes 8 (max_message_bytes, --max-message-bytes)"
    assert type(error_from_status("RESOURCE_EXHAUSTED", text, target=TARGET)) is MessageTooLarge


@pytest.mark.parametrize(
    ("value", "expected"), [("250", 0.25), ("0", 0.0), ("-5", None), ("soon", None), (None, None)]
)
@pytest.mark.parametrize("key", ["grpc-retry-pushback-ms", "retry-after-ms"])
def test_retry_hint_is_read_in_milliseconds(key: str, value: str | None, expected: float | None) -> None:
    """Either name is a pause in seconds; less than nothing and nonsense are no hints."""
    metadata = () if value is None else (("other", "1"), (key, value))
    error = error_from_status("RESOURCE_EXHAUSTED", "full", target=TARGET, trailing_metadata=metadata)
    assert type(error) is Overloaded
    assert error.retry_after_s == expected


def test_deadline_tells_the_time_given_and_the_servers_reason() -> None:
    """The core's "Deadline Exceeded" adds nothing; a server's text does."""
    assert message_of("DEADLINE_EXCEEDED", "Deadline Exceeded", timeout_s=0.5) == (
        f"no answer from {TARGET} within 0.5 s; allow more with timeout_s, or send fewer rows"
    )
    assert "(expired in the queue)" in message_of("DEADLINE_EXCEEDED", "expired in the queue")


def test_exceptions_fit_pythons_own() -> None:
    """Callers may catch ValueError and TimeoutError without knowing this package."""
    assert issubclass(nnclient.InvalidInput, ValueError)
    assert issubclass(nnclient.DeadlineExceeded, TimeoutError)
    assert issubclass(nnclient.MessageTooLarge, nnclient.InvalidInput)


def test_a_batchs_error_tells_its_index() -> None:
    """The index of the batch leads the message of its error."""
    error = error_from_answer(3, "bad shape", target=TARGET)
    assert (type(error), str(error)) == (InvalidInput, "bad shape")
    error.batch_index = 7
    assert str(error) == "batch 7: bad shape"


def test_exceptions_survive_pickling() -> None:
    """Worker processes send them to their parent whole."""
    error = Overloaded("full", status="RESOURCE_EXHAUSTED", retry_after_s=2.0)
    error.batch_index = 3
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.status, copy.retry_after_s) == (
        Overloaded,
        "batch 3: full",
        "RESOURCE_EXHAUSTED",
        2.0,
    )


def test_unknown_code_of_an_answer_is_internal() -> None:
    """A code that gRPC does not know is a fault of the server."""
    assert type(error_from_answer(99, "?", target=TARGET)) is InternalError
    assert isinstance(Unavailable("x"), NnclientError)
