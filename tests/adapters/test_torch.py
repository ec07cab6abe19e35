"""nnclient.torch: a served model in PyTorch's graph, compared with the same network in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters.conftest import SURROGATE

import nncore
from nnclient import Client, InvalidInput
from nnclient.torch import function


def twin(mlp: nncore.Mlp) -> torch.nn.Module:
    """The same network, for PyTorch to evaluate and differentiate itself."""
    parts: list[torch.nn.Module] = []
    for layer in mlp.layers:
        linear = torch.nn.Linear(layer.n_in, layer.n_out, dtype=torch.float64)
        linear.weight.data = torch.tensor(layer.weights.T)
        linear.bias.data = torch.tensor(layer.bias)
        parts += [linear, torch.nn.Tanh() if layer.activation == "tanh" else torch.nn.Identity()]
    return torch.nn.Sequential(*parts).requires_grad_(False)


TWIN = twin(SURROGATE)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (0, 5)])
def test_values_and_gradients_are_pytorchs(client: Client, shape: tuple[int, ...]) -> None:
    """For any leading axes, to the last digits of float64."""
    served = function(client, "surrogate")
    x, other = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    other.data.copy_(x.data)
    y, expected = served(x), TWIN(other)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-14)
    weights = torch.randn_like(expected)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-13)


def test_a_pass_is_one_call_however_many_rows(client: Client, calls: list[str]) -> None:
    """All rows at once, both ways."""
    x = torch.randn(64, 5, requires_grad=True)
    function(client, "surrogate")(x).square().sum().backward()
    assert calls == ["predict", "vjp"]


def test_gradients_of_probabilities(client: Client) -> None:
    """of="probabilities" is softmax behind the outputs, for derivatives too."""
    x, other = (torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    function(client, "surrogate", of="probabilities")(x)[1].backward()
    torch.softmax(TWIN(other), -1)[1].backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-14)


# PyTorch compiles a helper of its forward mode in a way that it has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_finite_differences_agree(client: Client) -> None:
    """torch.autograd.gradcheck, backwards and forwards."""
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function(client, "surrogate"), x, check_forward_ad=True)


def test_results_have_the_arguments_dtype(client: Client) -> None:
    """Whatever the model's is: float64 for this one."""
    x = torch.randn(2, 5, requires_grad=True)
    y = function(client, "surrogate")(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32


def test_parts_of_a_graph_before_and_behind(client: Client) -> None:
    """Parameters before the served model get their gradients through it."""
    before = torch.nn.Linear(2, 5, dtype=torch.float64)
    z = torch.randn(6, 2, dtype=torch.float64)
    function(client, "surrogate")(before(z)).exp().sum().backward()
    got = before.weight.grad.clone()
    before.zero_grad()
    TWIN(before(z)).exp().sum().backward()
    torch.testing.assert_close(got, before.weight.grad, rtol=1e-12, atol=1e-13)


def test_second_derivatives_are_refused(client: Client) -> None:
    """A penalty on a gradient is an error, not a constant."""
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    y = function(client, "surrogate")(x).sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"can be taken once; for second ones, see Client\.hvp"):
        (y + gradient.square().sum()).backward()


@pytest.mark.parametrize("wrong", [torch.ones(2, 5, dtype=torch.int64), torch.tensor(1.0), [1.0] * 5])
def test_what_is_no_floating_point_tensor_is_refused(client: Client, wrong: Any) -> None:
    """Before anything is sent."""
    with pytest.raises(TypeError, match="expected a tensor"):
        function(client, "surrogate")(wrong)


def test_a_wrong_width_is_the_servers_error(client: Client) -> None:
    """Its text says what the model expects."""
    with pytest.raises(InvalidInput, match=r"expects \(rows, 5\)"):
        function(client, "surrogate")(torch.ones(2, 4))
