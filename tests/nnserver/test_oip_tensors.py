"""ModelInferRequest to rows: every datatype, raw and typed, and errors that name what was expected."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oip import NUMPY, TYPED, request_for
from support.serving import echoed

from nnserver.api.oip_tensors import decode_rows
from nnserver.errors import InvalidArgument

IRIS = echoed(3)
IRIS64 = echoed(3, dtype="float64")
X = [[1, 2, 3], [4, 5, 6]]
ALL = (*NUMPY, "BF16")


def error_of(request, model=IRIS):
    with pytest.raises(InvalidArgument) as caught:
        decode_rows(request, model)
    return str(caught.value)


@pytest.mark.parametrize("datatype", ALL)
@pytest.mark.parametrize("model", [IRIS, IRIS64], ids=["float32", "float64"])
def test_every_datatype_is_taken_raw(datatype, model):
    rows = decode_rows(request_for(X, datatype=datatype), model)
    assert rows.x.dtype == model.mlp.dtype
    assert rows.x.tolist() == X
    assert rows.x.flags.c_contiguous
    assert (rows.is_row, rows.is_raw) == (False, True)


@pytest.mark.parametrize("datatype", TYPED)
@pytest.mark.parametrize("model", [IRIS, IRIS64], ids=["float32", "float64"])
def test_every_datatype_with_a_field_is_taken_typed(datatype, model):
    rows = decode_rows(request_for(X, datatype=datatype, raw=False), model)
    assert rows.x.dtype == model.mlp.dtype
    assert rows.x.tolist() == X
    assert (rows.is_row, rows.is_raw) == (False, False)


@pytest.mark.parametrize("raw", [True, False])
def test_a_row_and_no_rows(raw):
    """(n_in,) is one row; (0, n_in) is none."""
    row = decode_rows(request_for(X[0], raw=raw), IRIS)
    assert (row.x.tolist(), row.is_row) == ([X[0]], True)
    none = decode_rows(request_for(np.zeros((0, 3)), raw=raw), IRIS)
    assert (none.x.shape, none.is_row) == ((0, 3), False)


def test_float32_comes_through_bit_for_bit():
    """NaN's payload and the sign of zero, too: the rows are a view of the message."""
    bits = np.array([[0x7FC12345, 0x80000000, 0x7F800000]], np.uint32)
    rows = decode_rows(request_for(bits.view(np.float32)), IRIS)
    assert rows.x.view(np.uint32).tolist() == bits.tolist()


def test_float64_is_rounded_for_a_float32_model():
    """As in the own service: to the nearest, beyond the range to infinity."""
    rows = decode_rows(request_for([[1 + 2**-30, 1e300, -1e300]], datatype="FP64"), IRIS)
    assert rows.x.tolist() == [[1, np.inf, -np.inf]]


@given(st.lists(st.floats(width=16), min_size=3, max_size=3))
def test_float16_is_exact(values):
    rows = decode_rows(request_for([values], datatype="FP16"), IRIS)
    assert np.array_equal(rows.x, np.array([values], np.float32), equal_nan=True)


@given(st.lists(st.integers(0, 0xFFFF), min_size=3, max_size=3))
def test_bfloat16_is_the_upper_half_of_a_float32(halves):
    request = request_for(np.zeros((1, 3)), datatype="BF16")
    request.raw_input_contents[0] = np.array(halves, "<u2").tobytes()
    assert decode_rows(request, IRIS).x.view(np.uint32).tolist() == [[half << 16 for half in halves]]


WIDE = {"INT32": 32, "UINT32": 32, "INT64": 64, "UINT64": 64}


@given(st.data(), st.sampled_from(sorted(WIDE)), st.booleans(), st.sampled_from([IRIS, IRIS64]))
def test_integers_are_taken_exactly_or_not_at_all(data, datatype, raw, model):
    """An integer that the model's float does not hold is refused by value, row and column."""
    low = 0 if datatype.startswith("U") else -(2 ** (WIDE[datatype] - 1))
    high = 2 ** WIDE[datatype] - 1 if low == 0 else -low - 1
    near_powers = st.integers(0, WIDE[datatype]).flatmap(lambda k: st.integers(2**k - 2, 2**k + 2))
    values = st.one_of(st.integers(low, high), near_powers.map(lambda v: max(low, min(v, high))))
    x = data.draw(st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=3))
    # Python's floats are float64; a float32 that holds an integer is the float64 that does.
    is_held = [[int(model.mlp.dtype.type(v)) == v for v in row] for row in x]
    request = request_for(np.array(x, NUMPY[datatype]), datatype=datatype, raw=raw)
    if all(map(all, is_held)):
        assert [[int(v) for v in row] for row in decode_rows(request, model).x.tolist()] == x
    else:
        row = next(i for i, row in enumerate(is_held) if not all(row))
        column = is_held[row].index(False)
        assert error_of(request, model) == (
            f"inputs has {x[row][column]} at row {row}, column {column}, which the model's "
            f"{model.mlp.dtype} does not hold; expected {datatype} that it does, or FP64, which is rounded"
        )


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("INT8", 128, "-128 to 127"),
        ("INT8", -129, "-128 to 127"),
        ("INT16", 2**15, "-32768 to 32767"),
        ("UINT8", 256, "0 to 255"),
        ("UINT16", 2**16, "0 to 65535"),
    ],
)
def test_typed_integers_must_be_of_their_datatype(datatype, value, expected):
    """Typed contents have 32 bits for each of the smaller types."""
    field = TYPED[datatype]
    assert error_of(request_for([[0, value, 0]], datatype=datatype, raw=False)) == (
        f"inputs has {value} in {field}; {datatype} is {expected}"
    )


def changed(change, **options):
    request = request_for(X, **options)
    change(request)
    return request


ERRORS = {
    "no inputs": (
        changed(lambda r: r.ClearField("inputs")),
        "the request has no inputs; model 'iris' expects one, 'inputs'",
    ),
    "two inputs": (
        changed(lambda r: r.inputs.add(name="more")),
        "the request has the inputs 'inputs', 'more'; model 'iris' expects one, 'inputs'",
    ),
    "another name": (
        changed(lambda r: setattr(r.inputs[0], "name", "input__0")),
        "the request has the inputs 'input__0'; model 'iris' expects one, 'inputs'",
    ),
    "no datatype": (
        changed(lambda r: setattr(r.inputs[0], "datatype", "")),
        "inputs has datatype ''; expected one of FP32, FP64, FP16, BF16, INT8, ",
    ),
    "another datatype": (
        changed(lambda r: setattr(r.inputs[0], "datatype", "BYTES")),
        "inputs has datatype 'BYTES'; expected one of FP32, FP64, FP16, BF16, INT8, ",
    ),
    "another width": (
        changed(lambda r: r.inputs[0].shape.__setitem__(1, 4)),
        "inputs has shape (2, 4); model 'iris' expects (rows, 3)",
    ),
    "no shape": (
        changed(lambda r: r.inputs[0].ClearField("shape")),
        "inputs has shape (); model 'iris' expects (rows, 3)",
    ),
    "negative rows": (
        changed(lambda r: r.inputs[0].shape.__setitem__(0, -1)),
        "inputs has shape (-1, 3); model 'iris' expects (rows, 3)",
    ),
    "more dimensions": (
        changed(lambda r: r.inputs[0].shape.append(3)),
        "inputs has shape (2, 3, 3); model 'iris' expects (rows, 3)",
    ),
    "a thousand dimensions": (
        changed(lambda r: r.inputs[0].shape.extend([1] * 998)),
        "inputs has shape (2, 3, 1, 1, 1, 1, 1, 1, ...: 1000 dimensions); model 'iris' expects (rows, 3)",
    ),
    "rows beyond counting": (
        changed(lambda r: r.inputs[0].shape.__setitem__(0, 2**62)),
        f"inputs has 24 bytes of raw contents; shape ({2**62}, 3) of FP32 takes {2**62 * 12}",
    ),
    "too few bytes": (
        changed(lambda r: r.raw_input_contents.__setitem__(0, b"12345")),
        "inputs has 5 bytes of raw contents; shape (2, 3) of FP32 takes 24",
    ),
    "too many raw contents": (
        changed(lambda r: r.raw_input_contents.append(b"")),
        "raw_input_contents has 2 entries; expected 1, as there are inputs",
    ),
    "raw and typed": (
        changed(lambda r: r.inputs[0].contents.fp32_contents.append(1)),
        "inputs has fp32_contents beside raw_input_contents; expected the one or the other",
    ),
    "no contents": (
        changed(lambda r: r.ClearField("raw_input_contents")),
        "inputs has 0 elements in fp32_contents; shape (2, 3) takes 6",
    ),
    "too few elements": (
        changed(lambda r: r.inputs[0].contents.fp32_contents.pop(), raw=False),
        "inputs has 5 elements in fp32_contents; shape (2, 3) takes 6",
    ),
    "another field": (
        changed(lambda r: setattr(r.inputs[0], "datatype", "FP64"), raw=False),
        "inputs has fp32_contents; expected fp64_contents alone, for datatype FP64",
    ),
    "two fields": (
        changed(lambda r: r.inputs[0].contents.bool_contents.append(True), raw=False),
        "inputs has bool_contents and fp32_contents; expected fp32_contents alone, for datatype FP32",
    ),
    "a datatype without a field": (
        changed(lambda r: setattr(r.inputs[0], "datatype", "BF16"), raw=False),
        "BF16 has no typed contents; expected raw_input_contents",
    ),
    "shared memory": (
        changed(lambda r: r.inputs[0].parameters["shared_memory_region"].MergeFromString(b"")),
        "inputs is in shared memory; this server takes contents in the message only",
    ),
}


@pytest.mark.parametrize(("request_", "text"), ERRORS.values(), ids=ERRORS)
def test_what_is_wrong_is_named_with_what_was_expected(request_, text):
    assert error_of(request_).startswith(text)


def test_names_from_a_client_are_cut():
    """An error text is a header: a megabyte of name does not come back."""
    request = request_for(X)
    for _ in range(1000):
        request.inputs.add(name="x" * 10_000)
    assert len(error_of(request)) < 600
    request = request_for(X)
    request.inputs[0].datatype = "x" * 10_000
    assert len(error_of(request)) < 300


def test_other_parameters_of_a_tensor_are_ignored():
    request = request_for(X)
    request.inputs[0].parameters["binary_data_size"].int64_param = 24
    assert decode_rows(request, IRIS).x.tolist() == X
