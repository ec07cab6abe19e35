"""
A node of an ONNX graph, as operators see it: its inputs as values, its attributes by name and type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nncore.convert.flow import Dims, Flow
from nncore.errors import ConversionError

Numbers = npt.NDArray[Any]

# onnx.TensorProto.DataType of floats; bfloat16 and float16 are taken for float32.
FLOAT_TYPES = (1, 10, 11, 16)
INTEGER_TYPES = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_}


@dataclass(frozen=True)
class Failure:
    """A value that cannot be had; the message says where and why."""

    message: str


@dataclass(frozen=True)
class ClassIndex:
    """The index of the greatest number of a row."""


@dataclass(frozen=True)
class ClassLabels:
    """The class of a row; labels: of all classes, by index."""

    labels: tuple[str, ...]


Value: TypeAlias = Flow | Dims | ClassIndex | ClassLabels | Failure | Numbers


@dataclass
class Node:
    """
    A node of a graph.

    where: as messages call it.  operator: its type, with the domain before it unless that is ONNX's own.
    inputs: None for those left out.  outputs: how many are named.
    labels: class labels that come to light here.
    """

    where: str
    operator: str
    inputs: list[Value | None]
    attributes: dict[str, Any]
    outputs: int
    opset: int
    labels: list[tuple[str, ...]] = field(default_factory=list)

    def has(self, index: int) -> bool:
        """Whether there is an input *index*."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        """Input *index*, whatever it is."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise ConversionError(f"lacks input {index}")
        return value

    def flow(self, index: int = 0) -> Flow:
        """Input *index*, which must depend on the graph's input."""
        value = self.value(index)
        if not isinstance(value, Flow):
            kind = "a constant" if isinstance(value, np.ndarray) else "no tensor of numbers"
            raise ConversionError(f"has {kind} as input {index}, where the rows were expected")
        return value

    def constant(self, index: int) -> Numbers:
        """Input *index*, which must be constant numbers."""
        value = self.value(index)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            raise ConversionError(
                f"has an input {index} that depends on the graph's input; expected a constant"
            )
        return value

    def optional(self, index: int) -> Numbers | None:
        """Constant *index*, or None if it is left out."""
        return self.constant(index) if self.has(index) else None

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int | float):
            raise ConversionError(f"has {name} = {value!r}")
        return float(value)

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise ConversionError(f"has {name} = {value!r}")
        return value

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        value = self.attributes.get(name, default)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    def numbers(self, name: str) -> Numbers | None:
        """A list of numbers as float32 array; None if it is left out."""
        value = self.attributes.get(name)
        return None if value is None else np.asarray(value, np.float32).reshape(-1)

    def axes(self, index: int) -> list[int] | None:
        """The axes: an attribute in old models, input *index* in newer ones."""
        given = self.attributes.get("axes")
        if given is None and self.has(index):
            given = self.constant(index).reshape(-1).tolist()
        return None if given is None else [int(axis) for axis in given]
