"""
A model's layers -> its evaluator: runs of dense layers by the kernels, what works on whole rows in between.

A model of dense layers alone has the evaluator of `nncore.forward`. Layer normalization and log_softmax cut
others into segments: each goes through all rows of a group before the next one begins, by kernels that treat
every row alike, so that a row's bits depend on the row and the model alone here, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from nncore.activations import ACTIVATIONS
from nncore.arrays import FloatArray
from nncore.model import LOG_SOFTMAX, AnyLayer, Layer, LayerNorm

# Rows that go through all segments together: what lies between two segments should stay in the second cache.
_GROUP_NUMBERS = 1 << 16
_LEAST_GROUP_ROWS = 64


class Evaluating(Protocol):
    """What a model asks of its evaluator; see `nncore.evaluation.Evaluator`."""

    def evaluate_at_once(self, x: Any, out: Any) -> FloatArray | None:
        """Evaluate if nothing needs to be converted, else None."""

    def evaluate(self, x: FloatArray, y: FloatArray, threads: int = 1) -> None:
        """Evaluate checked rows."""

    def threads_for(self, rows: int) -> int:
        """How many threads pay."""


def evaluator_of(layers: Sequence[AnyLayer]) -> Evaluating:
    """The evaluator for *layers*, which chain."""
    dense = [layer for layer in layers if isinstance(layer, Layer)]
    if len(dense) == len(layers) and dense[-1].activation != LOG_SOFTMAX:
        from nncore import forward

        return forward.evaluator_of(dense)
    return SegmentedEvaluator(layers)


class SegmentedEvaluator:
    """Evaluates a model with layers that work on whole rows. Safe to be called by many threads at once."""

    def __init__(self, layers: Sequence[AnyLayer]) -> None:
        self._segments = list(_segments(layers))
        self._widest = max(layer.n_out for layer in layers)
        self._dtype = layers[0].dtype

    def evaluate_at_once(self, x: Any, out: Any) -> FloatArray | None:
        """None: there is no shorter way than `evaluate`."""
        return None

    def evaluate(self, x: FloatArray, y: FloatArray, threads: int = 1) -> None:
        """Evaluate *x* into *y*, both checked by the caller; dense segments by up to *threads* threads."""
        group = max(_GROUP_NUMBERS // self._widest, _LEAST_GROUP_ROWS) * threads
        for start in range(0, len(x), group):
            source = x[start : start + group]
            rows = len(source)
            for segment in self._segments[:-1]:
                target = np.empty((rows, segment.n_out), self._dtype)
                segment.evaluate(source, target, threads)
                source = target
            self._segments[-1].evaluate(source, y[start : start + rows], threads)

    def threads_for(self, rows: int) -> int:
        """How many threads pay for the dearest segment."""
        return max(segment.threads_for(rows) for segment in self._segments)


class _Dense:
    """A run of dense layers."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        from nncore import forward

        self.n_out = layers[-1].n_out
        self._is_log_softmax = layers[-1].activation == LOG_SOFTMAX
        if self._is_log_softmax:
            layers = [*layers[:-1], Layer(layers[-1].weights, layers[-1].bias)]
        evaluator = forward.evaluator_of(layers)
        self._evaluate, self.threads_for = evaluator.evaluate, evaluator.threads_for

    def evaluate(self, x: FloatArray, y: FloatArray, threads: int) -> None:
        """Evaluate *x* into *y*."""
        self._evaluate(x, y, threads)
        if self._is_log_softmax:
            from nncore.row_softmax import log_softmax

            log_softmax(y, out=y)


class _Normalization:
    """A layer normalization."""

    def __init__(self, layer: LayerNorm) -> None:
        self.n_out = layer.n_out
        self._layer = layer

    def evaluate(self, x: FloatArray, y: FloatArray, threads: int) -> None:
        """Evaluate *x* into *y*."""
        from nncore.row_normalization import normalize_rows

        layer = self._layer
        normalize_rows(x, layer.gain, layer.bias, layer.epsilon, y)
        if layer.activation != "identity":
            # The ufunc has the bits of the kernels.
            alpha = [] if layer.alpha is None else [np.asarray(layer.alpha, layer.dtype)]
            ACTIVATIONS[layer.activation].function(y, *alpha, out=y)

    def threads_for(self, rows: int) -> int:
        """1."""
        return 1


def _segments(layers: Sequence[AnyLayer]) -> Iterator[_Dense | _Normalization]:
    for is_dense, run in itertools.groupby(layers, key=lambda layer: isinstance(layer, Layer)):
        if is_dense:
            yield _Dense([layer for layer in run if isinstance(layer, Layer)])
        else:
            yield from (_Normalization(layer) for layer in run if isinstance(layer, LayerNorm))
