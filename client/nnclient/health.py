"""
Health check request and response <-> bytes, for service grpc.health.v1.Health.

Two messages of one field each, written by hand: the package grpcio-health-checking, which holds
them, asks for the newest protobuf, and with it this client could not live beside libraries that
need an older one.
"""

from __future__ import annotations

from nnclient.errors import Unavailable

CHECK_METHOD = "/grpc.health.v1.Health/Check"

# HealthCheckRequest{service = ""}: the whole server. Every field at its default takes no bytes.
CHECK_REQUEST = b""

# HealthCheckResponse{status = SERVING}: field 1, an enum; SERVING is 1.
_SERVING = b"\x08\x01"


def raise_unless_serving(response: bytes, target: str) -> None:
    """Raise Unavailable if a HealthCheckResponse says anything else than SERVING."""
    if response != _SERVING:
        raise Unavailable(
            f"the server at {target} answers, but is not serving yet, or not any more", status="UNAVAILABLE"
        )
