"""nnclient's derivatives against a real nnserver process: the bits of nncore, however they travel."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.server import ServerProcess

import nnclient
import nncore
import nnserver
from nnclient import AsyncClient, Client, InvalidInput

MODELS = Path(nnserver.__file__).parent / "models"
DIGITS = nncore.load(MODELS / "digits.safetensors")
RNG = np.random.default_rng(0)
X = RNG.uniform(0, 16, (3000, 64)).astype(np.float32)
V, T = RNG.standard_normal((3000, 10)), RNG.standard_normal((3000, 64)).astype(np.float32)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as it:
        yield it


# The method, its arguments after x, the keywords of either side.
ASKED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("vjp", (V,), {}),
    ("value_and_vjp", (V[:, :2],), {"outputs": [7, 3], "of": "probabilities"}),
    ("jvp", (T,), {"of": "probabilities"}),
    ("value_and_jvp", (T[:, :3],), {"inputs": [1, 5, 2]}),
    ("jacobian", (), {}),
    ("value_and_jacobian", (), {"inputs": [9], "outputs": [1, 2]}),
    ("value_and_grad", (4,), {"of": "probabilities"}),
    ("hvp", (T, 4), {"of": "probabilities"}),
    ("value_and_hvp", (T[:, :3], 0), {"inputs": [1, 5, 2], "of": "probabilities"}),
]


def first(rows: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments for the first rows; an index of an output stays as it is."""
    return tuple(a[rows] if isinstance(a, np.ndarray) else a for a in arguments)


@pytest.mark.parametrize(("name", "arguments", "choice"), ASKED, ids=lambda value: str(value)[:20])
def test_derivatives_are_nncores_bits_however_they_travel(
    client: Client, server: ServerProcess, name: str, arguments: tuple[Any, ...], choice: dict[str, Any]
) -> None:
    """A single row, a message, many messages, over asyncio: all of them."""

    async def ask(*given: Any) -> Any:
        async with AsyncClient(server.address) as it:
            return await getattr(it, name)("digits", *given, **choice)

    for rows in (7, slice(0, 5), slice(0, 0), slice(None)):
        given = first(rows, arguments)
        expected = getattr(DIGITS, name)(X[rows], *given, **choice)
        got = getattr(client, name)("digits", X[rows], *given, **choice)
        for right, *both in zip(
            *map(as_pair, (expected, got, asyncio.run(ask(X[rows], *given)))), strict=True
        ):
            for each in both:
                np.testing.assert_array_equal(each, right)
                assert each.dtype == np.float32


def as_pair(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_jacobians_that_do_not_fit_into_one_answer_come_in_several(client: Client) -> None:
    """1200 rows of mnist are 3.8 MB and their Jacobians 38: more than the server sends at once."""
    mnist = nncore.load(MODELS / "mnist.safetensors")
    x = RNG.uniform(0, 1, (1200, 784)).astype(np.float32)
    np.testing.assert_array_equal(client.jacobian("mnist", x), mnist.jacobian(x))


def test_results_are_the_callers_own(client: Client) -> None:
    """They may be written to."""
    values, gradients = client.value_and_grad("digits", X[:2], 0)
    values += 1
    gradients *= 2


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda it: it.vjp("digits", X[:3], V[:2]), "cotangents has 2 rows; expected 3, one for each of x"),
        (
            lambda it: it.jvp("digits", X[:2], V[:2]),
            "tangents has shape (2, 10); model 'digits' expects (rows, 64)",
        ),
        (
            lambda it: it.jvp("digits", X[:2], [["a"], ["b"]]),
            "tangents has dtype <U1; expected real numbers",
        ),
        (
            lambda it: it.value_and_grad("digits", X[:2]),
            "output_indices has 0 entries; DERIVATIVE_KIND_VALUE_AND_GRAD is of one output: expected its "
            "index, from 0 to 9",
        ),
        (
            lambda it: it.value_and_grad("digits", X[:2], 10),
            "output_indices[0] is 10; model 'digits' has outputs 0 to 9",
        ),
        (lambda it: it.jacobian("digits", X[:2], inputs=[-1]), "inputs[0] is -1; expected an index, from 0"),
        (
            lambda it: it.jacobian("digits", X[:2], outputs=[]),
            "outputs is empty; expected one or more indices, or None for all",
        ),
        (
            lambda it: it.jacobian("digits", X[:2], inputs=0.5),
            "inputs is 0.5; expected a sequence of indices",
        ),
        (
            lambda it: it.jacobian("digits", X[:2], of="labels"),
            "of is 'labels'; expected 'outputs' or 'probabilities'",
        ),
        (lambda it: it.jacobian("", X[:2]), "model is ''; expected the name of a model"),
    ],
)
def test_wrong_arguments_raise_and_say_why(client: Client, call: Any, text: str) -> None:
    """Some are found here, some by the server; all are InvalidInput."""
    with pytest.raises(InvalidInput) as caught:
        call(client)
    assert str(caught.value) == text


def test_timeouts_and_unknown_models(client: Client) -> None:
    """As for predict."""
    with pytest.raises(nnclient.DeadlineExceeded):
        client.jacobian("digits", X, outputs=[0], timeout_s=1e-3)
    with pytest.raises(nnclient.NotFound):
        client.jacobian("nope", X[:2])


def test_the_example_of_the_clients_readme(client: Client) -> None:
    """It runs as it stands, and each line has the shape that its comment says."""
    text = (Path(__file__).parents[2] / "client" / "README.md").read_text(encoding="utf-8")
    block = text.split("## Derivatives\n\n```python\n")[1].split("```")[0]
    first_line, *others = block.splitlines()
    names: dict[str, Any] = {"client": client, "np": np, "x": X[:3]}
    exec(first_line, names)
    assert f"{names['values'].shape}, {names['gradients'].shape}" == first_line.split("# ")[1]
    for line in others:
        code, shape = line.split("  # ")
        assert str(eval(code, names).shape) == shape.split(":")[0]
