"""
A served model -> a function of JAX arrays that grad, jacrev, jit and vmap take.

    served = nnclient.jax.function(client, "surrogate")
    jax.jit(jax.grad(lambda design: served(design)[0]))(design)

Evaluating it is one call of the server, differentiating it another, each for all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnclient.client import Client
from nnclient.derivatives import Of

__all__ = ["function"]


def function(
    client: Client, model: str, *, of: Of = "outputs", version: str = "", timeout_s: float | None = None
) -> Callable[[Any], Any]:
    """
    Return *model* as a function of arrays (..., n_in) -> (..., n_out), in the argument's floating-point type.

    Derivatives go backwards, once: jax.grad, vjp and jacrev, not jvp, jacfwd or hessian (Client.jvp, jacobian
    and hvp are for these). Under vmap, all rows go in one call. The server is asked once, here, for the
    model's shape.
    of, version, timeout_s: as for Client.vjp.
    """
    info = client.model(model, version, timeout_s)
    kind: Any = of
    choice: Any = {"version": version, "timeout_s": timeout_s}

    def values(x: Any) -> Any:
        rows, shape = _rows(x)
        return client.predict(model, rows, kind, **choice).astype(rows.dtype).reshape(*shape, -1)

    def pulled(x: Any, cotangents: Any) -> Any:
        rows, shape = _rows(x)
        products = client.vjp(model, rows, _rows(cotangents)[0], of=of, **choice)
        return products.astype(rows.dtype).reshape(*shape, -1)

    @jax.custom_vjp  # type: ignore[untyped-decorator]
    def served(x: Any) -> Any:
        answer = jax.ShapeDtypeStruct((*x.shape[:-1], info.n_out), x.dtype)
        return jax.pure_callback(values, answer, x, vmap_method="broadcast_all")

    def forward(x: Any) -> Any:
        return served(x), x

    def backward(x: Any, cotangents: Any) -> Any:
        answer = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (jax.pure_callback(pulled, answer, x, cotangents, vmap_method="broadcast_all"),)

    served.defvjp(forward, backward)

    def call(x: Any) -> Any:
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.float32)
        if not x.ndim or x.shape[-1] != info.n_in:
            # Here, where it can be told: an exception in a callback ends in a wall of text.
            raise ValueError(f"x has shape {x.shape}; model {model!r} expects (..., {info.n_in})")
        return served(x)

    return call


def _rows(x: Any) -> tuple[Any, tuple[int, ...]]:
    """Return *x* as rows of NumPy's, and its leading axes."""
    array = np.asarray(x)
    return array.reshape(-1, array.shape[-1]), array.shape[:-1]
