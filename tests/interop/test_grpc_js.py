"""@grpc/grpc-js on Node.js against both transports over every kind of connection."""

from __future__ import annotations

import pytest
from interop import cases
from interop.cases import CASES
from interop.endpoints import OVER_TCP, Endpoint
from interop.programs import Program
from interop.wire import bytes_sent_to


@pytest.fixture(scope="session")
def outcomes(endpoint: Endpoint, grpc_js: Program) -> dict[str, str]:
    found: dict[str, str] = grpc_js.outcomes([*endpoint.arguments, *CASES])
    return found


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, outcomes: dict[str, str]) -> None:
    assert outcomes[case] == "ok"


@pytest.mark.parametrize("endpoint", OVER_TCP, ids="-".join, indirect=True)
def test_gzip_is_what_went_over_the_wire(endpoint: Endpoint, grpc_js: Program) -> None:
    """271,828 zeros take less than a tenth of that."""
    sent, outcomes = bytes_sent_to(
        endpoint.address, lambda address: grpc_js.outcomes(["--target", address, "gzip_unary"])
    )
    assert outcomes == {"gzip_unary": "ok"}
    assert sent < cases.LARGE_REQUEST_BYTES / 10
