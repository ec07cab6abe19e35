"""A connection that carries more than its HTTP/2 window, call after call, never stands still."""

from __future__ import annotations

import numpy as np
from support.server import Stub, request, rows

# 16 KiB a request: the server's window of a connection is 16 MiB.
X = np.zeros((64, 64), np.float32)
CALLS = 1300


def test_unary_calls_give_the_connections_window_back(stub: Stub) -> None:
    """Bytes of a call that is over are no longer held, also if its answer came later than its end."""
    for _ in range(CALLS):
        assert rows(stub.predict(request(X), timeout=20)).shape == (64, 10)
