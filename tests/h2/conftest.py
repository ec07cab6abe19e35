"""One server of the test api for each event loop, shared by the tests that leave it as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from support.h2 import RawClient, Running, serving

LOOPS = ("uvloop", "asyncio")


@pytest.fixture(scope="module", params=LOOPS)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A server on a loop of uvloop's, and on one of asyncio's, as where uvloop is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "asyncio":
            patch.setitem(sys.modules, "uvloop", None)
        with serving() as found:
            yield found


@pytest.fixture
def client(running: Running) -> Iterator[RawClient]:
    """A connection of the test's own; after it the server holds nothing."""
    with running.client() as found:
        yield found
    running.wait_until_idle()
