"""Flags of `nnclient load` -> LoadPlan, checked, and each process's share of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Literal

from nnclient.errors import InvalidInput
from nnclient.tls import TlsFiles
from nnclient.wire import OutputKind, Question

Mode = Literal["unary", "stream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """
    What to send, how fast and for how long. Raises InvalidInput for what makes no sense.

    concurrency: requests in flight in all, in a closed loop: each answer lets the next request go.
    rate_per_s: requests a second in all, in an open loop; None for a closed loop.
    rows: rows a request.
    data: .npy file to take the rows from; None for normally distributed numbers.
    timeout_s: time for each request, from when it is sent.
    processes: worker processes; each has one connection, and in stream mode one stream.
    """

    target: str
    tls: TlsFiles | None = None
    token: str | None = field(default=None, repr=False)
    allow_insecure_token: bool = False
    model: str
    version: str = ""
    output: OutputKind = "outputs"
    top_k: int = 1
    mode: Mode = "unary"
    concurrency: int = 32
    rate_per_s: float | None = None
    rows: int = 1
    warmup_s: float = 2.0
    duration_s: float = 10.0
    timeout_s: float = 10.0
    processes: int = 1
    data: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("concurrency", "rows", "processes"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("duration_s", "timeout_s"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}; expected more than 0")
        if not self.warmup_s >= 0:
            raise InvalidInput(f"warmup_s is {self.warmup_s}; expected at least 0")
        if self.rate_per_s is not None and not self.rate_per_s > 0:
            raise InvalidInput(f"rate is {self.rate_per_s}; expected more than 0")
        if self.rate_per_s is None and self.processes > self.concurrency:
            raise InvalidInput(
                f"{self.processes} processes cannot share a concurrency of {self.concurrency}; "
                "expected at least one request a process"
            )

    @property
    def question(self) -> Question:
        """What each request asks."""
        return Question(self.model, self.version, self.output, self.top_k)

    def share(self, worker: int) -> LoadPlan:
        """Return the part of process *worker*, from 0: its requests in flight, its rate, its seed."""
        more = worker < self.concurrency % self.processes
        return replace(
            self,
            concurrency=max(1, self.concurrency // self.processes + more),
            rate_per_s=None if self.rate_per_s is None else self.rate_per_s / self.processes,
            processes=1,
            seed=self.seed + worker,
        )


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_processes(concurrency: int, rate_per_s: float | None) -> int:
    """Return half of the cores, the other half being for the server, but no more than can be of use."""
    most = concurrency if rate_per_s is None else 8
    return max(1, min(usable_cores() // 2, most, 8))
