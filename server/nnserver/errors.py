"""
A failure in, its gRPC status out: the server's one tree of errors.

    ServerError
      InvalidArgument    -> INVALID_ARGUMENT     what was wrong, what was expected
      NotFound           -> NOT_FOUND            unknown model or version
      LoadFailed         -> FAILED_PRECONDITION  a model that cannot be loaded, and why
      Unauthenticated    -> UNAUTHENTICATED      what is missing or not known; never what was sent
      PermissionDenied   -> PERMISSION_DENIED    names the setting or the scope
      QueueFull          -> RESOURCE_EXHAUSTED   at once, with the time after which to try again
        NotInTime        -> RESOURCE_EXHAUSTED   likewise: it could not be answered by its deadline
      MessageTooLarge    -> RESOURCE_EXHAUSTED   names the setting
      TooManyStreams     -> RESOURCE_EXHAUSTED   names the setting
      TooManyCalls       -> RESOURCE_EXHAUSTED   names the setting
      RateExceeded       -> RESOURCE_EXHAUSTED   says when to come back
      Expired            -> DEADLINE_EXCEEDED    no compute was spent
      Cancelled          -> CANCELLED            the caller went away
      Draining           -> UNAVAILABLE          another server may answer
      KernelFault        -> INTERNAL             generic text; logged where it happened, once a batch
      Unimplemented      -> UNIMPLEMENTED        unknown method, encoding or message count
      BadMessage         -> INTERNAL             the peer broke gRPC's framing
    anything else        -> INTERNAL             generic text; the detail goes to the log

ConfigError is for the operator at start and never reaches a client.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from enum import IntEnum

logger = logging.getLogger(__name__)


class Status(IntEnum):
    """The gRPC status codes, by their numbers on the wire."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ServerError(Exception):
    """
    A failure whose text is fit for a client; *status* is what it is on the wire.

    retry_after_s: the pause after which to try again, if there is something to say about it.
    """

    status = Status.INTERNAL
    retry_after_s: float | None = None


class InvalidArgument(ServerError):
    status = Status.INVALID_ARGUMENT


class NotFound(ServerError):
    status = Status.NOT_FOUND


class LoadFailed(ServerError):
    status = Status.FAILED_PRECONDITION


class Unauthenticated(ServerError):
    status = Status.UNAUTHENTICATED


class PermissionDenied(ServerError):
    status = Status.PERMISSION_DENIED


class QueueFull(ServerError):
    """*retry_after_s*: when there is likely to be room."""

    status = Status.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotInTime(QueueFull):
    """What waits already would keep the request past its deadline."""


class MessageTooLarge(ServerError):
    status = Status.RESOURCE_EXHAUSTED


class TooManyStreams(ServerError):
    status = Status.RESOURCE_EXHAUSTED


class TooManyCalls(ServerError):
    status = Status.RESOURCE_EXHAUSTED


class RateExceeded(ServerError):
    status = Status.RESOURCE_EXHAUSTED

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class Unimplemented(ServerError):
    status = Status.UNIMPLEMENTED


class BadMessage(ServerError):
    status = Status.INTERNAL


class Expired(ServerError):
    status = Status.DEADLINE_EXCEEDED


class Cancelled(ServerError):
    status = Status.CANCELLED


class Draining(ServerError):
    status = Status.UNAVAILABLE


# How many errors of each status clients were told, for metrics.
_told: Counter[Status] = Counter()
_told_lock = threading.Lock()


def errors_told() -> dict[Status, int]:
    """Return how many errors of each status this process has told its clients."""
    with _told_lock:
        return dict(_told)


def status_of(error: BaseException) -> Status:
    """Return the status that *error* is on the wire."""
    return error.status if isinstance(error, ServerError) else Status.INTERNAL


def blame_model(error: Exception, name: str, version: str) -> None:
    """Note which model *error* is about: one that is served, not whatever a client has named."""
    error.about_model = name, version  # type: ignore[attr-defined]


def blamed_model(error: BaseException) -> tuple[str, str]:
    """Return name and version of the model that *error* is about; empty if it is about none."""
    about: tuple[str, str] = getattr(error, "about_model", ("", ""))
    return about


INTERNAL_TEXT = "internal error; the server's log has the details"


class KernelFault(ServerError):
    def __init__(self) -> None:
        super().__init__(INTERNAL_TEXT)


class ConfigError(Exception):
    """A setting, model file or address that the server cannot start with."""


def retry_after_ms(error: BaseException) -> int | None:
    """Return the milliseconds after which to try again, rounded up, if *error* says so."""
    if isinstance(error, ServerError) and error.retry_after_s is not None:
        return math.ceil(1e3 * error.retry_after_s)
    return None


def status_and_text(error: BaseException) -> tuple[Status, str]:
    """
    Return what a client may know of *error*; log the rest.

    A client's mistake is logged at INFO, ours at ERROR with its traceback.
    """
    with _told_lock:
        _told[status_of(error)] += 1
    if isinstance(error, ServerError):
        logger.info("request failed status=%s reason=%s", error.status.name, error)
        return error.status, str(error)
    logger.error("internal error", exc_info=error)
    return Status.INTERNAL, INTERNAL_TEXT
