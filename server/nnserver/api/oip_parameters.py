"""Parameters of a ModelInferRequest -> what they ask for: each is checked or ignored as by Triton."""

from __future__ import annotations

from collections.abc import Mapping

from nnproto.oip import inference_pb2 as pb
from nnserver.errors import InvalidArgument

# The one reserved name that is known. Every answer on a stream here is the final one, so it changes nothing.
_ENABLE_EMPTY_FINAL = "triton_enable_empty_final_response"
_RESERVED = "triton_"

# What each parameter that is known may be. Sequences and priorities are of no effect: models have no state
# between requests, and the queue has one level.
_KINDS: Mapping[str, tuple[str, ...]] = {
    "timeout": ("int64_param",),
    "priority": ("int64_param", "uint64_param"),
    "sequence_id": ("int64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    _ENABLE_EMPTY_FINAL: ("bool_param",),
}


def read_timeout(parameters: Mapping[str, pb.InferParameter]) -> float | None:
    """
    Return the seconds that a request may wait, or None; parameters that are not known are ignored.

    Raises InvalidArgument for one of the wrong type or out of range, and for reserved names.
    """
    if not parameters:
        return None
    for name, parameter in parameters.items():
        kinds = _KINDS.get(name)
        if kinds is None:
            if name.startswith(_RESERVED):
                raise InvalidArgument(
                    f"parameter {name[:80]!r} is not known; of those that begin with '{_RESERVED}' "
                    f"this server takes '{_ENABLE_EMPTY_FINAL}'"
                )
            continue
        value = _value(name, parameter, kinds)
        if name in ("timeout", "priority") and isinstance(value, int) and value < 0:
            raise InvalidArgument(f"parameter '{name}' is {value}; expected at least 0")
    microseconds = parameters["timeout"].int64_param if "timeout" in parameters else 0
    return microseconds / 1e6 if microseconds else None


def read_classification(parameters: Mapping[str, pb.InferParameter], output: str) -> int:
    """Return how many classes of *output* are asked for, 0 if its values are; raises InvalidArgument."""
    if not parameters:
        return 0
    if any(name.startswith("shared_memory_") for name in parameters):
        raise InvalidArgument(
            f"output '{output}' is to go to shared memory; this server answers in messages only"
        )
    if "classification" not in parameters:
        return 0
    count = _value("classification", parameters["classification"], ("int64_param",))
    if not isinstance(count, int) or count < 1:
        raise InvalidArgument(
            f"parameter 'classification' of output '{output}' is {count}; expected at least 1"
        )
    return count


def _value(name: str, parameter: pb.InferParameter, kinds: tuple[str, ...]) -> object:
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in kinds:
        raise InvalidArgument(f"parameter '{name}' is {kind or 'not set'}; expected {' or '.join(kinds)}")
    return getattr(parameter, kind)
