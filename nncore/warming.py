"""
Nothing -> a full cache: whatever a forward pass and its probabilities need, compiled or loaded.

Kernels are generic over shapes, so that a handful of tiny models need all that any model does.
"""

from __future__ import annotations

import numpy as np

from nncore.model import Layer, Mlp

__all__ = ["warm"]


def warm() -> None:
    """
    Compile now what models would compile when first called; what the cache has already is only loaded.

    Afterwards `nncore.compilation.cache_content()` says where the code lies, and `not_kept()` what could not
    be kept there. Activations called as functions of their own (nncore.elu) are compiled when first used.
    """
    for dtype in ("float32", "float64"):
        # Probabilities of a single output go through sigmoid, of several through softmax.
        for n_out in (1, 2):
            mlp = Mlp([Layer(np.zeros((1, n_out), dtype))])
            x = np.zeros((1, 1), dtype)
            mlp.forward(x, threads=2)
            mlp.predict_proba(x)
