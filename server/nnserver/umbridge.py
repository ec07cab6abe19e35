"""
`nnserver umbridge`: model files in, a UM-Bridge server out, for tools of uncertainty quantification.

UM-Bridge (um-bridge-benchmarks.readthedocs.io) is a protocol of JSON over HTTP by which samplers and
quadratures reach a model and its derivatives. A model here has one input and one output vector; Evaluate,
Gradient, ApplyJacobian and ApplyHessian are nncore's forward, vjp, jvp and hvp of one row.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nncore
from nnserver.batcher import QueueLimits
from nnserver.catalog import Catalog
from nnserver.config import read_config
from nnserver.errors import ConfigError, NotFound
from nnserver.repository import Repository

try:
    from aiohttp import web
except ImportError as error:
    raise ConfigError(
        "the UM-Bridge server needs aiohttp; install it with: pip install 'nnserve[umbridge]'"
    ) from error

PROTOCOL_VERSION = 1.0
DEFAULT_LISTEN = "127.0.0.1:4242"
# Numbers of a single row as text: far more than any model takes.
_MOST_BODY_BYTES = 16 << 20

_DESCRIPTION = """\
Serve models by the UM-Bridge protocol (JSON over HTTP): Evaluate, Gradient, ApplyJacobian, ApplyHessian.
"""
_EPILOG = """\
A request's config may have "of": "outputs" (the default) or "probabilities", and "version": the model's.

examples:
  nnserver umbridge                          the bundled models on 127.0.0.1:4242
  nnserver umbridge surrogate.safetensors --listen 127.0.0.1:4243
"""

Body = Mapping[str, Any]
Vector = NDArray[Any]


class Refused(Exception):
    """A request that is not answered; *kind* is what the protocol calls the reason."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def run(argv: Sequence[str]) -> int:
    """Serve until interrupted; return the exit status. Raises ConfigError for what cannot be served."""
    parser = argparse.ArgumentParser(
        prog="nnserver umbridge",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="*", metavar="PATH", help="as for the server: models to load")
    parser.add_argument(
        "--listen", default=DEFAULT_LISTEN, metavar="HOST:PORT", help="address (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    # The settings of the server, for the checks of both.
    config = read_config(["--listen", arguments.listen, *arguments.models], {})
    if config.listen.startswith("unix:"):
        raise ConfigError(f"listen is {config.listen}; UM-Bridge's clients know HOST:PORT only")
    repository = Repository()
    Catalog(config.models, QueueLimits(), repository).load_all()
    asyncio.run(_serve(repository, config.listen))
    return 0


async def _serve(repository: Repository, listen: str) -> None:
    host, _, port = listen.rpartition(":")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(application(repository), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host.strip("[]"), int(port))
    try:
        await site.start()
    except OSError as error:
        raise ConfigError(f"cannot listen on {listen}: {os.strerror(error.errno or 0)}") from None
    bound = runner.addresses[0][1]
    names = ", ".join(repository.names())
    print(f"nnserver: UM-Bridge ready on http://{host}:{bound}; models: {names}", flush=True)
    await stop.wait()
    await runner.cleanup()


def application(repository: Repository) -> web.Application:
    """Return the web application that serves the models of *repository*."""
    bridge = Bridge(repository)
    app = web.Application(client_max_size=_MOST_BODY_BYTES)

    async def info(_: web.Request) -> web.Response:
        return web.json_response(bridge.info())

    def method(answer: Callable[[Body], Body]) -> Any:
        async def handle(request: web.Request) -> web.Response:
            try:
                body = json.loads(await request.read())
                # In a thread: a kernel may take long.
                text = json.dumps(await asyncio.to_thread(answer, body), allow_nan=False)
            except Refused as error:
                return _error(error.kind, str(error))
            except (json.JSONDecodeError, UnicodeDecodeError):
                return _error("InvalidInput", "the request is not JSON")
            except ValueError:
                return _error("InvalidOutput", "the answer is not finite, and JSON has no such numbers")
            return web.Response(text=text, content_type="application/json")

        return handle

    app.router.add_get("/Info", info)
    for name, answer in bridge.methods().items():
        app.router.add_post(f"/{name}", method(answer))
    return app


def _error(kind: str, message: str) -> web.Response:
    return web.json_response({"error": {"type": kind, "message": message}}, status=400)


class Bridge:
    """The protocol's methods over the models of *repository*: bodies of requests -> bodies of answers."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def methods(self) -> dict[str, Callable[[Body], Body]]:
        """Return the methods that take a body, by name."""
        return {
            "ModelInfo": self.model_info,
            "InputSizes": lambda body: {"inputSizes": [self._model(body)[0].n_in]},
            "OutputSizes": lambda body: {"outputSizes": [self._model(body)[0].n_out]},
            "Evaluate": self.evaluate,
            "Gradient": self.gradient,
            "ApplyJacobian": self.apply_jacobian,
            "ApplyHessian": self.apply_hessian,
        }

    def info(self) -> Body:
        """Which models there are."""
        return {"protocolVersion": PROTOCOL_VERSION, "models": self._repository.names()}

    def model_info(self, body: Body) -> Body:
        """What a model can: everything."""
        self._model(body)
        names = ("Evaluate", "Gradient", "ApplyJacobian", "ApplyHessian")
        return {"support": dict.fromkeys(names, True)}

    def evaluate(self, body: Body) -> Body:
        """Outputs, or probabilities."""
        mlp, of = self._model(body)
        x = _input(body, mlp)
        y = mlp.forward(x) if of == "outputs" else mlp.predict_proba(x)
        return {"output": [y.tolist()]}

    def gradient(self, body: Body) -> Body:
        """sens^T J: the gradient of a function of the outputs whose gradient by them is sens."""
        mlp, of = self._model(body)
        _check_indices(body, "outWrt", "inWrt")
        return {"output": mlp.vjp(_input(body, mlp), _vector(body, "sens", mlp.n_out), of=of).tolist()}

    def apply_jacobian(self, body: Body) -> Body:
        """J vec."""
        mlp, of = self._model(body)
        _check_indices(body, "outWrt", "inWrt")
        return {"output": mlp.jvp(_input(body, mlp), _vector(body, "vec", mlp.n_in), of=of).tolist()}

    def apply_hessian(self, body: Body) -> Body:
        """The Hessian of sens^T f, times vec."""
        mlp, of = self._model(body)
        _check_indices(body, "outWrt", "inWrt1", "inWrt2")
        x, vec, sens = _input(body, mlp), _vector(body, "vec", mlp.n_in), _vector(body, "sens", mlp.n_out)
        total = np.zeros(mlp.n_in)
        for k in np.flatnonzero(sens):
            total += sens[k] * mlp.hvp(x, vec, int(k), of=of).astype(np.float64)
        return {"output": total.tolist()}

    def _model(self, body: Body) -> tuple[nncore.Mlp, str]:
        """Return which model is asked, and for what."""
        if not isinstance(body, dict) or not isinstance(body.get("name"), str):
            raise Refused("InvalidInput", "the request has no name; expected that of a model")
        config = body.get("config") or {}
        if not isinstance(config, dict) or not config.keys() <= {"of", "version"}:
            raise Refused("InvalidInput", "config is for 'of' and 'version' only")
        of, version = config.get("of", "outputs"), config.get("version", "")
        if of not in ("outputs", "probabilities"):
            raise Refused("InvalidInput", "config's 'of' is neither 'outputs' nor 'probabilities'")
        try:
            return self._repository.get(body["name"], str(version)).mlp, of
        except NotFound as error:
            raise Refused("ModelNotFound", str(error)) from None


def _input(body: Body, mlp: nncore.Mlp) -> Vector:
    parameters = body.get("input")
    if not isinstance(parameters, list) or len(parameters) != 1:
        raise Refused("InvalidInput", "input is not a list of one vector")
    return _vector({"input[0]": parameters[0]}, "input[0]", mlp.n_in)


def _vector(body: Body, name: str, size: int) -> Vector:
    given = body.get(name)
    if not isinstance(given, list) or len(given) != size:
        has = f"has {len(given)} entries" if isinstance(given, list) else "is no vector"
        raise Refused("InvalidInput", f"{name} {has}; expected {size} numbers")
    if not all(type(number) in (int, float) for number in given):
        raise Refused("InvalidInput", f"{name} has entries that are no numbers")
    try:
        return np.array(given, np.float64)
    except OverflowError:
        raise Refused("InvalidInput", f"{name} has a number beyond float64's range") from None


def _check_indices(body: Body, *names: str) -> None:
    for name in names:
        if type(body.get(name)) is not int or body[name] != 0:
            raise Refused(
                "InvalidInput", f"{name} is not 0; a model here has one input and one output vector"
            )
