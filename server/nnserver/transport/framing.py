"""HTTP/2 headers and body bytes -> gRPC call heads and messages, and back: PROTOCOL-HTTP2 without sockets."""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

from nnserver.call import Metadata
from nnserver.errors import BadMessage, MessageTooLarge, Status

Headers = tuple[tuple[bytes, bytes], ...]

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# zlib's window sizes: gzip's wrapper, zlib's own ("deflate").
_WINDOW_BITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_RESERVED = frozenset((b"te", b"content-type"))
_PREFIX_BYTES = 5


class NotGrpc(Exception):
    """A request that is not gRPC; *http_status* answers it."""

    def __init__(self, http_status: bytes) -> None:
        super().__init__(http_status)
        self.http_status = http_status


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What the headers of a request say of the call."""

    path: bytes
    headers: Headers
    # None: the caller waits for ever.
    timeout_s: float | None
    # grpc-encoding of the messages; b"" for identity.
    encoding: bytes

    @property
    def has_known_encoding(self) -> bool:
        return not self.encoding or self.encoding in _WINDOW_BITS


def read_headers(headers: Headers) -> RequestHead:
    """Return the head of a gRPC call; raises NotGrpc for any other request."""
    path = method = content_type = encoding = b""
    timeout_s = None
    for name, value in headers:
        if name == b":path":
            path = value
        elif name == b":method":
            method = value
        elif name == b"content-type":
            content_type = value
        elif name == b"grpc-timeout":
            timeout_s = _timeout_s(value)
        elif name == b"grpc-encoding" and value != b"identity":
            encoding = value
    if method != b"POST":
        raise NotGrpc(b"405")
    if not content_type.startswith(b"application/grpc") or content_type[16:17] not in (b"", b"+", b";"):
        raise NotGrpc(b"415")
    return RequestHead(path, headers, timeout_s, encoding)


def metadata(headers: Iterable[tuple[bytes, bytes]]) -> Metadata:
    """Return the caller's own metadata: text, or bytes for names that end in -bin."""
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name.startswith((b":", b"grpc-")) or name in _RESERVED:
            continue
        key = name.decode("ascii", "replace")
        if name.endswith(b"-bin"):
            found.extend((key, part) for part in map(_decode_binary, value.split(b",")))
        else:
            found.append((key, value.decode("ascii", "replace")))
    return tuple(found)


def error_trailers(status: Status, text: str) -> Headers:
    """Return the trailers of a call that ends with *status*; *text* is percent-encoded UTF-8."""
    # Printable ASCII but '%' stands for itself, as PROTOCOL-HTTP2 has it.
    message = quote(text, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return (b"grpc-status", b"%d" % status), (b"grpc-message", message.encode("ascii"))


def frame(message: bytes) -> bytes:
    """Return *message* with gRPC's prefix: not compressed, and its length."""
    return b"\0" + len(message).to_bytes(4, "big") + message


class Assembler:
    """
    Body bytes in, however they were cut; whole messages out.

    limit: bytes of the largest message, before and after decompression.
    """

    __slots__ = ("_chunks", "_encoding", "_limit", "_size", "_start")

    def __init__(self, limit: int, encoding: bytes) -> None:
        self._limit = limit
        self._encoding = encoding
        # Joined only when a message is complete: joining at every chunk is quadratic in large
        # messages, and cutting the first chunk after every message is quadratic in small ones.
        self._chunks: list[bytes] = []
        self._start = 0  # Of what is left of the first chunk.
        self._size = 0  # Bytes left, over all chunks.

    @property
    def has_part(self) -> bool:
        """Whether bytes of an incomplete message, or of messages not taken yet, are held."""
        return self._size > 0

    def feed(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)

    def next_message(self) -> bytes | None:
        """
        Remove and return the next message; None if it is not complete.

        Raises MessageTooLarge or BadMessage; the stream cannot go on after either.
        """
        if self._size < _PREFIX_BYTES:
            return None
        head = self._first(_PREFIX_BYTES)
        start = self._start + _PREFIX_BYTES
        is_compressed = head[self._start]
        length = int.from_bytes(head[start - 4 : start], "big")
        if length > self._limit:
            raise MessageTooLarge(
                f"a message announced {length} bytes; this server takes much less (max_message_bytes)"
            )
        if self._size < _PREFIX_BYTES + length:
            return None
        head = self._first(_PREFIX_BYTES + length)
        start = self._start + _PREFIX_BYTES
        message = head[start : start + length]
        self._start = start + length
        self._size -= _PREFIX_BYTES + length
        if self._start == len(head):
            del self._chunks[0]
            self._start = 0
        return self._decompress(message) if is_compressed else message

    def _first(self, size: int) -> bytes:
        """Return the first chunk, joined with the others if it holds fewer than *size* bytes."""
        head = self._chunks[0]
        if len(head) - self._start < size:
            head = b"".join((memoryview(head)[self._start :], *self._chunks[1:]))
            self._chunks = [head]
            self._start = 0
        return head

    def _decompress(self, message: bytes) -> bytes:
        if not self._encoding:
            raise BadMessage("a message is marked as compressed, but grpc-encoding names no compression")
        inflater = zlib.decompressobj(_WINDOW_BITS[self._encoding])
        try:
            plain = inflater.decompress(message, self._limit + 1)
        except zlib.error:
            raise BadMessage(f"a message is not valid {self._encoding.decode()}") from None
        if len(plain) > self._limit:
            raise MessageTooLarge(
                f"a message has more than {self._limit} bytes when decompressed; "
                "this server takes much less (max_message_bytes)"
            )
        if not inflater.eof:
            raise BadMessage(f"a message is not complete {self._encoding.decode()}")
        return plain


def _timeout_s(value: bytes) -> float | None:
    found = _TIMEOUT.fullmatch(value)
    # A value that cannot be read is no deadline: the peer keeps its own clock.
    return int(found[1]) * _UNIT_S[found[2]] if found else None


def _decode_binary(value: bytes) -> bytes:
    value = value.strip()
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4))
    except binascii.Error:
        return b""
