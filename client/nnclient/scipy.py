"""
A served model -> an objective for `scipy.optimize.minimize(..., jac=True)`: value and gradient by one call.

    from scipy.optimize import minimize
    from nnclient.scipy import objective

    found = minimize(objective(client, "surrogate", output=0), x0, jac=True, method="L-BFGS-B")

SciPy itself is not needed here. Values come in the model's precision: for a float32 model, a minimizer that
asks for more digits than 7 will say that it lost precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nnclient.client import Client
from nnclient.derivatives import Of
from nnclient.errors import InvalidInput

__all__ = ["Objective", "objective"]


class Objective:
    """
    One output as a function of some inputs; make it by `objective`.

    calls: how often the server has been asked, for values and gradients or for Hessian-vector products.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        output: int | None,
        sign: float,
        at: NDArray[np.float64] | None,
        inputs: Sequence[int] | None,
        choice: dict[str, Any],
    ) -> None:
        self._client = client
        self._model = model
        self._output = output
        self._sign = sign
        self._at = at
        self._inputs = inputs
        self._choice: Any = {**choice, "inputs": inputs}
        self.calls = 0

    def __call__(self, x: ArrayLike) -> tuple[float, NDArray[np.float64]]:
        """Return the value at *x* and its gradient there, in float64."""
        self.calls += 1
        value, gradient = self._client.value_and_grad(self._model, self._row(x), self._output, **self._choice)
        return self._sign * float(value), self._sign * gradient.astype(np.float64)

    def hessp(self, x: ArrayLike, p: ArrayLike) -> NDArray[np.float64]:
        """Return the Hessian at *x* times *p*: for methods of SciPy's that take hessp, such as Newton-CG."""
        self.calls += 1
        product = self._client.hvp(
            self._model, self._row(x), np.asarray(p, np.float64), self._output, **self._choice
        )
        return self._sign * product.astype(np.float64)

    def _row(self, x: ArrayLike) -> NDArray[np.float64]:
        given = np.asarray(x, np.float64)
        if self._at is None or self._inputs is None:
            return given
        if given.shape != (len(self._inputs),):
            raise InvalidInput(
                f"x has shape {given.shape}; expected ({len(self._inputs)},), a number for each of inputs"
            )
        row = self._at.copy()
        row[list(self._inputs)] = given
        return row


def objective(
    client: Client,
    model: str,
    output: int | None = None,
    *,
    maximize: bool = False,
    inputs: Sequence[int] | None = None,
    at: ArrayLike | None = None,
    of: Of = "outputs",
    version: str = "",
    timeout_s: float | None = None,
) -> Objective:
    """
    Return the output of index *output* as a function to be minimized, or, with its sign turned, maximized.

    output: may be None for a model with a single output.
    inputs, at: to vary these inputs only, in this order; *at*, (n_in,), has the values of all others.
    of, version, timeout_s: as for Client.value_and_grad.
    """
    if (inputs is None) != (at is None):
        raise InvalidInput("inputs and at go together: which inputs vary, and what the others are")
    row = None if at is None else np.array(at, np.float64)
    if row is not None and row.ndim != 1:
        raise InvalidInput(f"at has shape {row.shape}; expected (n_in,), a single row")
    if row is not None and inputs is not None:
        for index in inputs:
            if not 0 <= index < row.size:
                raise InvalidInput(f"inputs has {index}; expected indices of at, 0 to {row.size - 1}")
    choice = {"of": of, "version": version, "timeout_s": timeout_s}
    return Objective(client, model, output, -1.0 if maximize else 1.0, row, inputs, choice)
