"""Arrays -> request bytes: the same bytes as protobuf's, and no value changed on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nnclient import InvalidInput
from nnclient.wire import OutputKind, Question, as_rows, decode_tensor
from nnproto.v1 import inference_pb2 as pb

ROWS: Any = hnp.arrays(
    st.sampled_from([np.dtype("<f4"), np.dtype("<f8")]),
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40),
)


@settings(deadline=None, max_examples=100)
@given(
    rows=ROWS,
    model=st.text(min_size=1, max_size=200),
    version=st.text(max_size=5),
    request_id=st.text(max_size=5),
    output=st.sampled_from(["outputs", "probabilities", "labels"]),
    top_k=st.integers(1, 300),
)
def test_encoding_is_byte_for_byte_protobufs(
    rows: Any, model: str, version: str, request_id: str, output: OutputKind, top_k: int
) -> None:
    """The hand-made last field cannot be told from protobuf's own."""
    top_k = top_k if output == "labels" else 1
    kind = {"outputs": 1, "probabilities": 2, "labels": 3}[output]
    message = pb.PredictRequest(
        model=model,
        version=version,
        id=request_id,
        output=kind,  # type: ignore[arg-type]
        top_k=top_k if output == "labels" else 0,
        inputs=pb.Tensor(
            shape=rows.shape,
            dtype=pb.DATA_TYPE_FLOAT32 if rows.dtype == np.float32 else pb.DATA_TYPE_FLOAT64,
            data=rows.tobytes(),
        ),
    )
    encoded = Question(model, version, output, top_k).encode(rows, request_id)
    assert encoded == message.SerializeToString(deterministic=True)


@settings(deadline=None, max_examples=60)
@given(model=st.text(min_size=1, max_size=300), rows=st.integers(1, 50))
def test_a_request_keeps_within_its_bytes(model: str, rows: int) -> None:
    """What largest_data_bytes leaves is enough for everything around the data."""
    question, limit = Question(model, "v" * 20, "labels", 2**31), 20_000
    data_bytes = question.largest_data_bytes(limit)
    data = np.zeros((rows, max(1, data_bytes // rows // 4)), np.float32)
    assert len(question.encode(data, "9" * 19)) <= limit


@settings(deadline=None, max_examples=60)
@given(array=ROWS)
def test_a_tensor_comes_back_with_the_same_bits(array: Any) -> None:
    """NaN payloads and negative zeros included."""
    tensor = pb.PredictRequest.FromString(Question("m").encode(array)).inputs
    decoded = decode_tensor(tensor)
    assert decoded.tobytes() == array.tobytes()
    assert (decoded.shape, decoded.dtype) == (array.shape, array.dtype)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("?", "<f4"),
        ("i1", "<f4"),
        ("u1", "<f4"),
        ("i2", "<f4"),
        ("u2", "<f4"),
        ("f2", "<f4"),
        ("f4", "<f4"),
        (">f4", "<f4"),
        ("i4", "<f8"),
        ("u4", "<f8"),
        ("i8", "<f8"),
        ("u8", "<f8"),
        ("f8", "<f8"),
        (">f8", "<f8"),
        ("g", "<f8"),
    ],
)
def test_real_types_become_the_smaller_float_that_holds_them(dtype: str, expected: str) -> None:
    """float32 wherever every value of the type fits."""
    rows, _ = as_rows(np.ones((2, 3), dtype))
    assert rows.dtype == np.dtype(expected)
    assert (rows == 1).all()


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4"])
def test_conversion_keeps_the_extreme_values(dtype: str) -> None:
    """The claim of exactness, at both ends of each type."""
    ends = [False, True] if dtype == "?" else [np.iinfo(dtype).min, np.iinfo(dtype).max]
    rows, _ = as_rows(np.array([ends], dtype))
    assert [int(value) for value in rows[0]] == [int(value) for value in ends]


@pytest.mark.parametrize(
    "x", [1j * np.ones((1, 2)), ["a", "b"], np.array([None, 1]), np.zeros(2, "M8[s]"), b"12"]
)
def test_what_is_not_real_is_refused(x: Any) -> None:
    """The message names the dtype."""
    with pytest.raises(InvalidInput, match=r"x has dtype .*; expected real numbers"):
        as_rows(x)


@pytest.mark.parametrize("shape", [(), (1, 2, 3)])
def test_other_shapes_than_rows_are_refused(shape: tuple[int, ...]) -> None:
    """A row or rows; nothing else has a meaning."""
    with pytest.raises(InvalidInput, match=r"x has shape \(.*\); expected \(rows, n_in\)"):
        as_rows(np.zeros(shape))


def test_what_cannot_be_an_array_is_refused() -> None:
    """Ragged rows, and objects whose own conversion fails."""

    class Broken:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("on another device")

    with pytest.raises(InvalidInput, match="cannot be made an array"):
        as_rows([[1.0, 2.0], [3.0]])
    with pytest.raises(InvalidInput, match="on another device"):
        as_rows(Broken())


def test_contiguous_rows_are_not_copied() -> None:
    """The only copy of the way in is that into the message."""
    x = np.ones((5, 3), np.float32)
    assert np.shares_memory(as_rows(x)[0], x)
    assert as_rows(x)[0].flags.c_contiguous
    assert as_rows(x.T)[0].tolist() == x.T.tolist()
    assert as_rows(x[0])[1] is True


@pytest.mark.parametrize(
    "arguments",
    [("",), (None,), ("m", "", "logits"), ("m", "", "labels", 0), ("m", "", "outputs", 2)],
)
def test_questions_that_cannot_be_asked_are_refused(arguments: tuple[Any, ...]) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidInput):
        Question(*arguments)


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(shape=[1, 1], data=b"1234"),
        pb.Tensor(shape=[2, 2], dtype=pb.DATA_TYPE_FLOAT32, data=b"1234"),
        pb.Tensor(shape=[1], dtype=pb.DATA_TYPE_FLOAT64, data=b"1234"),
    ],
)
def test_tensors_that_do_not_hold_together_are_refused(tensor: pb.Tensor) -> None:
    """A server's mistake is seen, not guessed around."""
    with pytest.raises(ValueError):
        decode_tensor(tensor)
