"""
A served model -> a function of PyTorch tensors that autograd can differentiate.

    served = nnclient.torch.function(client, "surrogate")
    loss = ((served(design(parameters)) - target) ** 2).mean()
    loss.backward()

The forward pass is one call of the server, the backward pass another, each for all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nnclient.client import Client
from nnclient.derivatives import Of

__all__ = ["function"]


def function(
    client: Client, model: str, *, of: Of = "outputs", version: str = "", timeout_s: float | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Return *model* as a function of tensors (..., n_in) -> (..., n_out).

    The result has the dtype and the device of its argument; the model computes in its own dtype. Derivatives
    go backwards and forwards (torch.autograd.forward_ad), once: those of derivatives are not to be had here.
    of, version, timeout_s: as for Client.vjp.
    """
    served = _Served(client, model, of, {"version": version, "timeout_s": timeout_s})

    def call(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float32, torch.float64) or not x.ndim:
            what = (
                f"{x.dtype} of shape {tuple(x.shape)}"
                if isinstance(x, torch.Tensor)
                else f"{type(x).__name__}"
            )
            raise TypeError(f"x is {what}; expected a tensor (..., n_in) of torch.float32 or torch.float64")
        y: torch.Tensor = _Function.apply(x, served)
        return y

    return call


class _Served:
    """Tensors in, tensors out, by way of the server; leading axes are rows."""

    def __init__(self, client: Client, model: str, of: Of, choice: Any) -> None:
        self._client = client
        self._model = model
        self._of: Any = of
        self._choice = choice

    def values(self, x: torch.Tensor) -> torch.Tensor:
        return _like(x, self._client.predict(self._model, _rows(x), self._of, **self._choice))

    def pulled(self, x: torch.Tensor, cotangents: torch.Tensor) -> torch.Tensor:
        choice = {"of": self._of, **self._choice}
        return _like(x, self._client.vjp(self._model, _rows(x), _rows(cotangents), **choice))

    def pushed(self, x: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
        choice = {"of": self._of, **self._choice}
        return _like(x, self._client.jvp(self._model, _rows(x), _rows(tangents), **choice))


class _Function(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(x: torch.Tensor, served: _Served) -> torch.Tensor:
        return served.values(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.served = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, cotangents: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return _Pullback.apply(x, cotangents, ctx.served), None

    @staticmethod
    def jvp(ctx: Any, tangents: torch.Tensor, _: None) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        pushed: torch.Tensor = ctx.served.pushed(x, tangents)
        return pushed


class _Pullback(torch.autograd.Function):  # type: ignore[misc]
    """A function of its own, so that differentiating it fails; as a constant it would falsify penalties."""

    @staticmethod
    def forward(x: torch.Tensor, cotangents: torch.Tensor, served: _Served) -> torch.Tensor:
        return served.pulled(x, cotangents)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("derivatives of a served model can be taken once; for second ones, see Client.hvp")


def _rows(x: torch.Tensor) -> Any:
    return x.detach().reshape(-1, x.shape[-1]).cpu().numpy()


def _like(x: torch.Tensor, rows: Any) -> torch.Tensor:
    """Return *rows* as a tensor with the leading axes, the dtype and the device of *x*."""
    tensor = torch.from_numpy(rows).to(device=x.device, dtype=x.dtype)
    return tensor.reshape(*x.shape[:-1], rows.shape[-1])
