"""Tensors on the wire: exact round trips, and errors that say what was wrong and what was expected."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from nnproto.v1 import inference_pb2 as pb
from nnserver.api.tensors import check_finite, data_type, decode_rows
from nnserver.errors import InvalidArgument

F4, F8 = np.dtype(np.float32), np.dtype(np.float64)
DTYPES: Any = [F4, F8]
WIRE = {F4: pb.DATA_TYPE_FLOAT32, F8: pb.DATA_TYPE_FLOAT64}


def tensor(shape, dtype=pb.DATA_TYPE_FLOAT32, data=b""):
    return pb.Tensor(shape=shape, dtype=dtype, data=data)


def tensor_of(x):
    return tensor(x.shape, WIRE[x.dtype], x.astype(x.dtype.newbyteorder("<")).tobytes())


def decoded(message, n_in=3, dtype=F4):
    return decode_rows(message, "model 'iris'", n_in, dtype)


def refusal(message, n_in=3):
    with pytest.raises(InvalidArgument) as caught:
        decoded(message, n_in)
    return str(caught.value)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


any_rows: Any = npst.arrays(
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 5), st.integers(1, 5)),
    elements={"allow_nan": True, "allow_infinity": True, "allow_subnormal": True},
)


@given(any_rows)
def test_rows_of_the_models_dtype_keep_every_bit(x):
    """Rows keep their shape and bits, NaN payloads and signed zeros included."""
    message = pb.Tensor.FromString(tensor_of(x).SerializeToString())
    assert same_bits(decoded(message, x.shape[1], x.dtype), x)


@given(any_rows, st.sampled_from([F4, F8]))
def test_other_dtype_is_converted_as_numpy_does(x, dtype):
    """A float64 request to a float32 model is rounded once; float32 to float64 is exact."""
    with np.errstate(all="ignore"):
        expected = x.astype(dtype)
    got = decoded(tensor_of(x), x.shape[1], dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1e300, np.inf), (-1e300, -np.inf), (1e-300, 0.0), (np.finfo("f4").smallest_subnormal * 1.0, 1e-45)],
)
def test_float64_beyond_float32_becomes_infinite_or_zero(value, expected):
    """What float32 cannot hold becomes what IEEE 754 rounding makes of it, without a warning."""
    got = decoded(tensor_of(np.full((1, 3), value)))
    np.testing.assert_array_equal(got, np.full((1, 3), expected, F4))


def test_a_signalling_nan_is_converted_without_a_warning():
    """A signalling NaN in a float64 request is NaN to a float32 model; warnings would be errors here."""
    signalling = np.array([0x7FF0000000000001], np.uint64).view(F8)
    assert np.isnan(decoded(tensor_of(signalling), 1, F4)).all()


def test_a_row_comes_as_one_row():
    """Shape (n_in,) is one row of the batch."""
    assert decoded(tensor_of(np.arange(3, dtype=F4))).shape == (1, 3)


def test_zero_rows_are_a_batch():
    """A batch of no rows is decoded as one."""
    assert decoded(tensor((0, 3))).shape == (0, 3)


def test_rows_are_contiguous_and_not_writable():
    """Decoded rows need no copy for a kernel, and nobody can change the message under it."""
    for dtype in (F4, F8):
        rows = decoded(tensor_of(np.ones((2, 3), dtype)), 3, dtype)
        assert rows.flags.c_contiguous
        assert rows.flags.aligned
        assert not rows.flags.writeable


def test_bytes_are_little_endian():
    """1.0 is 00 00 80 3F on the wire."""
    assert decoded(tensor((1, 1), data=b"\x00\x00\x80\x3f"), 1).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((3, 7), "(3, 7)"),
        ((7,), "(7,)"),
        ((), "()"),
        ((1, 1, 3), "(1, 1, 3)"),
        ((-1, 3), "(-1, 3)"),
        ((3, -1), "(3, -1)"),
        ((0,), "(0,)"),
        ((2**63 - 1, 2), "(9223372036854775807, 2)"),
        ((-(2**63), 3), "(-9223372036854775808, 3)"),
        (tuple(range(9)), "(0, 1, 2, 3, 4, 5, 6, 7, ...: 9 dimensions)"),
        ((1,) * 100_000, "(1, 1, 1, 1, 1, 1, 1, 1, ...: 100000 dimensions)"),
    ],
)
def test_a_wrong_shape_is_named_with_the_expected_one(shape, text):
    """The error has the shape that came, cut short if long, the model and the shape it expects."""
    assert refusal(tensor(shape)) == f"inputs has shape {text}; model 'iris' expects (rows, 3)"


@pytest.mark.parametrize(
    ("dtype", "text"), [(0, "DATA_TYPE_UNSPECIFIED"), (3, "3"), (-1, "-1"), (2**31 - 1, "2147483647")]
)
def test_a_wrong_dtype_is_named_with_the_expected_ones(dtype, text):
    """The error has the dtype's name, or its number where there is none, and the two that are taken."""
    message = tensor((1, 3), dtype, bytes(12))
    assert refusal(message) == f"inputs has dtype {text}; expected DATA_TYPE_FLOAT32 or DATA_TYPE_FLOAT64"


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "text"),
    [
        ((2, 3), F4, 23, "inputs has 23 bytes of data; shape (2, 3) of float32 takes 24"),
        ((2, 3), F4, 48, "inputs has 48 bytes of data; shape (2, 3) of float32 takes 24"),
        ((2, 3), F8, 24, "inputs has 24 bytes of data; shape (2, 3) of float64 takes 48"),
        ((3,), F4, 0, "inputs has 0 bytes of data; shape (3,) of float32 takes 12"),
        ((0, 3), F4, 12, "inputs has 12 bytes of data; shape (0, 3) of float32 takes 0"),
        # product(shape) * 4 is 0 modulo 2**64: a machine integer would take it for an empty batch.
        (
            (2**62, 3),
            F4,
            0,
            "inputs has 0 bytes of data; shape (4611686018427387904, 3) of float32 takes "
            "55340232221128654848",
        ),
        (
            (2**63 - 1, 3),
            F8,
            24,
            "inputs has 24 bytes of data; shape (9223372036854775807, 3) of float64 takes "
            "221360928884514619368",
        ),
    ],
)
def test_a_wrong_byte_count_is_named_with_the_expected_one(shape, dtype, size, text):
    """The error has the bytes that came and the bytes that shape and dtype take, however large."""
    assert refusal(tensor(shape, WIRE[dtype], bytes(size))) == text


def test_an_absent_tensor_is_refused():
    """A request without inputs is told what was expected."""
    assert refusal(pb.PredictRequest().inputs).startswith("inputs has dtype DATA_TYPE_UNSPECIFIED; expected")


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    st.sampled_from([0, 1, 2, 3]),
    st.binary(max_size=64),
    st.integers(1, 4),
)
def test_any_tensor_is_rows_or_an_invalid_argument(shape, dtype, data, n_in):
    """No shape, dtype and data raise anything but InvalidArgument or give rows of another shape."""
    message = tensor(shape, dtype, data)
    try:
        rows = decode_rows(message, "model 'iris'", n_in, F4)
    except InvalidArgument:
        return
    assert rows.dtype == F4
    assert rows.shape == (len(data) // ((4, 8)[dtype - 1] * n_in), n_in)


@given(any_rows)
def test_finite_rows_pass_and_others_are_located(x):
    """check_finite raises exactly if a value is not finite, and names the first such row and column."""
    bad = np.argwhere(~np.isfinite(x))
    if not len(bad):
        check_finite(x)
        return
    row, column = bad[0]
    with pytest.raises(InvalidArgument) as caught:
        check_finite(x)
    assert str(caught.value) == (
        f"inputs has {x[row, column]} at row {row}, column {column}; "
        "this server takes finite values only (reject_nonfinite)"
    )


def test_both_dtypes_have_a_name_on_the_wire():
    """data_type gives the wire's name of either dtype."""
    assert [data_type(F4), data_type(F8)] == [pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT64]
