"""HTTP/2 headers and body bytes -> gRPC call heads and messages, and back: PROTOCOL-HTTP2 without sockets."""

from __future__ import annotations

import base64
import binascii
import gzip
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

from nnserver.call import Metadata, is_metadata
from nnserver.errors import BadMessage, Expired, MessageTooLarge, ServerError, Status, Unimplemented

Headers = tuple[tuple[bytes, bytes], ...]

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# zlib's window sizes: gzip's wrapper, zlib's own ("deflate").
_WINDOW_BITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_OUTER_SPACES = re.compile(rb"^ | $")
_PLAIN = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"
# What is left at the end when percent-encoded UTF-8 is cut anywhere: part of a %XX, then a character
# that lacks continuation bytes (%80 to %BF).
_CUT_CHARACTER = re.compile(
    rb"(?:%[C-F][0-9A-F]|%E[0-9A-F](?:%[89AB][0-9A-F])?|%F[0-9A-F](?:%[89AB][0-9A-F]){0,2})?(?:%.?)?$"
)
# Before each message: whether it is compressed, and its length.
PREFIX_BYTES = 5
# What two objects and the pair of them take up beside the bytes of a field.
_FIELD_BYTES = 128
# Of grpc-message, as encoded: clients take 8 KiB of headers and trailers.
_TEXT_BYTES = 4096
# Pieces of a body below this size are put together as they come: as objects of their own, two bytes
# would take up sixty.
_SMALL_BYTES = 1024
_JOINED_BYTES = 64 << 10

# Answers of these sizes are compressed, if asked for: below it is not worth it, and above it would keep
# the event loop for more than some 20 ms.
_LEAST_COMPRESSED_BYTES = 1 << 10
_MOST_COMPRESSED_BYTES = 1 << 20

ACCEPT_ENCODING = (b"grpc-accept-encoding", b"identity,deflate,gzip")
GZIP_ENCODING = (b"grpc-encoding", b"gzip")


class NotGrpc(Exception):
    """A request that is not gRPC; *headers* answer it."""

    def __init__(self, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(headers)
        self.headers = headers


class UnknownEncoding(Unimplemented):
    """Messages are compressed in a way that is not known; the answer names those that are."""

    def __init__(self) -> None:
        super().__init__("unknown grpc-encoding; this server takes identity, gzip and deflate")


class BadTimeout(ServerError):
    """A deadline that cannot be read: to serve the call without one could be to serve it for ever."""

    def __init__(self) -> None:
        super().__init__("grpc-timeout must be at most eight digits and one of the units H, M, S, m, u and n")


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What the headers of a request say of the call."""

    path: bytes
    headers: Headers
    # None: the caller waits for ever.
    timeout_s: float | None
    # grpc-encoding of the messages; b"" for identity.
    encoding: bytes
    # Whether answers are compressed with gzip.
    compresses: bool = False
    # What the headers take up in memory, about.
    size: int = 0
    # Why the call cannot be served, if the headers say enough to tell.
    fault: ServerError | None = None


def read_headers(headers: Headers, may_compress: bool = False) -> RequestHead:
    """
    Return the head of a gRPC call; raises NotGrpc for any other request.

    may_compress: whether answers are compressed for a caller that takes gzip.
    """
    path = method = content_type = encoding = b""
    compresses = False
    timeout_s: float | None = None
    fault: ServerError | None = None
    size = 0
    for name, value in headers:
        size += len(name) + len(value) + _FIELD_BYTES
        if name == b":path":
            path = value
        elif name == b":method":
            method = value
        elif name == b"content-type":
            content_type = value
        elif name == b"grpc-timeout":
            timeout_s = _timeout_s(value)
            if not timeout_s:
                fault = BadTimeout() if timeout_s is None else Expired("the deadline passed before it began")
        elif name == b"grpc-encoding" and value != b"identity":
            encoding = value
            if value not in _WINDOW_BITS:
                fault = UnknownEncoding()
        elif may_compress and name == b"grpc-accept-encoding":
            compresses = b"gzip" in (part.strip() for part in value.split(b","))
    if method != b"POST":
        raise NotGrpc((b":status", b"405"), (b"allow", b"POST"))
    if not content_type.startswith(b"application/grpc") or content_type[16:17] not in (b"", b"+", b";"):
        raise NotGrpc((b":status", b"415"))
    return RequestHead(path, headers, timeout_s, encoding, compresses, size, fault)


def metadata(headers: Iterable[tuple[bytes, bytes]]) -> Metadata:
    """
    Return the caller's own metadata: text, or bytes for names that end in -bin.

    What gRPC could not carry back is left out: HTTP allows more in headers than gRPC does.
    """
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        key = name.decode("ascii", "replace")
        values: Iterable[str | bytes | None] = (value.decode("ascii", "replace"),)
        if name.endswith(b"-bin"):
            values = map(_decode_binary, value.split(b","))
        found.extend((key, item) for item in values if item is not None and is_metadata(key, item))
    return tuple(found)


def metadata_headers(metadata: Metadata) -> Headers:
    """Return *metadata* as headers: bytes in base64, not padded, as PROTOCOL-HTTP2 would have it."""
    return tuple(
        (
            name.encode(),
            # HTTP allows no spaces around a value.
            base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.strip(" ").encode(),
        )
        for name, value in metadata
    )


def error_trailers(status: Status, text: str) -> Headers:
    """Return the trailers of a call that ends with *status*; *text* is percent-encoded UTF-8."""
    # Printable ASCII but '%' stands for itself, as PROTOCOL-HTTP2 has it. What cannot be encoded
    # becomes a question mark: the status must arrive.
    message = quote(text[:_TEXT_BYTES], safe=_PLAIN, errors="replace").encode("ascii")
    if len(message) > _TEXT_BYTES:
        message = _CUT_CHARACTER.sub(b"", message[:_TEXT_BYTES])
    message = _OUTER_SPACES.sub(b"%20", message)  # HTTP allows none around a value.
    found = ((b"grpc-status", b"%d" % status), (b"grpc-message", message))
    return found if message else found[:1]


def prefix(message: bytes) -> bytes:
    """Return what goes before *message*: that it is not compressed, and its length."""
    # One number less than five bytes long, for the price of a method call.
    return len(message).to_bytes(PREFIX_BYTES, "big")


def compressed(message: bytes) -> tuple[bytes, bytes]:
    """Return *message* behind its prefix, compressed with gzip if that is worth it."""
    if _LEAST_COMPRESSED_BYTES <= len(message) <= _MOST_COMPRESSED_BYTES:
        body = gzip.compress(message, compresslevel=1, mtime=0)
        if len(body) < len(message):
            return b"\1" + len(body).to_bytes(PREFIX_BYTES - 1, "big"), body
    return prefix(message), message


class Assembler:
    """
    Body bytes in, however they were cut; whole messages out.

    limit: bytes of the largest message as sent.  plain_limit: of the largest when decompressed.
    size: bytes held, of messages that were not taken or are not complete.
    """

    __slots__ = ("_chunks", "_encoding", "_limit", "_plain_limit", "_start", "size")

    def __init__(self, limit: int, plain_limit: int, encoding: bytes) -> None:
        self.size = 0
        self._limit = limit
        self._plain_limit = plain_limit
        self._encoding = encoding
        # Joined only when a message is complete: joining at every chunk is quadratic in large
        # messages, and cutting the first chunk after every message is quadratic in small ones.
        self._chunks: list[bytes | bytearray] = []
        self._start = 0  # Of what is left of the first chunk.

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        self.size += len(data)
        chunks = self._chunks
        if chunks and len(data) < _SMALL_BYTES:
            last = chunks[-1]
            if type(last) is bytearray and len(last) < _JOINED_BYTES:
                last += data
            else:
                chunks.append(bytearray(data))
        else:
            chunks.append(data)

    def clear(self) -> None:
        """Forget what is held."""
        self._chunks.clear()
        self._start = self.size = 0

    def next_message(self) -> bytes | None:
        """
        Remove and return the next message; None if it is not complete.

        Raises MessageTooLarge or BadMessage; the stream cannot go on after either.
        """
        if self.size < PREFIX_BYTES:
            self._trim()
            return None
        head = self._first(PREFIX_BYTES)
        start = self._start + PREFIX_BYTES
        is_compressed = head[self._start]
        if is_compressed > 1:
            raise BadMessage(f"a message begins with {is_compressed}; expected 0, or 1 if it is compressed")
        length = int.from_bytes(head[start - 4 : start], "big")
        if length > self._limit:
            raise MessageTooLarge(
                f"a message announced {length} bytes; this server takes much less (max_message_bytes)"
            )
        if self.size < PREFIX_BYTES + length:
            self._trim()
            return None
        message = self._cut(length)
        return self._decompress(message) if is_compressed else message

    def take_messages(self, most: int) -> list[bytes]:
        """
        Remove and return up to *most* messages, as far as they are complete.

        Raises what next_message raises, once every message before the fault was returned.
        """
        chunks = self._chunks
        messages: list[bytes] = []
        if len(chunks) > 1 and self.size < _JOINED_BYTES and len(chunks[0]) - self._start >= PREFIX_BYTES:
            # Messages in frames of their own, as most clients send them: to be cut out of one piece.
            start = self._start
            if self.size >= PREFIX_BYTES + int.from_bytes(chunks[0][start : start + PREFIX_BYTES], "big"):
                self._first(self.size)
                chunks = self._chunks
        if chunks and type(chunks[0]) is bytes:
            # Those that lie in the first chunk as they are, which is nearly all of them.
            chunk = chunks[0]
            start, end, limit = self._start, len(chunk), self._limit
            while len(messages) < most and end - start >= PREFIX_BYTES:
                content = start + PREFIX_BYTES
                # As one number: a message that is compressed counts as too long here.
                stop = content + int.from_bytes(chunk[start:content], "big")
                if stop > end or stop - content > limit:
                    break
                messages.append(chunk[content:stop])
                start = stop
            self.size -= start - self._start
            self._start = start
            if start == end:
                del chunks[0]
                self._start = 0
        if not messages and (message := self.next_message()) is not None:
            messages.append(message)
        return messages

    def _cut(self, length: int) -> bytes:
        """Remove the first message, which is complete, and its prefix; return it, copied once."""
        chunks = self._chunks
        start = self._start + PREFIX_BYTES
        self.size -= PREFIX_BYTES + length
        pieces: list[memoryview] = []
        missing = length
        used = 0
        for chunk in chunks:
            piece = memoryview(chunk)[start : start + missing]
            pieces.append(piece)
            missing -= len(piece)
            if start + len(piece) < len(chunk):
                start += len(piece)  # Where the next message begins.
                break
            start = 0
            used += 1
            if not missing:
                break
        del chunks[:used]
        self._start = start
        return b"".join(pieces)

    def _trim(self) -> None:
        """Let go of messages that were taken: they may be a megabyte before a few bytes."""
        if self._start >= _JOINED_BYTES:
            self._chunks[0] = self._chunks[0][self._start :]
            self._start = 0

    def _first(self, size: int) -> bytes:
        """Return the first chunk, joined with the others if it holds fewer than *size* bytes."""
        head = self._chunks[0]
        if type(head) is bytes and len(head) - self._start >= size:
            return head
        whole = b"".join((memoryview(head)[self._start :], *self._chunks[1:]))
        self._chunks = [whole]
        self._start = 0
        return whole

    def _decompress(self, message: bytes) -> bytes:
        if not self._encoding:
            raise BadMessage("a message is marked as compressed, but grpc-encoding names no compression")
        inflater = zlib.decompressobj(_WINDOW_BITS[self._encoding])
        try:
            plain = inflater.decompress(message, self._plain_limit + 1)
        except zlib.error:
            raise BadMessage(f"a message is not valid {self._encoding.decode()}") from None
        if len(plain) > self._plain_limit:
            raise MessageTooLarge(
                f"a message has more than {self._plain_limit} bytes when decompressed, the most that this "
                "server takes (max_message_bytes, --max-message-bytes); send fewer rows a message"
            )
        if not inflater.eof or inflater.unused_data:
            raise BadMessage(f"a message is not exactly one piece of {self._encoding.decode()}")
        return plain


def _timeout_s(value: bytes) -> float | None:
    """Return the seconds of a grpc-timeout; None if it cannot be read."""
    found = _TIMEOUT.fullmatch(value)
    return int(found[1]) * _UNIT_S[found[2]] if found else None


def _decode_binary(value: bytes) -> bytes | None:
    """Return what *value* is the base64 of, padded or not; None if it is not base64."""
    value = value.strip()
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        return None
