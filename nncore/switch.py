"""
An activation's code -> its formula, chosen at run time: `activate` and `activate_grad`, for kernels.

    activate(x, code, alpha)                   with code = ACTIVATIONS["elu"].code
    activate_grad(x, code, alpha)              its derivative

Apart from `nncore.activations`, which describes models without Numba.
"""

from __future__ import annotations

from nncore.activations import ACTIVATIONS
from nncore.tracing import switched

__all__ = ["activate", "activate_grad"]

activate = switched({a.code: a.trace for a in ACTIVATIONS.values()}, "activate")
activate_grad = switched({a.code: a.trace_derivative for a in ACTIVATIONS.values()}, "activate_grad")
