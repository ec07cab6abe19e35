"""
TLS records in, plaintext to a protocol, and back: TLS between a socket's transport and an asyncio.Protocol.

Event loops have such layers of their own, which show a connection only once its handshake is over: until
then nobody counts it, ends it in time or closes it when the loop ends. This one is there from the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from typing import Any, Protocol, cast

logger = logging.getLogger(__name__)

_READ_BYTES = 256 << 10


class PlainProtocol(Protocol):
    """What a TLS layer tells the protocol within it; see asyncio.Protocol."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def eof_received(self) -> bool | None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...


class TlsLayer(asyncio.Transport, asyncio.Protocol):
    """
    A protocol to the socket's transport, and a transport to *inner*.

    What *inner* writes before the end of the handshake is kept until then; it should be little. A peer
    that does not choose *alpn* is let go.
    """

    def __init__(self, context: ssl.SSLContext, alpn: str, inner: PlainProtocol) -> None:
        super().__init__()
        self._inner = inner
        self._alpn = alpn
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._is_shaking_hands = True
        self._early: list[bytes] = []
        self._socket: asyncio.Transport

    # What the socket's transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast(asyncio.Transport, transport)
        self._inner.connection_made(self)

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        try:
            if self._is_shaking_hands:
                self._tls.do_handshake()
                self._is_shaking_hands = False
                if self._tls.selected_alpn_protocol() != self._alpn:
                    self.abort()
                    return
                early, self._early = self._early, []
                for piece in early:
                    self._tls.write(piece)
                self._send()
            plain, is_over = self._read()
        except ssl.SSLWantReadError:
            self._send()
            return
        except ssl.SSLError as error:
            logger.info("TLS failed reason=%s", error.reason or error)
            self._send()  # The alert that says why.
            self._socket.close()
            return
        self._send()
        if plain:
            self._inner.data_received(plain)
        if is_over:
            self.close()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    # What the inner protocol calls.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_shaking_hands:
            self._early.append(bytes(data))
        elif data:
            try:
                self._tls.write(data)
            except ssl.SSLError as error:  # After the goodbye of either side.
                logger.info("TLS failed reason=%s", error.reason or error)
                self.abort()
                return
            self._send()

    def close(self) -> None:
        if not self._is_shaking_hands:
            # Says goodbye, and does not wait for the peer's: HTTP/2's own end was said before.
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._send()
        self._socket.close()

    def abort(self) -> None:
        self._socket.abort()

    def is_closing(self) -> bool:
        return self._socket.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peercert":
            return self._tls.getpeercert()
        return self._socket.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._socket.pause_reading()

    def resume_reading(self) -> None:
        self._socket.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._socket.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._socket.get_write_buffer_size()

    def _read(self) -> tuple[bytes, bool]:
        """Return all plaintext that there is, and whether the peer has said goodbye."""
        pieces = []
        try:
            while piece := self._tls.read(_READ_BYTES):
                pieces.append(piece)
        except ssl.SSLWantReadError:
            return b"".join(pieces), False
        except ssl.SSLZeroReturnError:
            pass
        return b"".join(pieces), True

    def _send(self) -> None:
        data = self._outgoing.read()
        if data and not self._socket.is_closing():
            self._socket.write(data)
