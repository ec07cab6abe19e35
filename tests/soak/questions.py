"""Models in, requests out, each with what its answer must be: a slice of rows that were computed before."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.models import save_scale
from support.oip import request_for as oip_request_for
from support.oip import tensor_of
from support.server import request, rows

import nncore
from nnproto.oip import inference_pb2 as oip
from nnproto.v1 import inference_pb2 as own
from nnserver.model_folder import BUNDLED

Array = NDArray[Any]

MAX_MESSAGE_BYTES = 1 << 20
# Rows to choose from: more than the largest request has.
_POOL_ROWS = 6000
# Beside its rows, a request has so many bytes at most here.
_HEAD_BYTES = 100
# The one that is replaced, and the one that comes and goes; y = weight * x, of so many inputs.
REPLACED, COMING = "replaced", "coming"
WEIGHTS = (2.0, 3.0, 5.0, 7.0)
_SCALE_WIDTH = 16


def save_models(folder: Path) -> None:
    """Put the models that are asked for into *folder*."""
    for name in ("digits", "primer"):
        (folder / f"{name}.safetensors").write_bytes((BUNDLED / f"{name}.safetensors").read_bytes())
    for name in (REPLACED, COMING):
        save_scale(folder / f"{name}.safetensors", WEIGHTS[0], _SCALE_WIDTH)


@dataclass(frozen=True, slots=True)
class Question:
    """
    A request of either service, and what is wrong with an answer to it, if anything is.

    allowed: statuses with which it may fail, too.
    """

    kind: str
    message: Any
    rows: int
    problem: Callable[[Any], str]
    allowed: tuple[str, ...] = ()


class Pool:
    """Rows of one model, and its answers to them: a row's bits do not depend on its batch."""

    def __init__(self, name: str, mlp: nncore.Mlp, seed: int) -> None:
        self.name = name
        self.x: Array = np.random.default_rng(seed).normal(size=(_POOL_ROWS, mlp.n_in)).astype(mlp.dtype)
        # A model that is replaced meanwhile has several right answers, each a whole model's.
        weights = WEIGHTS if name in (REPLACED, COMING) else ()
        self.outputs: list[Array] = [np.float32(w) * self.x for w in weights] or [mlp.forward(self.x)]
        self.probabilities = [mlp.probabilities_from(y) for y in self.outputs]
        self.labels = [mlp.class_labels[i] for i in self.probabilities[0].argmax(axis=1)]
        self.most_rows = (MAX_MESSAGE_BYTES - _HEAD_BYTES) // self.x[0].nbytes

    @property
    def may_change(self) -> bool:
        return len(self.outputs) > 1


class Questions:
    """Makes questions of all kinds, from one row to the limit; those of one client."""

    def __init__(self, folder: Path, seed: int) -> None:
        names = ("digits", "primer", REPLACED, COMING)
        self._random = random.Random(seed)
        self._pools = [Pool(name, nncore.load(folder / f"{name}.safetensors"), seed) for name in names]
        self._count = 0
        self._seed = seed

    def own(self) -> Question:
        """A question to nnproto.v1: outputs, probabilities or labels."""
        pool, part, request_id = self._chosen()
        x = pool.x[part]
        kinds = [own.OUTPUT_KIND_OUTPUTS, own.OUTPUT_KIND_PROBABILITIES]
        if pool.name == "digits":
            kinds.append(own.OUTPUT_KIND_LABELS)
        kind = self._random.choice(kinds)
        if kind == own.OUTPUT_KIND_LABELS:
            # A row's label is larger than its inputs may be.
            x, part = x[:1000], slice(part.start, min(part.stop, part.start + 1000))
        right: list[Array] = {
            own.OUTPUT_KIND_OUTPUTS: [y[part] for y in pool.outputs],
            own.OUTPUT_KIND_PROBABILITIES: [p[part] for p in pool.probabilities],
        }.get(kind, [])

        def problem(answer: own.PredictResponse) -> str:
            if answer.id != request_id:
                return f"{request_id} was given the answer to {answer.id}"
            if kind == own.OUTPUT_KIND_LABELS:
                found = [row.top[0].label for row in answer.labels]
                return "" if found == pool.labels[part] else f"{request_id} has other rows' labels"
            return _problem(request_id, rows(answer), right)

        return Question(
            f"nnproto {pool.name}",
            request(x, pool.name, id=request_id, output=kind),
            len(x),
            problem,
            _allowed(pool),
        )

    def oip(self) -> Question:
        """A question of the Open Inference Protocol: raw or typed, outputs or probabilities."""
        pool, part, request_id = self._chosen()
        is_raw = self._random.random() < 0.7
        if not is_raw:
            part = slice(part.start, min(part.stop, part.start + 200))  # Typed contents are slow to make.
        name = self._random.choice(("outputs", "probabilities"))
        right = [y[part] for y in (pool.outputs if name == "outputs" else pool.probabilities)]
        x = pool.x[part]

        def problem(answer: oip.ModelInferResponse) -> str:
            if answer.id != request_id:
                return f"{request_id} was given the answer to {answer.id}"
            return _problem(request_id, tensor_of(answer, name), right)

        datatype = "FP32" if x.dtype == np.float32 else "FP64"
        message = oip_request_for(x, pool.name, datatype, is_raw, [name], id=request_id)
        return Question(f"open inference {pool.name}", message, len(x), problem, _allowed(pool))

    def wrong(self) -> Question:
        """A question that must be refused: of a wrong shape, for no model, or larger than may be."""
        digits = self._pools[0]
        message, status = self._random.choice(
            (
                (request(digits.x[:3, :7]), "INVALID_ARGUMENT"),
                (request(digits.x[:3], "nobody"), "NOT_FOUND"),
                (request(digits.x[: digits.most_rows + 1]), "RESOURCE_EXHAUSTED"),
            )
        )
        return Question("wrong requests", message, 0, lambda answer: "it was answered", (status,))

    def _chosen(self) -> tuple[Pool, slice, str]:
        """A pool, some of its rows (most requests are small, some are as large as may be), and an id."""
        self._count += 1
        pool = self._random.choice(self._pools)
        # Evenly over the orders of magnitude; one in a hundred has the limit exactly.
        most = min(pool.most_rows, _POOL_ROWS)
        n = most if self._random.random() < 0.01 else int(most ** (self._random.random() ** 2))
        start = self._random.randrange(_POOL_ROWS - n + 1)
        return pool, slice(start, start + n), f"{self._seed}-{self._count}"


def _allowed(pool: Pool) -> tuple[str, ...]:
    return ("NOT_FOUND",) if pool.name == COMING else ()


def _problem(request_id: str, found: Array, right: list[Array]) -> str:
    if any(found.shape == y.shape and found.tobytes() == y.tobytes() for y in right):
        return ""
    return f"{request_id} has not its own rows' answer"
