"""
Nothing -> a full cache: whatever outputs, probabilities and their derivatives need, compiled or loaded.

Kernels are generic over shapes, so that a handful of tiny models need all that any model does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nncore.model import Layer, LayerNorm, Mlp

__all__ = ["warm"]


def warm() -> None:
    """
    Compile now what models would compile when first called; what the cache has already is only loaded.

    Afterwards `nncore.compilation.cache_content()` says where the code lies, and `not_kept()` what could not
    be kept there. Activations as functions of their own (nncore.elu), as layer normalizations and derivatives
    use them, are compiled when first used.
    """
    for dtype in ("float32", "float64"):
        for mlp in _models(dtype):
            x = np.zeros((1, 1), dtype)
            mlp.forward(x, threads=2)
            mlp.predict_proba(x)
            for of in ("outputs", "probabilities"):
                mlp.jacobian(x, of=of)
                mlp.jvp(x, x, of=of)
                mlp.hvp(x, x, of=of)


def _models(dtype: str) -> Iterator[Mlp]:
    def layer(n_out: int, activation: str = "identity") -> Layer:
        return Layer(np.zeros((1, n_out), dtype), None, activation)

    # Probabilities of a single output go through sigmoid, of several through softmax.
    yield Mlp([layer(1)])
    yield Mlp([layer(2)])
    yield Mlp([layer(2), LayerNorm(np.ones(2, dtype))])
    yield Mlp([layer(2, "log_softmax")])
