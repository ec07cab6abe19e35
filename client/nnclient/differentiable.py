"""
x and directions -> derivatives of a served model: methods that both clients have.

They are those of nncore's `Mlp`, and take the same arguments after the model's name. Each answer brings the
values along: the methods named value_and_… return both, for the same cost.
"""

from __future__ import annotations

from typing import Any, Unpack

from numpy.typing import ArrayLike, NDArray

from nnclient.derivatives import (
    DerivativeQuestion,
    Differential,
    OfOneOutput,
    OfOutputs,
    one,
    question_of,
)


class Differentiable:
    """
    The derivatives of a served model. What all methods have in common:

    x: (rows, n_in) real numbers, or (n_in,) for a single row, whose results then have no axis of rows.
    of: "outputs" (the default) or "probabilities".
    inputs, outputs: indices, each at most once; None for all. n_in and n_out below are their numbers, but for
    x, which always has all inputs.
    version: of the model; empty for the server's choice.  timeout_s: time for the whole call.

    Results are in the model's dtype. An array larger than message_bytes travels as a stream of messages.
    Raises InvalidInput, NotFound, Overloaded, DeadlineExceeded, Unavailable or another NnclientError.
    """

    def vjp(
        self, model: str, x: ArrayLike, cotangents: ArrayLike, **choice: Unpack[OfOutputs]
    ) -> NDArray[Any]:
        """Vector-Jacobian products J^T v; cotangents v: (rows, n_out).  Returns (rows, n_in)."""
        return self.value_and_vjp(model, x, cotangents, **choice).derivatives

    def value_and_vjp(
        self, model: str, x: ArrayLike, cotangents: ArrayLike, **choice: Unpack[OfOutputs]
    ) -> Differential:
        """Values (rows, n_out), and what vjp returns."""
        return self._differentiate(question_of("vjp", model, choice), x, cotangents, choice)

    def jvp(self, model: str, x: ArrayLike, tangents: ArrayLike, **choice: Unpack[OfOutputs]) -> NDArray[Any]:
        """Jacobian-vector products J t; tangents t: (rows, n_in).  Returns (rows, n_out)."""
        return self.value_and_jvp(model, x, tangents, **choice).derivatives

    def value_and_jvp(
        self, model: str, x: ArrayLike, tangents: ArrayLike, **choice: Unpack[OfOutputs]
    ) -> Differential:
        """Values (rows, n_out), and what jvp returns."""
        return self._differentiate(question_of("jvp", model, choice), x, tangents, choice)

    def jacobian(self, model: str, x: ArrayLike, **choice: Unpack[OfOutputs]) -> NDArray[Any]:
        """The Jacobian at each row, (rows, n_out, n_in): [row, i, j]: output i by input j."""
        return self.value_and_jacobian(model, x, **choice).derivatives

    def value_and_jacobian(self, model: str, x: ArrayLike, **choice: Unpack[OfOutputs]) -> Differential:
        """Values (rows, n_out), and what jacobian returns."""
        return self._differentiate(question_of("jacobian", model, choice), x, None, choice)

    def value_and_grad(
        self, model: str, x: ArrayLike, output: int | None = None, **choice: Unpack[OfOneOutput]
    ) -> Differential:
        """
        One output (rows,), and its gradient (rows, n_in).

        output: its index; may be None for a model with a single output.
        """
        return self._differentiate(question_of("value_and_grad", model, choice, one(output)), x, None, choice)

    def hvp(
        self,
        model: str,
        x: ArrayLike,
        tangents: ArrayLike,
        output: int | None = None,
        **choice: Unpack[OfOneOutput],
    ) -> NDArray[Any]:
        """Hessian-vector products of one output; tangents: (rows, n_in).  Returns (rows, n_in)."""
        return self.value_and_hvp(model, x, tangents, output, **choice).derivatives

    def value_and_hvp(
        self,
        model: str,
        x: ArrayLike,
        tangents: ArrayLike,
        output: int | None = None,
        **choice: Unpack[OfOneOutput],
    ) -> Differential:
        """The output (rows,), and what hvp returns."""
        return self._differentiate(question_of("hvp", model, choice, one(output)), x, tangents, choice)

    def _differentiate(
        self,
        question: DerivativeQuestion,
        x: ArrayLike,
        directions: ArrayLike | None,
        choice: OfOutputs | OfOneOutput,
    ) -> Differential:
        raise NotImplementedError


class AsyncDifferentiable:
    """Differentiable, for asyncio: the same methods with `await`."""

    async def vjp(
        self, model: str, x: ArrayLike, cotangents: ArrayLike, **choice: Unpack[OfOutputs]
    ) -> NDArray[Any]:
        """As Differentiable.vjp."""
        return (await self.value_and_vjp(model, x, cotangents, **choice)).derivatives

    async def value_and_vjp(
        self, model: str, x: ArrayLike, cotangents: ArrayLike, **choice: Unpack[OfOutputs]
    ) -> Differential:
        """As Differentiable.value_and_vjp."""
        return await self._differentiate(question_of("vjp", model, choice), x, cotangents, choice)

    async def jvp(
        self, model: str, x: ArrayLike, tangents: ArrayLike, **choice: Unpack[OfOutputs]
    ) -> NDArray[Any]:
        """As Differentiable.jvp."""
        return (await self.value_and_jvp(model, x, tangents, **choice)).derivatives

    async def value_and_jvp(
        self, model: str, x: ArrayLike, tangents: ArrayLike, **choice: Unpack[OfOutputs]
    ) -> Differential:
        """As Differentiable.value_and_jvp."""
        return await self._differentiate(question_of("jvp", model, choice), x, tangents, choice)

    async def jacobian(self, model: str, x: ArrayLike, **choice: Unpack[OfOutputs]) -> NDArray[Any]:
        """As Differentiable.jacobian."""
        return (await self.value_and_jacobian(model, x, **choice)).derivatives

    async def value_and_jacobian(self, model: str, x: ArrayLike, **choice: Unpack[OfOutputs]) -> Differential:
        """As Differentiable.value_and_jacobian."""
        return await self._differentiate(question_of("jacobian", model, choice), x, None, choice)

    async def value_and_grad(
        self, model: str, x: ArrayLike, output: int | None = None, **choice: Unpack[OfOneOutput]
    ) -> Differential:
        """As Differentiable.value_and_grad."""
        question = question_of("value_and_grad", model, choice, one(output))
        return await self._differentiate(question, x, None, choice)

    async def hvp(
        self,
        model: str,
        x: ArrayLike,
        tangents: ArrayLike,
        output: int | None = None,
        **choice: Unpack[OfOneOutput],
    ) -> NDArray[Any]:
        """As Differentiable.hvp."""
        return (await self.value_and_hvp(model, x, tangents, output, **choice)).derivatives

    async def value_and_hvp(
        self,
        model: str,
        x: ArrayLike,
        tangents: ArrayLike,
        output: int | None = None,
        **choice: Unpack[OfOneOutput],
    ) -> Differential:
        """As Differentiable.value_and_hvp."""
        question = question_of("hvp", model, choice, one(output))
        return await self._differentiate(question, x, tangents, choice)

    async def _differentiate(
        self,
        question: DerivativeQuestion,
        x: ArrayLike,
        directions: ArrayLike | None,
        choice: OfOutputs | OfOneOutput,
    ) -> Differential:
        raise NotImplementedError
