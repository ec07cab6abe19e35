"""
Seeds in, inputs out: which decoder is tried, and bytes that are almost a message of its.

    | way: 1 byte | message |

Mutations know protobuf's format: fields are dropped, doubled, swapped, invented and spliced, at any depth;
their numbers, wire types, lengths and values changed; and bytes spoilt. The same seed makes the same input.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from support.oip import request_for as oip_request_for
from support.serving import request_for

from nnproto.v1 import inference_pb2 as own
from nnserver.api.wire import varint

MOST_BYTES = 2000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EDGES: tuple[int, ...] = (
    0,
    1,
    2,
    3,
    4,
    12,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
)
_EDGES += (2**63, 2**64 - 1, 2**64 - 3, 2**70)
_TEXTS: tuple[bytes, ...] = (
    b"iris",
    b"rose",
    b"1",
    b"",
    b"inputs",
    b"outputs",
    b"probabilities",
    b"labels",
    b"FP32",
    b"FP64",
)
_TEXTS += (
    b"FP16",
    b"BF16",
    b"INT8",
    b"INT64",
    b"UINT32",
    b"classification",
    b"timeout",
    b"triton_x",
    b"BYTES",
)
_TEXTS += (b"shared_memory_region", b"\xff\xfe", "☺".encode(), b"..", b"\0", b"priority", b"x" * 300)

# A field as it stands: its tag, and its content or, for a value, the bytes of it.
Field = tuple[int, int, bytes]


def first_messages() -> dict[str, list[bytes]]:
    """By service, requests with every kind of field."""
    x = np.array([[1.5, -2.0, 3.0], [0.0, np.nan, np.inf]], np.float32)
    double = np.array([[0.5, 1e300]], np.float64)
    of_own = [
        request_for(x, id="a"),
        request_for(x[0], id="b", version="1", output=own.OUTPUT_KIND_PROBABILITIES),
        request_for(x, output=own.OUTPUT_KIND_LABELS, top_k=2),
        request_for(x[:0]),
        request_for(double, "rose", id="☺"),
        request_for(x[:, :2], "rose"),
        request_for(np.zeros((1, 3)), id="long" * 40),
    ]
    of_oip = [
        oip_request_for(x, id="seed"),
        oip_request_for(x, raw=False, outputs=["labels", "outputs", "probabilities"], model_version="1"),
        oip_request_for([[1, 2, 3]], datatype="BF16"),
        oip_request_for(double, "rose", "FP64"),
        *(oip_request_for([[1, 2, 3]], datatype=kind) for kind in ("FP16", "INT8", "INT64", "UINT32")),
        *(
            oip_request_for([1, 2, 3], datatype=kind, raw=False)
            for kind in ("INT16", "INT32", "UINT8", "UINT64")
        ),
    ]
    full = oip_request_for(x, id="full", outputs=["probabilities", "outputs"])
    full.outputs[0].parameters["classification"].int64_param = 2
    full.parameters["timeout"].int64_param = 10**9
    full.parameters["priority"].uint64_param = 1
    full.parameters["sequence_id"].string_param = "s"
    full.parameters["mine"].double_param = 0.5
    full.inputs[0].parameters["binary_data_size"].int64_param = 24
    of_oip.append(full)
    # Names alone: what most other methods are asked for.
    named = [
        b"",
        b"\n\4iris",
        b"\n\4rose\x12\x011",
        b"\x12\4iris",
        b"\n\4nope",
        b":\0",
        b'"\x14nnproto.v1.Inference',
    ]
    return {
        "own": [request.SerializeToString() for request in of_own],
        "oip": [request.SerializeToString() for request in of_oip],
        "named": named,
    }


class Mutator:
    """
    Makes inputs of *seeds*, which are inputs themselves.

    ways: how many decoders there are.
    """

    def __init__(self, seeds: Sequence[bytes], ways: int) -> None:
        self._seeds = list(seeds)
        self._ways = ways
        self._random = random.Random()

    def input(self, seed: int) -> bytes:
        """Return the input of *seed*."""
        self._random.seed(seed)
        return self.changed(self._random.choice(self._seeds))

    def mutated(self, data: bytes, seed: int) -> bytes:
        """Return *data*, changed as *seed* says."""
        self._random.seed(seed)
        return self.changed(data)

    def changed(self, data: bytes) -> bytes:
        rng = self._random
        way = data[0] if data else 0
        if rng.random() < 0.05:
            way = rng.randrange(self._ways)
        message = data[1:]
        for _ in range(1 + int(rng.expovariate(0.8))):
            message = self._of_bytes(message) if rng.random() < 0.25 else self._of_fields(message)
        return bytes((way,)) + message[:MOST_BYTES]

    def _of_bytes(self, message: bytes) -> bytes:
        rng, data = self._random, bytearray(message)
        at, size = rng.randint(0, len(data)), rng.randint(1, 8)
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + 4 * size] or rng.randbytes(size)
        else:
            del data[at:]
        return bytes(data)

    def _of_fields(self, message: bytes, depth: int = 0) -> bytes:
        """Change one field of *message*; of a field that looks like a message, perhaps one in it."""
        rng, fields = self._random, split(message)
        if not fields:
            return message + joined([self._invented()])
        at = rng.randrange(len(fields))
        number, wire, content = fields[at]
        if wire == _BYTES and depth < 4 and content and rng.random() < 0.5 and split(content):
            fields[at] = (number, wire, self._of_fields(content, depth + 1))
            return joined(fields)
        kind = rng.randrange(10)
        if kind == 0:
            del fields[at]
        elif kind == 1:
            fields.insert(rng.randint(0, len(fields)), fields[at])
        elif kind == 2:
            fields.append(fields.pop(at))
        elif kind == 3:
            fields.insert(at, self._invented())
        elif kind == 4:
            other = split(rng.choice(self._seeds)[1:])
            fields.insert(at, rng.choice(other) if other else self._invented())
        elif kind == 5:
            fields[at] = (rng.choice((number + 1, number - 1, rng.randrange(20))), wire, content)
        elif kind == 6:
            fields[at] = self._invented(number)
        elif kind == 7:
            lie = rng.choice((-1, 1, 4, 1 << 20, 1 << 31, 1 << 63))
            return joined(fields[:at]) + lying(fields[at], lie) + joined(fields[at + 1 :])
        elif wire == _VARINT:
            fields[at] = (number, wire, varint(rng.choice(_EDGES)))
        elif wire == _BYTES:
            fields[at] = (number, wire, self._other_bytes(content))
        else:
            fields[at] = (number, wire, rng.randbytes(len(content)))
        return joined(fields)

    def _other_bytes(self, content: bytes) -> bytes:
        rng = self._random
        kind = rng.randrange(5)
        if kind == 0:
            return rng.choice(_TEXTS)
        if kind == 1:
            return rng.randbytes(len(content))
        if kind == 2:
            return content[: rng.randint(0, len(content))]
        if kind == 3:
            return b"".join(varint(rng.choice(_EDGES)) for _ in range(rng.randint(0, 4)))
        return content + rng.randbytes(rng.choice((1, 4, 8, 12)))

    def _invented(self, number: int = 0) -> Field:
        rng = self._random
        number = number or rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 99, 2**29 - 1))
        wire = rng.choice((_VARINT, _FIXED64, _BYTES, _BYTES, _FIXED32, 3, 4, 6))
        if wire == _VARINT:
            return number, wire, varint(rng.choice(_EDGES))
        if wire == _BYTES:
            return number, wire, rng.choice(_TEXTS)
        return number, wire, rng.randbytes({_FIXED64: 8, _FIXED32: 4}.get(wire, 0))


def split(message: bytes) -> list[Field]:
    """The fields of *message*; none if it does not look like one."""
    fields: list[Field] = []
    at, end = 0, len(message)
    while at < end:
        tag, at = _read(message, at)
        wire = tag & 7
        start = at
        if wire == _VARINT:
            _, at = _read(message, at)
        elif wire == _BYTES:
            size, start = _read(message, at)
            at = start + size
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        if wire > _FIXED32 or not tag >> 3 or at > end:
            return []
        fields.append((tag >> 3, wire, message[start:at]))
    return fields


def joined(fields: Sequence[Field]) -> bytes:
    """The message of *fields*."""
    return b"".join(lying(field, 0) for field in fields)


def lying(field: Field, lie: int) -> bytes:
    """One field, whose length is wrong by *lie* if it has one."""
    number, wire, content = field
    tag = varint(max(number, 0) << 3 | wire)
    return tag + (varint(max(len(content) + lie, 0)) if wire == _BYTES else b"") + content


def _read(message: bytes, at: int) -> tuple[int, int]:
    """The number at message[at], and where it ends; beyond the message if that is cut."""
    value = shift = 0
    while at < len(message):
        value |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return value, at
        shift += 7
    return value, len(message) + 1
