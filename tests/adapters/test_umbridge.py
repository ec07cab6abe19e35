"""nnserver umbridge, as a process, asked by UM-Bridge's own client: values and derivatives are nncore's."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import umbridge
from adapters.conftest import SINGLE, SURROGATE
from support.server import NNSERVER

X = [0.5, -1.0, 0.25, 0.0, 2.0]


@pytest.fixture(scope="module")
def url(models: Path) -> Iterator[str]:
    """The address of a bridge to both models; it ends well when it is told to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [str(NNSERVER), "umbridge", str(models), "--listen", f"127.0.0.1:{port}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == f"nnserver: UM-Bridge ready on http://127.0.0.1:{port}; models: single, surrogate\n"
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stdout.close()


@pytest.fixture
def model(url: str) -> Any:
    return umbridge.HTTPModel(url, "surrogate")


def test_a_model_says_what_it_is(url: str, model: Any) -> None:
    """Names, sizes, and that everything is supported."""
    assert umbridge.supported_models(url) == ["single", "surrogate"]
    assert (model.get_input_sizes(), model.get_output_sizes()) == ([5], [3])
    assert model.supports_evaluate()
    assert model.supports_gradient()
    assert model.supports_apply_jacobian()
    assert model.supports_apply_hessian()


@pytest.mark.parametrize("of", ["outputs", "probabilities"])
def test_values_and_derivatives_are_nncores(model: Any, of: str) -> None:
    """Evaluate, Gradient, ApplyJacobian and ApplyHessian, to the bit: JSON keeps float64's digits."""
    config, sens, vec = {"of": of}, [1.0, -2.0, 0.5], [1.0, 0.0, -1.0, 0.5, 2.0]
    values = SURROGATE.forward(X) if of == "outputs" else SURROGATE.predict_proba(X)
    assert model([X], config) == [values.tolist()]
    assert model.gradient(0, 0, [X], sens, config) == SURROGATE.vjp(X, sens, of=of).tolist()
    assert model.apply_jacobian(0, 0, [X], vec, config) == SURROGATE.jvp(X, vec, of=of).tolist()
    hessian = sum(s * SURROGATE.hvp(X, vec, k, of=of) for k, s in enumerate(sens))
    np.testing.assert_allclose(model.apply_hessian(0, 0, 0, [X], sens, vec, config), hessian, rtol=1e-13)


def test_derivatives_are_those_of_what_is_evaluated(model: Any) -> None:
    """By finite differences through the client alone, which knows nothing of nncore."""
    step = 1e-6
    vec = np.array([1.0, 0.0, -1.0, 0.5, 2.0])

    def moved(sign: int) -> list[float]:
        return (np.array(X) + sign * step * vec).tolist()

    along = (np.array(model([moved(1)])[0]) - model([moved(-1)])[0]) / (2 * step)
    np.testing.assert_allclose(model.apply_jacobian(0, 0, [X], vec.tolist()), along, rtol=1e-8)
    sens = [1.0, -2.0, 0.5]
    gradients = [np.array(model.gradient(0, 0, [moved(sign)], sens)) for sign in (1, -1)]
    bend = (gradients[0] - gradients[1]) / (2 * step)
    np.testing.assert_allclose(
        model.apply_hessian(0, 0, 0, [X], sens, vec.tolist()), bend, rtol=1e-6, atol=1e-9
    )


def test_a_float32_model_answers_in_its_precision(url: str) -> None:
    """Whole numbers are numbers, too."""
    (answer,) = umbridge.HTTPModel(url, "single")([[1, 0, 2, 3]])
    assert answer == SINGLE.forward([1.0, 0, 2, 3]).tolist()


@pytest.mark.parametrize(
    ("method", "body", "kind", "text"),
    [
        ("Evaluate", {"name": "nope"}, "ModelNotFound", "unknown model 'nope'"),
        ("Evaluate", {}, "InvalidInput", "the request has no name"),
        ("Evaluate", [], "InvalidInput", "the request has no name"),
        ("Evaluate", {"input": [X, X]}, "InvalidInput", "input is not a list of one vector"),
        ("Evaluate", {"input": [X[:2]]}, "InvalidInput", "input[0] has 2 entries; expected 5 numbers"),
        ("Evaluate", {"input": ["abcde"]}, "InvalidInput", "input[0] is no vector; expected 5 numbers"),
        ("Evaluate", {"input": [["a"] * 5]}, "InvalidInput", "input[0] has entries that are no numbers"),
        ("Evaluate", {"input": [[10**400] * 5]}, "InvalidInput", "beyond float64's range"),
        ("Evaluate", {"input": [[float("nan")] * 5]}, "InvalidOutput", "the answer is not finite"),
        ("Evaluate", {"input": [X], "config": {"x": 1}}, "InvalidInput", "config is for 'of' and 'version'"),
        ("Evaluate", {"input": [X], "config": {"of": []}}, "InvalidInput", "config's 'of'"),
        ("Evaluate", {"input": [X], "config": {"version": 9}}, "ModelNotFound", "no version '9'"),
        ("Gradient", {"input": [X], "outWrt": 1, "inWrt": 0}, "InvalidInput", "outWrt is not 0"),
        ("Gradient", {"input": [X], "outWrt": 0, "inWrt": 0}, "InvalidInput", "sens is no vector"),
        (
            "ApplyJacobian",
            {"input": [X], "outWrt": 0, "inWrt": 0, "vec": [1.0]},
            "InvalidInput",
            "vec has 1 entries; expected 5 numbers",
        ),
        ("ApplyHessian", {"input": [X], "outWrt": 0, "inWrt1": 0}, "InvalidInput", "inWrt2 is not 0"),
    ],
)
def test_wrong_requests_are_refused_by_name(url: str, method: str, body: Any, kind: str, text: str) -> None:
    """As the protocol has it: an error with a type and a message."""
    if isinstance(body, dict) and body:
        body = {"name": "surrogate", **body}
    answer = requests.post(f"{url}/{method}", json=None, data=_json(body))
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == kind
    assert text in answer.json()["error"]["message"]


def _json(body: Any) -> str:
    import json

    return json.dumps(body)


def test_what_is_no_json_is_refused(url: str) -> None:
    """And what is no method is not found."""
    assert requests.post(f"{url}/Evaluate", data=b"\xff{").json()["error"]["type"] == "InvalidInput"
    assert requests.post(f"{url}/Nothing", json={}).status_code == 404


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--listen", "unix:/x"], "UM-Bridge's clients know HOST:PORT only"),
        (["--listen", "127.0.0.1"], "listen is '127.0.0.1'; expected HOST:PORT"),
        (["no/such/file"], "no/such/file"),
    ],
)
def test_wrong_settings_end_with_a_line(arguments: list[str], text: str) -> None:
    """Status 1 and what was wrong."""
    done = subprocess.run([str(NNSERVER), "umbridge", *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("nnserver: error: ")
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_without_aiohttp_it_says_what_to_install() -> None:
    """The library is an extra."""
    code = "import sys; sys.modules['aiohttp'] = None; from nnserver.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "umbridge"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "nnserver: error: the UM-Bridge server needs aiohttp; install it with: "
        "pip install 'nnserve[umbridge]'\n"
    )
