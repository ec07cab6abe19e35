"""Parameters of a request: what each may be, what is refused and what is ignored."""

import pytest
from support.oip import request_for

from nnproto.oip import inference_pb2 as pb
from nnserver.api.oip_parameters import read_timeout
from nnserver.errors import InvalidArgument


def parameters(**values):
    """Named as the field of InferParameter that each sets: name=("int64_param", 3)."""
    request = request_for([[1.0]])
    for name, (field, value) in values.items():
        request.parameters[name].CopyFrom(pb.InferParameter(**{field: value}))
    return request.parameters


def test_a_timeout_is_in_microseconds():
    """0 is none, as in Triton."""
    assert read_timeout(parameters(timeout=("int64_param", 1_500_000))) == 1.5
    assert read_timeout(parameters(timeout=("int64_param", 0))) is None
    assert read_timeout(parameters()) is None


@pytest.mark.parametrize(
    "given",
    [
        {"priority": ("int64_param", 0)},
        {"priority": ("uint64_param", 2**64 - 1)},
        {"sequence_id": ("int64_param", -1), "sequence_start": ("bool_param", True)},
        {"sequence_id": ("string_param", "a"), "sequence_end": ("bool_param", True)},
        {"triton_enable_empty_final_response": ("bool_param", True)},
        {"my_own": ("double_param", 0.5), "binary_data_output": ("bool_param", True)},
    ],
    ids=str,
)
def test_what_has_no_effect_is_taken(given):
    """Priorities, sequences, Triton's final response, and whatever a client calls its own."""
    assert read_timeout(parameters(**given)) is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"timeout": ("uint64_param", 1)}, "parameter 'timeout' is uint64_param; expected int64_param"),
        ({"timeout": ("string_param", "1")}, "parameter 'timeout' is string_param; expected int64_param"),
        ({"timeout": ("int64_param", -1)}, "parameter 'timeout' is -1; expected at least 0"),
        ({"priority": ("int64_param", -5)}, "parameter 'priority' is -5; expected at least 0"),
        (
            {"priority": ("bool_param", True)},
            "parameter 'priority' is bool_param; expected int64_param or uint64_param",
        ),
        (
            {"sequence_id": ("bool_param", True)},
            "parameter 'sequence_id' is bool_param; expected int64_param or string_param",
        ),
        (
            {"sequence_start": ("int64_param", 1)},
            "parameter 'sequence_start' is int64_param; expected bool_param",
        ),
        (
            {"triton_enable_empty_final_response": ("int64_param", 1)},
            "parameter 'triton_enable_empty_final_response' is int64_param; expected bool_param",
        ),
        (
            {"triton_new": ("bool_param", True)},
            "parameter 'triton_new' is not known; of those that begin with 'triton_' this server takes "
            "'triton_enable_empty_final_response'",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(given, text):
    with pytest.raises(InvalidArgument) as caught:
        read_timeout(parameters(**given))
    assert str(caught.value) == text


def test_a_parameter_without_a_value_is_wrong():
    request = request_for([[1.0]])
    request.parameters["timeout"].SetInParent()
    with pytest.raises(InvalidArgument, match=r"^parameter 'timeout' is not set; expected int64_param$"):
        read_timeout(request.parameters)
