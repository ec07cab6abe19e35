"""
A model and which of its derivatives are wanted -> the lane of the engine that computes them.

Requests for the same derivative travel together: each has a lane of its own, with a queue, a measured cost
and turns at the kernel threads. Rows of a lane are inputs with the directions behind them, side by side. A
lane is made when it is first asked for and may be forgotten when it is idle; clients choose what they ask
for, so that lanes are few and the queues of one model's derivatives are bounded together.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import nncore
from nnserver.batcher import Batcher, Bound, Form, bytes_of, requests_of, rows_of
from nnserver.engine import TURN_S, Lane
from nnserver.errors import QueueFull

Array = NDArray[Any]
Kind = Literal["vjp", "jvp", "jacobian", "value_and_grad", "hvp"]

# Lanes of one model: more than the ways in which clients of one model differ, few enough to look at them all.
MOST_LANES = 64
# What the results of one batch may take, if that is several jobs: answers are made from them at once.
_MOST_BATCH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Derivative:
    """
    What is asked of a model, row by row; the arguments of the method of `nncore.Mlp` with that name.

    inputs, outputs: the indices chosen, None for all; n_in and n_out are their numbers.  value_and_grad and
    hvp have one output.
    """

    kind: Kind
    of: Literal["outputs", "probabilities"]
    inputs: tuple[int, ...] | None
    outputs: tuple[int, ...] | None
    n_in: int
    n_out: int

    @property
    def direction_width(self) -> int:
        """Numbers of a row of cotangents or tangents; 0 if there is none."""
        return {"vjp": self.n_out, "jvp": self.n_in, "hvp": self.n_in}.get(self.kind, 0)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of a row's values."""
        return () if self.kind in ("value_and_grad", "hvp") else (self.n_out,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row's derivatives."""
        if self.kind == "jacobian":
            return self.n_out, self.n_in
        return (self.n_out,) if self.kind == "jvp" else (self.n_in,)

    @property
    def row_numbers(self) -> int:
        """Numbers in a row's values and derivatives."""
        return math.prod(self.value_shape) + math.prod(self.shape)

    @property
    def passes(self) -> int:
        """About how many forward passes it costs: a pass in either direction takes no more than two."""
        if self.kind == "jacobian":
            return 1 + 2 * min(self.n_in, self.n_out)
        return 6 if self.kind == "hvp" else 3


@dataclass(frozen=True, slots=True)
class Differential:
    """Values and derivatives of the same rows, which are chosen as those of one array are."""

    values: Array
    derivatives: Array

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> Differential:
        return Differential(self.values[rows], self.derivatives[rows])


def differentiate(mlp: nncore.Mlp, wanted: Derivative, rows: Array) -> Differential:
    """Return what is *wanted* of *mlp* at *rows*: (rows, n_in of mlp + direction_width)."""
    x, directions = rows[:, : mlp.n_in], rows[:, mlp.n_in :]
    of, inputs, outputs = wanted.of, wanted.inputs, wanted.outputs
    # Checked when the request was read; a model of one output may leave it out.
    (output,) = outputs if outputs is not None and len(outputs) == 1 else (0,)
    match wanted.kind:
        case "vjp":
            found = mlp.value_and_vjp(x, directions, of=of, inputs=inputs, outputs=outputs)
        case "jvp":
            found = mlp.value_and_jvp(x, directions, of=of, inputs=inputs, outputs=outputs)
        case "jacobian":
            found = mlp.value_and_jacobian(x, of=of, inputs=inputs, outputs=outputs)
        case "value_and_grad":
            found = mlp.value_and_grad(x, output, of=of, inputs=inputs)
        case "hvp":
            found = mlp.value_and_hvp(x, directions, output, of=of, inputs=inputs)
    return Differential(*found)


@dataclass(eq=False)
class DerivativeLane(Lane):
    """A lane whose cost a row is *estimated_cost_s*, about, until it is measured."""

    estimated_cost_s: float = 0.0

    def __post_init__(self) -> None:
        # The first batch packs weights for the way back and loads or compiles code: not in an event loop.
        self.row_cost_s = math.inf

    def rows_of_a_turn(self) -> int:
        """Rows of a batch that takes about TURN_S; a single one may take longer."""
        cost = self.estimated_cost_s if math.isinf(self.row_cost_s) else self.row_cost_s
        return max(1, int(TURN_S / cost)) if cost else 1

    def note_cost(self, rows: int, elapsed_s: float) -> None:
        if math.isinf(self.row_cost_s):
            self.row_cost_s = min(elapsed_s / max(rows, 1), self.estimated_cost_s)
        else:
            super().note_cost(rows, elapsed_s)


class _Room:
    """The queues of one model's derivatives: iterate over it. It keeps none of them: lanes come and go."""

    def __init__(self) -> None:
        # Replaced as a whole: others may be looking.
        self._queues: tuple[weakref.ref[_Queue], ...] = ()

    def add(self, queue: _Queue) -> None:
        self._queues = (*(known for known in self._queues if known() is not None), weakref.ref(queue))

    def __iter__(self) -> Iterator[_Queue]:
        for known in self._queues:
            queue = known()
            if queue is not None:
                yield queue


@dataclass(eq=False)
class _Queue(Batcher):
    """One of several queues that have the limits of one together: those in its *room*."""

    room: _Room = field(default_factory=_Room)
    has_run: bool = False

    def _others(self) -> list[_Queue]:
        return [queue for queue in self.room if queue is not self]

    def _room(self, now: float) -> tuple[int, int, int]:
        requests, nbytes, rows = super()._room(now)
        others = self._others()
        return (
            requests - sum(map(len, others)),
            nbytes - sum(queue.waiting_bytes for queue in others),
            rows - sum(queue.waiting_rows for queue in others),
        )

    def _bound_met(self, form: Form) -> Bound | None:
        # Others put nothing meanwhile: the lock of what waits for all models is held.
        limits, others = self.limits, self._others()
        requests = len(self) + sum(map(len, others))
        if requests >= limits.max_requests:
            return requests_of, 1, f"{requests} requests for its derivatives, max_queue_requests"
        if not requests:
            return None
        rows = self.waiting_rows + sum(queue.waiting_rows for queue in others)
        if rows + form.rows > limits.max_rows:
            return rows_of, form.rows, f"{rows} rows for its derivatives, max_queue_rows"
        nbytes = self.waiting_bytes + sum(queue.waiting_bytes for queue in others)
        if nbytes + form.nbytes > limits.max_bytes:
            return bytes_of, form.nbytes, f"{nbytes} bytes of rows for its derivatives, max_queue_bytes"
        return super()._bound_met(form)

    def _note_pace(self, elapsed_s: float, rows: int) -> None:
        # The first batch may have compiled code: what it took says nothing of the next.
        if self.has_run:
            super()._note_pace(elapsed_s, rows)
        self.has_run = True


class DerivativeLanes:
    """
    The lanes of the derivatives of *mlp*, whose predictions go through *lane*. Safe for any thread.

    They have the limits of that lane's queue for themselves, and its statistics in common.
    """

    def __init__(self, mlp: nncore.Mlp, lane: Lane) -> None:
        self._mlp = mlp
        self._predictions = lane
        self._room = _Room()
        lane.batcher.siblings = self._room
        self._lock = threading.Lock()
        # The least recently asked for comes first.
        self._lanes: dict[Derivative, DerivativeLane] = {}

    def lane_of(self, wanted: Derivative) -> Lane:
        """Return the lane; raises QueueFull if MOST_LANES others have work to do."""
        with self._lock:
            lane = self._lanes.pop(wanted, None)
            if lane is None:
                if len(self._lanes) >= MOST_LANES:
                    self._forget_an_idle_lane()
                lane = self._new_lane(wanted)
            self._lanes[wanted] = lane
        return lane

    def _forget_an_idle_lane(self) -> None:
        for wanted, lane in self._lanes.items():
            if not lane.runners and not len(lane.batcher):
                del self._lanes[wanted]
                return
        raise QueueFull(
            f"{MOST_LANES} different derivatives of model '{self._predictions.batcher.model_name}' are being "
            "computed; try again later",
            TURN_S,
        )

    def _new_lane(self, wanted: Derivative) -> DerivativeLane:
        batcher, dtype = self._predictions.batcher, self._mlp.dtype
        most_rows = max(1, _MOST_BATCH_BYTES // (wanted.row_numbers * dtype.itemsize))
        limits = replace(batcher.limits, max_batch_rows=min(batcher.limits.max_batch_rows, most_rows))
        queue = _Queue(batcher.model_name, limits, batcher.clock, batcher.statistics, room=self._room)
        self._room.add(queue)
        return DerivativeLane(
            queue,
            partial(differentiate, self._mlp, wanted),
            self._mlp.n_in + wanted.direction_width,
            dtype,
            estimated_cost_s=wanted.passes * self._predictions.row_cost_s,
        )
