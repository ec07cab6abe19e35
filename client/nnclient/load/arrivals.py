"""A rate -> the times at which requests are due."""

from __future__ import annotations

import random
from collections.abc import Iterator


def poisson_arrivals(rate_per_s: float, start: float, seed: int) -> Iterator[float]:
    """
    Yield times after *start* without end, those of independent users: exponential gaps of mean 1 / rate.

    Several such streams together are one of the summed rate, so that processes need not agree.
    """
    gaps = random.Random(seed)
    time = start
    while True:
        time += gaps.expovariate(rate_per_s)
        yield time
