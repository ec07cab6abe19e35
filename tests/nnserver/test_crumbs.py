"""Messages that are small on the wire and huge in memory are refused; honest ones are parsed as before."""

import contextlib
import itertools

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from nnproto.oip import inference_pb2 as oip
from nnproto.v1 import inference_pb2 as pb
from nnserver.api import crumbs
from nnserver.api.crumbs import MOST_FIELDS, UNCHECKED_BYTES, refuse_crumbs
from nnserver.api.inference import decode
from nnserver.errors import InvalidArgument

MIB = 1 << 20


def length_delimited(number, content):
    size, digits = len(content), bytearray()
    while size > 127:
        digits.append(size & 127 | 128)
        size >>= 7
    return bytes((number << 3 | 2, *digits, size)) + content


EMPTY_INPUTS = length_delimited(5, b"") * (2 * MIB)
BOMBS = {
    "two million tensors": (oip.ModelInferRequest, EMPTY_INPUTS),
    "parameters": (oip.ModelInferRequest, length_delimited(4, length_delimited(1, b"k")) * MIB),
    "raw contents": (oip.ModelInferRequest, length_delimited(7, b"") * MIB),
    "texts in a tensor": (
        oip.ModelInferRequest,
        length_delimited(5, length_delimited(5, length_delimited(8, b"") * MIB)),
    ),
    "a dimension a byte": (pb.PredictRequest, None),
    "numbers that are not packed": (
        oip.ModelInferRequest,
        length_delimited(5, length_delimited(5, b"\x35\0\0\0\0" * MIB)),
    ),
    "unknown fields": (pb.PredictRequest, b"\xa0\x06\x01" * MIB),
    "unknown groups": (pb.PredictRequest, b"\xa3\x06\xa4\x06" * MIB),
    "tensors, and then a mistake": (oip.ModelInferRequest, EMPTY_INPUTS + b"\x2a\xff\xff\xff\xff\x0f"),
    "tensors in a group": (oip.ModelInferRequest, b"\xa3\x06" + EMPTY_INPUTS + b"\xa4\x06"),
}
SHAPE = pb.Tensor.DESCRIPTOR.fields_by_name["shape"].number
INPUTS = pb.PredictRequest.DESCRIPTOR.fields_by_name["inputs"].number
BOMBS["a dimension a byte"] = (
    pb.PredictRequest,
    length_delimited(INPUTS, length_delimited(SHAPE, bytes(4 * MIB))),
)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_goes_off(name, monkeypatch):
    """No more of it is read than the tags and values of 20,000 fields."""
    kind, message = BOMBS[name]
    read_varint, numbers = crumbs._read_varint, itertools.count()

    def counted(*arguments):
        next(numbers)
        return read_varint(*arguments)

    monkeypatch.setattr(crumbs, "_read_varint", counted)
    with pytest.raises(InvalidArgument, match=r"fields|shape"):
        decode(kind, message)
    assert next(numbers) <= 2 * MOST_FIELDS


def test_small_messages_are_parsed_whatever_they_are():
    message = length_delimited(5, b"") * (UNCHECKED_BYTES // 2)
    assert len(decode(oip.ModelInferRequest, message).inputs) == UNCHECKED_BYTES // 2


def test_honest_large_messages_pass():
    rows = np.zeros((1000, 784), "<f4")
    own = pb.PredictRequest(
        model="m", inputs=pb.Tensor(shape=rows.shape, dtype=pb.DATA_TYPE_FLOAT32, data=rows.tobytes())
    )
    assert decode(pb.PredictRequest, own.SerializeToString()) == own
    typed = oip.ModelInferRequest(model_name="m")
    tensor = typed.inputs.add(name="x", datatype="FP32", shape=rows.shape)
    tensor.contents.fp32_contents.extend(rows.ravel().tolist())
    tensor.parameters["p"].string_param = "v"
    assert decode(oip.ModelInferRequest, typed.SerializeToString()) == typed
    raw = oip.ModelInferRequest(model_name="m", raw_input_contents=[rows.tobytes()])
    assert decode(oip.ModelInferRequest, raw.SerializeToString()) == raw


def test_as_many_fields_as_may_be():
    crumb = length_delimited(7, b"1234567")
    assert len(crumb) * (MOST_FIELDS - 1) > UNCHECKED_BYTES
    refuse_crumbs(oip.ModelInferRequest, crumb * (MOST_FIELDS - 1))
    with pytest.raises(InvalidArgument):
        refuse_crumbs(oip.ModelInferRequest, crumb * MOST_FIELDS)


@given(
    start=st.binary(max_size=60), end=st.binary(max_size=60), fill=st.sampled_from([b"\0", b"\x2a", b"\xff"])
)
def test_any_bytes_are_looked_through_in_time(start, end, fill):
    """No bytes make it stand still or raise anything else; what it lets pass the parser takes or refuses."""
    message = start + length_delimited(7, fill * UNCHECKED_BYTES) + end
    try:
        refuse_crumbs(oip.ModelInferRequest, message)
    except InvalidArgument:
        return
    with contextlib.suppress(DecodeError):
        oip.ModelInferRequest.FromString(message)
