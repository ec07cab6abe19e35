"""A seed in, what a peer does out: conversations cut, spliced and spoiled, and the moments between."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from support.h2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    block,
    literal,
    prefixed,
)

# What a peer does: send bytes. What else happens meanwhile: it stops reading, and goes on; the api answers
# what waits; that many seconds pass; the server begins to drain, and then to insist.
STOP_READING, READ, ANSWER, DRAIN = "stop reading", "read", "answer", "drain"
Step = bytes | str | float
_MOMENTS: tuple[Step, ...] = (STOP_READING, STOP_READING, READ, ANSWER, ANSWER, DRAIN, DRAIN, 0.1, 12.0, 70.0)

_METHODS = [
    f"/f/{name}".encode()
    for name in (
        "Echo",
        "Plain",
        "Wait",
        "Later",
        "Fail",
        "Grow",
        "Info",
        "Count",
        "Collect",
        "Chat",
        "Chat64",
    )
]
_METHODS += [
    *(
        b"/nnproto.v1.Inference/Predict",
        b"/nnproto.v1.Inference/PredictStream",
        b"/grpc.health.v1.Health/Watch",
    ),
    *(b"/inference.GRPCInferenceService/ModelInfer", b"/inference.GRPCInferenceService/ModelStreamInfer"),
]
_EDGES = (0, 1, 2, 3, 4, 5, 6, 8, 0xFF, 0x4000, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_FIELDS = (
    (b"grpc-timeout", b"1n"),
    (b"grpc-timeout", b"50m"),
    (b"grpc-timeout", b"-1S"),
    (b"grpc-encoding", b"gzip"),
    (b"grpc-encoding", b"deflate"),
    (b"grpc-encoding", b"snappy"),
    (b"content-length", b"5"),
    (b"x-bin", b"AAEC,AQ,=,%"),
    (b"X-Upper", b"v"),
    (b"connection", b"close"),
    (b"te", b"gzip"),
    (b":path", b"/f/Echo"),
    (b"x-long", bytes(200)),
    (b"x-longer", b"v" * 9000),
)


@dataclass(slots=True)
class Frame:
    """One frame whose length may be a lie."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes
    length_error: int = 0

    def bytes(self) -> bytes:
        length = (len(self.payload) + self.length_error) & 0xFFFFFF
        head = struct.pack(">IBBI", length, self.kind, self.flags, self.stream_id & 0xFFFFFFFF)
        return head[1:] + self.payload

    def copy(self) -> Frame:
        return Frame(self.kind, self.flags, self.stream_id, self.payload, self.length_error)


@dataclass(slots=True)
class Input:
    """
    What one peer does, step by step.

    name: of the conversation it is made of.  is_whole: nothing but the cuts between reads was changed, so
    the answers must be those of the conversation.
    """

    name: str
    steps: list[Step]
    is_whole: bool = False
    edits: list[str] = field(default_factory=list)


def frames_of(data: bytes) -> list[Frame]:
    """The frames of what a client has sent, without the preface."""
    found = []
    at = len(PREFACE)
    while at < len(data):
        size = int.from_bytes(data[at : at + 3], "big")
        stream_id = int.from_bytes(data[at + 5 : at + 9], "big")
        found.append(Frame(data[at + 3], data[at + 4], stream_id, data[at + 9 : at + 9 + size]))
        at += 9 + size
    return found


class Mutator:
    """Makes inputs of *conversations*: the same one for the same seed."""

    def __init__(self, conversations: dict[str, list[bytes]]) -> None:
        self._frames = {name: frames_of(b"".join(sent)) for name, sent in conversations.items()}
        self._names = sorted(conversations)

    def input(self, seed: int) -> Input:
        """The input of *seed*."""
        rng = random.Random(seed)
        name = rng.choice(self._names)
        frames = [found.copy() for found in self._frames[name]]
        edits: list[str] = []
        kind = rng.random()
        if kind < 0.08:
            return Input(name, self._cut(rng, PREFACE + b"".join(f.bytes() for f in frames)), True)
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
            edit = rng.choice(_EDITS)
            edits.append(edit.__name__.strip("_"))
            edit(rng, frames, self._frames[rng.choice(self._names)])
        data = PREFACE + b"".join(f.bytes() for f in frames)
        if kind < 0.25:
            edits.append("bytes")
            data = _spoil(rng, data)
        steps = self._cut(rng, data)
        if rng.random() < 0.4:
            edits.append("moments")
            for _ in range(rng.choice((1, 2, 4))):
                steps.insert(rng.randrange(len(steps) + 1), rng.choice(_MOMENTS))
        return Input(name, steps, False, edits)

    def _cut(self, rng: random.Random, data: bytes) -> list[Step]:
        """*data* as a socket may give it: whole, or in pieces of any size."""
        if rng.random() < 0.3:
            return [data]
        if len(data) < 400 and rng.random() < 0.1:
            return [data[i : i + 1] for i in range(len(data))]
        edges = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((1, 2, 5, 20))))
        return [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True) if a < b]


def _drop(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    if frames:
        start = rng.randrange(len(frames))
        del frames[start : start + rng.choice((1, 1, 1, 2, 4))]


def _duplicate(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    if frames:
        found = rng.choice(frames)
        frames.insert(rng.randrange(len(frames) + 1), found.copy())


def _flood(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    """The same frame many times over."""
    found = rng.choice(frames) if frames and rng.random() < 0.6 else _any_frame(rng, frames)
    if len(found.payload) < 2000:
        at = rng.randrange(len(frames) + 1)
        frames[at:at] = [found] * rng.choice((10, 50, 200))


def _swap(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    if frames:
        i, j = rng.randrange(len(frames)), rng.randrange(len(frames))
        frames[i], frames[j] = frames[j], frames[i]


def _kind(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    if frames:
        rng.choice(frames).kind = rng.choice((*range(10), 0x10, 0xFF))


def _flags(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    if frames:
        found = rng.choice(frames)
        found.flags = rng.choice((found.flags ^ (1 << rng.randrange(8)), rng.randrange(256)))


def _stream(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    if frames:
        found = rng.choice(frames)
        found.stream_id = rng.choice(
            (
                0,
                1,
                2,
                3,
                5,
                7,
                found.stream_id + 2,
                found.stream_id - 2,
                0x7FFFFFFF,
                rng.choice(frames).stream_id,
            )
        )


def _length(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    if frames:
        rng.choice(frames).length_error = rng.choice((-9, -5, -1, 1, 4, 9, 1000, 0x7FFFFF))


def _shorten(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    if frames:
        found = rng.choice(frames)
        found.payload = found.payload[: rng.randrange(len(found.payload) + 1)]


def _lengthen(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    if frames:
        rng.choice(frames).payload += rng.randbytes(rng.choice((1, 4, 5, 100)))


def _number(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    """Four bytes of a payload become a number that is an edge of something."""
    if frames:
        found = rng.choice(frames)
        at = rng.randrange(len(found.payload) + 1) if rng.random() < 0.5 else rng.choice((0, 1, 2))
        found.payload = found.payload[:at] + rng.choice(_EDGES).to_bytes(4, "big") + found.payload[at + 4 :]


def _bits(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    if frames:
        found = rng.choice(frames)
        if found.payload:
            payload = bytearray(found.payload)
            for _ in range(rng.choice((1, 1, 2, 8))):
                payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
            found.payload = bytes(payload)


def _split(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    """One DATA frame becomes two."""
    found = [i for i, f in enumerate(frames) if f.kind == DATA and not f.flags & PADDED and f.payload]
    if found:
        i = rng.choice(found)
        whole = frames[i]
        at = rng.randrange(len(whole.payload) + 1)
        frames[i : i + 1] = [
            Frame(DATA, 0, whole.stream_id, whole.payload[:at]),
            Frame(DATA, whole.flags, whole.stream_id, whole.payload[at:]),
        ]


def _insert(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    for _ in range(rng.choice((1, 1, 3))):
        frames.insert(rng.randrange(len(frames) + 1), _any_frame(rng, frames))


def _call(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    """One more call, at the end."""
    last = max((f.stream_id for f in frames if f.stream_id < 0x7FFFFF00), default=0)
    stream_id = last + 1 + last % 2
    more = [rng.choice(_FIELDS) for _ in range(rng.choice((0, 0, 1, 3)))]
    body = b"".join(_any_message(rng) for _ in range(rng.choice((1, 1, 2, 70))))
    frames += [
        Frame(HEADERS, END_HEADERS, stream_id, block(rng.choice(_METHODS), *more)),
        Frame(DATA, rng.choice((END_STREAM, END_STREAM, 0)), stream_id, body[:16384]),
    ]


def _splice(rng: random.Random, frames: list[Frame], other: list[Frame]) -> None:
    """A stretch of another conversation in place of one of this."""
    start = rng.randrange(len(other))
    stretch = [f.copy() for f in other[start : start + rng.choice((1, 2, 5, 50))]]
    at = rng.randrange(len(frames) + 1)
    frames[at : at + rng.choice((0, 0, 1, 5, 50))] = stretch


_EDITS: tuple[Callable[[random.Random, list[Frame], list[Frame]], None], ...] = (
    *(_drop, _duplicate, _flood, _swap, _kind, _flags, _stream, _length, _shorten, _lengthen, _number, _bits),
    *(_split, _insert, _insert, _insert, _call, _call, _splice, _splice),
)


def _any_message(rng: random.Random) -> bytes:
    body = prefixed(rng.randbytes(rng.choice((0, 1, 4, 4, 30, 900))), rng.choice((0, 0, 0, 0, 1, 2)))
    if rng.random() < 0.1:
        body = body[:1] + rng.choice(_EDGES).to_bytes(4, "big") + body[5:]
    return body


def _any_frame(rng: random.Random, frames: list[Frame]) -> Frame:
    """A frame that a peer could send at any time, right or wrong."""
    ids = [f.stream_id for f in frames] or [1]
    stream_id = rng.choice((rng.choice(ids), rng.choice(ids), max(ids) + 2, 0, 1, 2, 0x7FFFFFFF))
    number = rng.choice((*_EDGES, rng.getrandbits(32))).to_bytes(4, "big")
    kind = rng.randrange(12)
    if kind == DATA:
        return Frame(
            DATA, rng.choice((0, END_STREAM, PADDED)), stream_id, _any_message(rng)[: rng.randrange(900)]
        )
    if kind == HEADERS:
        more = [rng.choice(_FIELDS) for _ in range(rng.choice((0, 0, 1, 3)))]
        flags = rng.choice(
            (END_HEADERS, END_HEADERS | END_STREAM, 0, END_HEADERS | PADDED, END_HEADERS | 0x20)
        )
        if rng.random() < 0.2:  # Trailers, if the stream is open.
            return Frame(HEADERS, flags, stream_id, literal(b"x-trailer", b"v"))
        return Frame(HEADERS, flags, stream_id, block(rng.choice(_METHODS), *more))
    if kind == PRIORITY:
        return Frame(PRIORITY, 0, stream_id, number + b"\x10")
    if kind == RST_STREAM:
        return Frame(RST_STREAM, 0, stream_id, number)
    if kind == SETTINGS:
        pairs = b"".join(
            struct.pack(">HI", rng.choice((1, 2, 3, 4, 4, 4, 5, 6, 8, 9, 99)), rng.choice(_EDGES))
            for _ in range(rng.choice((0, 1, 1, 2, 40)))
        )
        return Frame(SETTINGS, rng.choice((0, 0, 0, 1)), rng.choice((0, 0, 0, stream_id)), pairs)
    if kind == PUSH_PROMISE:
        return Frame(PUSH_PROMISE, END_HEADERS, stream_id, number + block())
    if kind == PING:
        data = rng.choice((rng.randbytes(8), b"nn-drain", b"nn-alive"))
        return Frame(PING, rng.choice((0, 0, 1)), rng.choice((0, 0, stream_id)), data)
    if kind == GOAWAY:
        return Frame(GOAWAY, 0, 0, number + rng.randbytes(4))
    if kind == WINDOW_UPDATE:
        return Frame(WINDOW_UPDATE, 0, rng.choice((0, stream_id)), number)
    if kind == CONTINUATION:
        return Frame(CONTINUATION, rng.choice((0, END_HEADERS)), stream_id, literal(b"x-more", b"v"))
    # HPACK by chance: references to the table, its sizes, Huffman's codes.
    return Frame(HEADERS, END_HEADERS | END_STREAM, max(ids) + 2, rng.randbytes(rng.choice((1, 5, 30, 200))))


def _spoil(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, lost, doubled or added without regard for frames."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 6))):
        at = rng.randrange(len(spoilt) + 1)
        how = rng.randrange(5)
        if how == 0 and spoilt:
            spoilt[min(at, len(spoilt) - 1)] ^= 1 << rng.randrange(8)
        elif how == 1:
            del spoilt[at : at + rng.choice((1, 3, 9, 100))]
        elif how == 2:
            spoilt[at:at] = spoilt[at : at + rng.choice((1, 9, 40))]
        elif how == 3:
            spoilt[at:at] = rng.randbytes(rng.choice((1, 9, 40)))
        else:
            del spoilt[at:]
    return bytes(spoilt)
