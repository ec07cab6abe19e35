"""What a transport holds open at one moment, for whoever watches the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransportLoad:
    """Connections and streams that are open."""

    connections: int
    streams: int
