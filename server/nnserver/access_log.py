"""
Requests that have ended in, lines of the access log out: for a share of them, and for every fault of ours.

A line says which request, of what kind, for which model, with how many rows, how it ended and how long it
took: from its decoding to the moment its answer was handed over. No rows, no tokens.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass

from nnserver.call import Metadata
from nnserver.errors import Status
from nnserver.log_format import ACCESS_LOG

logger = logging.getLogger(ACCESS_LOG)

REQUEST_ID = "x-request-id"
# Ids are their clients': whole, but not however long.
_MOST_ID = 128


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What is known of a request. Model and version are empty if none that is served was named."""

    kind: str
    model: str
    version: str
    rows: int
    # As its client calls it; empty if it has no name.
    id: str


def request_id(own: str, metadata: Metadata) -> str:
    """Return a request's id: its *own*, else its call's x-request-id, else one made here."""
    given = own or next((value for name, value in metadata if name == REQUEST_ID), "")
    return str(given)[:_MOST_ID] or secrets.token_hex(8)


def log_request(facts: RequestFacts, metadata: Metadata, status: Status, seconds: float) -> None:
    """Write one line: at INFO, or at ERROR if the server is at fault."""
    logger.log(
        logging.ERROR if is_fault(status) else logging.INFO,
        "request",
        extra={
            "facts": {
                "request_id": request_id(facts.id, metadata),
                "kind": facts.kind,
                "model": facts.model,
                "version": facts.version,
                "status": status.name,
                "rows": facts.rows,
                "time_ms": round(seconds * 1e3, 3),
            }
        },
    )


def is_fault(status: Status) -> bool:
    """Whether the server, not its client, is to be asked why a request failed."""
    return status in (Status.INTERNAL, Status.UNKNOWN, Status.DATA_LOSS)
