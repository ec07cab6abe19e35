"""A failed call -> the pause before the next try, or the end of trying."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass

from nnclient.errors import DeadlineExceeded, InvalidInput, NnclientError, Overloaded, Unavailable

SERVICE = "nnproto.v1.Inference"

# What may pass while wait_ready waits.
WORTH_WAITING = (Unavailable, Overloaded, DeadlineExceeded)


class Deadline:
    """Seconds allowed -> seconds left, for a call of several tries."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        # Monotonic clock: wall time can step, and with it every deadline.
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float | None:
        """Return the seconds left, at least 0; None for no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def allows(self, pause_s: float) -> bool:
        """Return whether there is time for a pause and a try after it."""
        left_s = self.left_s()
        return left_s is None or pause_s < left_s


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """
    When and how often a call is tried again: exponential backoff with jitter, within the deadline.

    Inference changes nothing on the server, so that a call which met UNAVAILABLE may always be
    repeated. RESOURCE_EXHAUSTED is repeated only if the server says when (metadata grpc-retry-pushback-ms):
    without that, more requests are what it cannot use. Nothing else is repeated.

    attempts: tries in all, in [1, 5] (the gRPC core allows 5). For a stream: tries without an answer between.
    """

    attempts: int = 5
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 5:
            raise InvalidInput(f"attempts is {self.attempts}; expected 1 to 5")
        if not 0 < self.initial_backoff_s <= self.max_backoff_s:
            raise InvalidInput(
                f"initial_backoff_s is {self.initial_backoff_s}, max_backoff_s {self.max_backoff_s}; "
                "expected 0 < initial_backoff_s <= max_backoff_s"
            )
        if self.multiplier < 1:
            raise InvalidInput(f"multiplier is {self.multiplier}; expected at least 1")

    def pause_s(self, failures: int, retry_after_s: float | None = None) -> float | None:
        """
        Return the pause before the next try after *failures* failures in a row, or None to give up.

        retry_after_s: the pause that the server asked for, which then takes the place of the backoff.
        """
        if failures >= self.attempts:
            return None
        # Up to a fifth above or below, as in the core's own retries: clients that were thrown
        # out together do not come back together.
        jitter = random.uniform(0.8, 1.2)
        if retry_after_s is not None:
            return retry_after_s * max(jitter, 1.0)
        return min(self.initial_backoff_s * self.multiplier ** (failures - 1), self.max_backoff_s) * jitter

    def service_config(self) -> str:
        """
        Return the policy for the unary calls, as JSON for the gRPC core.

        The core's retries know about connections and the deadline, and need no code here.
        """
        names = ("Predict", "Differentiate", "ListModels", "GetModel")
        unary = [{"service": SERVICE, "method": name} for name in names]
        policy = {
            "maxAttempts": self.attempts,
            "initialBackoff": f"{self.initial_backoff_s:.9f}s",
            "maxBackoff": f"{self.max_backoff_s:.9f}s",
            "backoffMultiplier": self.multiplier,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        return json.dumps(
            {"methodConfig": [{"name": unary, "retryPolicy": policy}] if self.attempts > 1 else []}
        )

    def pause_before_retry(
        self, error: NnclientError, failures: int, deadline: Deadline, *, is_stream: bool
    ) -> float | None:
        """
        Return the pause before the call is tried again, or None if *error* is to be raised.

        failures: failed tries in a row, this one included.
        is_stream: the core retries unary calls that met UNAVAILABLE by itself, see service_config.
        """
        repeatable = isinstance(error, Unavailable) and is_stream
        told_when = isinstance(error, Overloaded) and error.retry_after_s is not None
        if not (repeatable or told_when):
            return None
        pause_s = self.pause_s(failures, error.retry_after_s)
        return pause_s if pause_s is not None and deadline.allows(pause_s) else None


class Patience:
    """
    Tries of wait_ready -> pauses between them, and in the end a message that says what was waited for.

    target, timeout_s: for the message and the limit.
    """

    # Often enough that a server is seen soon after it is up, seldom enough to cost nothing.
    FIRST_PAUSE_S = 0.05
    LONGEST_PAUSE_S = 0.5
    # A try may hang (a port that accepts and stays silent); the next one may not.
    LONGEST_TRY_S = 5.0

    def __init__(self, target: str, timeout_s: float) -> None:
        self._target = target
        self._deadline = Deadline(timeout_s)
        self._pause_s = self.FIRST_PAUSE_S

    def try_s(self) -> float:
        """Return the time for the next try."""
        return min(max(self._deadline.left_s() or 0.0, 0.01), self.LONGEST_TRY_S)

    def pause_s(self, error: NnclientError) -> float:
        """Return the pause after a try that failed with *error*. Raises DeadlineExceeded if time is up."""
        pause_s = self._pause_s
        if not self._deadline.allows(pause_s):
            raise DeadlineExceeded(
                f"waited {self._deadline.timeout_s:g} s for the server at {self._target} "
                f"to be ready: {error.message}"
            ) from error
        self._pause_s = min(2 * self._pause_s, self.LONGEST_PAUSE_S)
        return pause_s
