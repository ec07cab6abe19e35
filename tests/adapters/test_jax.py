"""nnclient.jax: a served model under grad, jacrev, jit and vmap, compared with the same network in JAX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters.conftest import SURROGATE

from nnclient import Client, NotFound
from nnclient.jax import function


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def twin(x: Any) -> Any:
    """The same network, for JAX to evaluate and differentiate itself."""
    for layer in SURROGATE.layers:
        x = x @ np.asarray(layer.weights) + np.asarray(layer.bias)
        x = jnp.tanh(x) if layer.activation == "tanh" else x
    return x


X = np.random.default_rng(3).standard_normal((7, 5))


def close(got: Any, expected: Any) -> None:
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (1, 7, 5), (0, 5)])
def test_values_and_gradients_are_jaxs(client: Client, shape: tuple[int, ...]) -> None:
    """For any leading axes, with jit and without."""
    served = function(client, "surrogate")
    x = np.resize(X, shape)
    weights = np.arange(3.0)
    for wrap in (jax.jit, lambda f: f):
        close(wrap(served)(x), twin(x))
        close(
            wrap(jax.grad(lambda x: (served(x) ** 2 @ weights).sum()))(x),
            jax.grad(lambda x: (twin(x) ** 2 @ weights).sum())(x),
        )


def test_jacrev_and_vmap(client: Client) -> None:
    """Jacobians of rows: one vmapped row's, and their leading axes, as JAX's own."""
    served = function(client, "surrogate")
    close(jax.jacrev(served)(X[0]), jax.jacrev(twin)(X[0]))
    close(jax.vmap(jax.jacrev(served))(X), jax.vmap(jax.jacrev(twin))(X))
    close(jax.vmap(served, in_axes=1)(X.T), twin(X))


def test_all_rows_of_a_vmap_go_in_one_call(client: Client, calls: list[str]) -> None:
    """And those of its gradient in another."""
    served = function(client, "surrogate")
    jax.block_until_ready(jax.vmap(served)(X))
    assert calls == ["predict"]
    jax.block_until_ready(jax.vmap(jax.grad(lambda x: served(x)[0]))(X))
    assert calls.count("vjp") == 1


def test_gradients_of_probabilities(client: Client) -> None:
    """of="probabilities" is softmax behind the outputs, for derivatives too."""
    served = function(client, "surrogate", of="probabilities")
    close(jax.grad(lambda x: served(x)[1])(X[0]), jax.grad(lambda x: jax.nn.softmax(twin(x))[1])(X[0]))


def test_second_derivatives_are_refused(client: Client) -> None:
    """A Hessian is an error, not zero."""
    served = function(client, "surrogate")
    with pytest.raises(ValueError, match="do not support JVP"):
        jax.jacrev(jax.grad(lambda x: served(x)[0]))(X[0])
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.hessian(lambda x: served(x)[0])(X[0])


def test_results_have_the_arguments_type(client: Client) -> None:
    """float32 stays float32, and whole numbers become it."""
    served = function(client, "surrogate")
    assert served(X.astype(np.float32)).dtype == jnp.float32
    assert served(np.ones(5, np.int32)).dtype == jnp.float32


def test_wrong_shapes_and_names_are_refused_at_once(client: Client) -> None:
    """With a text, not from the depths of a callback."""
    with pytest.raises(ValueError, match=r"x has shape \(2, 4\); model 'surrogate' expects \(\.\.\., 5\)"):
        function(client, "surrogate")(np.ones((2, 4)))
    with pytest.raises(NotFound):
        function(client, "nope")
