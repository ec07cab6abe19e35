"""A model's outputs -> probabilities, and the most probable classes of each row."""

from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.activations import ACTIVATIONS
from nncore.arrays import FloatArray
from nncore.errors import ArgumentError
from nncore.row_softmax import softmax


def probabilities(last_activation: str, outputs: FloatArray, out: FloatArray | None) -> FloatArray:
    """
    *outputs*, (rows, n_out) or (n_out,), as probabilities of the same shape, written into *out* if given.

    Without *out*, outputs that are probabilities already are returned themselves, not copied.
    """
    if last_activation in ("softmax", "sigmoid"):
        if out is None:
            return outputs
        np.copyto(out, outputs)
        return out
    if outputs.shape[-1] == 1:
        answer: FloatArray = ACTIVATIONS["sigmoid"].function(outputs, out=out)
        return answer
    return softmax(outputs, out=out)


def top_classes(probabilities: FloatArray, k: int) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """
    Indices (rows, k) and probabilities (rows, k) of the *k* most probable classes; (k,) for a single row.

    By descending probability, ties by lower index, NaN last. One column p stands for two: [1 - p, p].
    Raises ArgumentError unless 1 <= k <= number of classes.
    """
    if probabilities.shape[-1] == 1:
        probabilities = np.append(1 - probabilities, probabilities, axis=-1)
    class_count = probabilities.shape[-1]
    if not 1 <= k <= class_count:
        raise ArgumentError(f"k is {k}; expected 1 to {class_count}, the number of classes")
    # A stable sort of the negated scores: equal ones keep their order, and NumPy sorts NaN to the end.
    order = np.argsort(-probabilities, axis=-1, kind="stable")[..., :k]
    scores: Any = np.take_along_axis(probabilities, order, axis=-1)
    return order.astype(np.int32), scores
