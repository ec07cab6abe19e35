"""nnclient.scipy: SciPy minimizes a served model, by values and gradients of one call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import check_grad, minimize
from support.models import random_mlp
from support.server import running

import nncore
from nnclient import Client, InvalidInput
from nnclient.scipy import objective


def bowl() -> nncore.Mlp:
    """The sum of softplus(x) + softplus(-x) over three inputs, twice: least at 0, smooth, in float64."""
    both = np.hstack([np.eye(3), -np.eye(3)])
    return nncore.Mlp([nncore.Layer(both, activation="softplus"), nncore.Layer(np.ones((6, 2)))])


BOWL = bowl()
X0 = np.array([2.0, -1.0, 0.5])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("models")
    BOWL.save(folder / "bowl.safetensors")
    random_mlp(1, (2, 1)).save(folder / "single.safetensors")
    with running(str(folder)) as server, Client(server.address) as it:
        yield it


def test_the_gradient_is_the_values(client: Client) -> None:
    """By scipy.optimize.check_grad; both are those of nncore."""
    f = objective(client, "bowl", 1)
    assert check_grad(lambda x: f(x)[0], lambda x: f(x)[1], X0) < 1e-6
    value, gradient = f(X0)
    assert isinstance(value, float)
    assert (value, gradient.tolist()) == (BOWL.forward(X0)[1], BOWL.value_and_grad(X0, 1)[1].tolist())
    assert gradient.dtype == np.float64


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "CG", "SLSQP", "TNC"])
def test_minimizers_find_the_minimum(client: Client, method: str) -> None:
    """softplus(x) + softplus(-x) is least at 0."""
    found = minimize(objective(client, "bowl", 0), X0, jac=True, method=method)
    np.testing.assert_allclose(found.x, 0, atol=1e-3)
    assert found.fun == pytest.approx(6 * np.log(2), abs=1e-6)


@pytest.mark.parametrize("method", ["Newton-CG", "trust-ncg", "trust-krylov"])
def test_second_order_methods_take_hessp(client: Client, method: str) -> None:
    """Hessian-vector products bring them there, too."""
    f = objective(client, "bowl", 0)
    found = minimize(f, X0, jac=True, hessp=f.hessp, method=method)
    np.testing.assert_allclose(found.x, 0, atol=1e-4)
    assert f.calls > found.nfev, "the products were asked for, too"


def test_maximizing_turns_value_gradient_and_hessian(client: Client) -> None:
    """maximize=True is the same function upside down."""
    up, down = objective(client, "bowl", 0), objective(client, "bowl", 0, maximize=True)
    assert down(X0)[0] == -up(X0)[0]
    np.testing.assert_array_equal(down(X0)[1], -up(X0)[1])
    np.testing.assert_array_equal(down.hessp(X0, [1, 2, 3]), -up.hessp(X0, [1, 2, 3]))


def test_some_inputs_may_vary_and_the_others_stay(client: Client) -> None:
    """The minimum over inputs 2 and 0, with input 1 held at 3."""
    f = objective(client, "bowl", 0, inputs=[2, 0], at=[9.0, 3.0, 9.0])
    value, gradient = f([0.25, -0.5])
    assert value == BOWL.forward([-0.5, 3.0, 0.25])[0]
    np.testing.assert_array_equal(gradient, BOWL.value_and_grad([-0.5, 3.0, 0.25], 0, inputs=[2, 0])[1])
    np.testing.assert_allclose(minimize(f, [1.0, 1.0], jac=True).x, 0, atol=1e-3)


def test_a_model_of_one_output_needs_no_index(client: Client) -> None:
    """And of several, the server says that it does."""
    objective(client, "single")([1.0, 2.0])
    with pytest.raises(InvalidInput, match="output_indices has 0 entries"):
        objective(client, "bowl")(X0)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"inputs": [0]}, "inputs and at go together"),
        ({"at": X0}, "inputs and at go together"),
        ({"inputs": [0], "at": [X0]}, "at has shape (1, 3); expected (n_in,), a single row"),
        ({"inputs": [3], "at": X0}, "inputs has 3; expected indices of at, 0 to 2"),
    ],
)
def test_wrong_choices_are_refused(client: Client, choice: Any, text: str) -> None:
    """When the objective is made."""
    with pytest.raises(InvalidInput) as caught:
        objective(client, "bowl", 0, **choice)
    assert text in str(caught.value)


def test_a_wrong_number_of_varying_inputs_is_refused(client: Client) -> None:
    """Before it is sent."""
    f = objective(client, "bowl", 0, inputs=[0, 1], at=X0)
    with pytest.raises(InvalidInput, match=r"x has shape \(3,\); expected \(2,\)"):
        f(X0)


def test_modules_named_after_libraries_do_not_hide_them() -> None:
    """`import scipy` is SciPy's, with nnclient.scipy imported."""
    import scipy

    assert "site-packages" in str(Path(scipy.__file__))
