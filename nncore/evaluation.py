"""
A float32 model's layers -> an Evaluator: rows of x in, rows of y out, by the kernels of `nncore.schedule`.

Here Python meets the kernels: memory for them to work in, and threads to share the work.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from numba.core import types

from nncore import kernel_table as kt
from nncore import python_calls, schedule
from nncore.arrays import FloatArray
from nncore.compilation import c_callback
from nncore.layers import BLOCK_VECTORS, FEW_ROWS, complete_table
from nncore.packing import Plan, aligned_floats
from nncore.threads import borrow_helpers, usable_cores
from nncore.tiles import PANEL

if TYPE_CHECKING:
    from nncore.model import Layer

__all__ = ["SHORT_S", "CallSlots", "Evaluator", "address_of"]

# A thread that is to pay must have so much work of its own: waking it takes 90 to 130 us.
_WORTH_A_THREAD_S = 110e-6
# What a core does, roughly: multiplications and additions, and bytes of weights read for a single row.
_FLOPS_PER_LANE = {16: 6e9, 8: 12e9, 4: 12e9}
_WEIGHT_BYTES_PER_S = 40e9
# An activation that is computed, not just clipped, takes as long as so many of them.
_FLOPS_PER_CURVE = 50
# Calls that are shorter keep Python's lock.
SHORT_S = 5e-6
# Panels of a part: small enough to share evenly, large enough for the tiles.
_PARTS_PER_THREAD = 4
# Rounds of 20 ns for which a caller that is done waits busily for its helpers before it sleeps.
_PATIENCE = 5_000

# NumPy has one object for each of its own types, so that `is` does for ==.
_FLOAT32 = np.dtype(np.float32)


class Workspace:
    """Memory for one call, or for one thread of it: two buffers and a descriptor that points to them."""

    __slots__ = ("_kept", "address")

    def __init__(self, plan: Plan, rows: int) -> None:
        """rows: of a buffer, each of plan.widest float32."""
        here, there = aligned_floats(rows * plan.widest), aligned_floats(rows * plan.widest)
        slots = np.array([plan.descriptor.ctypes.data, here.ctypes.data, there.ctypes.data], np.int64)
        self._kept = (plan, here, there, slots)
        self.address: int = slots.ctypes.data


class HasAddress(Protocol):
    """Memory that kernels find by its address."""

    address: int


class CallSlots(np.ndarray[Any, np.dtype[np.int64]]):
    """The slots of a callable's own descriptor; keeps what they point to."""

    kept: tuple[Any, ...]


def call_slots(
    count: int, workspace: HasAddress, long_rows: int, new: Callable[[FloatArray], FloatArray]
) -> CallSlots:
    """
    Descriptor of a callable: *count* slots, of which those that `nncore.schedule` names are filled in.

    long_rows: from so many on other threads run Python meanwhile.  new: makes an array for the results of x.
    """
    slots = np.zeros(count, np.int64).view(CallSlots)
    slots.kept = (workspace, new)
    slots[schedule.CALL_WORKSPACE] = workspace.address
    slots[schedule.CALL_LONG] = long_rows
    slots[schedule.CALL_ARRAY_TYPE] = id(np.ndarray)
    slots[schedule.CALL_FLOAT32] = id(_FLOAT32)
    slots[schedule.CALL_NONE] = id(None)
    slots[schedule.CALL_NEW] = id(new)
    return slots


class Evaluator:
    """
    Evaluates a model. Safe to be called by many threads at once: each call has a workspace of its own.

    Compiles or loads the kernels, and packs the weights, when it is made.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        """layers: float32, as `nncore.Mlp` has checked them."""
        self._plan = Plan(layers, complete_table())
        self._lanes = int(complete_table()[kt.LANES])
        self._idle: list[Workspace] = []
        self._forward_addresses = _compiled(schedule.forward_addresses)
        self._n_out = layers[-1].n_out
        weight_count = sum(layer.weights.size for layer in layers)
        curved = sum(layer.n_out for layer in layers if layer.activation not in ("identity", "relu"))
        flops = 2 * weight_count + _FLOPS_PER_CURVE * curved
        self._seconds_per_row = flops / (self._lanes * _FLOPS_PER_LANE[self._lanes])
        self._least_seconds = 4 * weight_count / _WEIGHT_BYTES_PER_S
        self.evaluate_at_once: Callable[[Any, Any], FloatArray | None] = self._own_callable()
        """
        evaluate_at_once(x, out): evaluate *x* into *out*, or a new array if that is None, and return it,
        provided that nothing needs to be converted.

        Returns None, without having done anything, unless x is a float32 array of two axes that lies in
        memory as kernels want it, and out as well, of the right shapes, apart from each other. What is wrong,
        if anything, is for the caller to find out: this is the short way for the common case, in 0.1 us.
        """

    def _own_callable(self) -> Callable[[Any, Any], FloatArray | None]:
        """`schedule.forward_objects` with a workspace of its own."""
        if not python_calls.layout_is_known():
            return lambda x, out: None
        n_out = self._n_out

        def new(x: FloatArray) -> FloatArray:
            return np.empty((len(x), n_out), _FLOAT32)

        slots = call_slots(schedule.CALL_SLOTS, self._new_workspace(), self.long_rows, new)
        return python_calls.callable_over(_forward_objects().address, slots)

    def evaluate(self, x: FloatArray, y: FloatArray, threads: int = 1) -> None:
        """
        Evaluate *x* into *y* by up to *threads* threads, this one included.

        x: (rows, n_in), y: (rows, n_out), both float32, C-contiguous and aligned, sharing no memory. Nothing
        is checked: that is Mlp's part.
        """
        rows = x.shape[0]
        if threads > 1 and rows:
            helpers = borrow_helpers(threads - 1)
            if helpers:
                job = _Job(self, x, y, len(helpers) + 1)
                shares = [job.share() for _ in helpers]
                for helper, share in zip(helpers, shares, strict=True):
                    helper.start(share.run)
                job.take_part()
                if not job.is_finished():
                    for share in shares:
                        share.wait()
                job.end()
                return
        workspace = self.take_workspace()
        self._forward_addresses(address_of(x), address_of(y), rows, workspace.address)
        self.return_workspace(workspace)

    def threads_for(self, rows: int) -> int:
        """How many threads pay for a batch of *rows* rows on the cores that this process may use."""
        seconds = max(rows * self._seconds_per_row, self._least_seconds)
        return max(1, min(int(seconds / _WORTH_A_THREAD_S), usable_cores()))

    def take_workspace(self) -> Workspace:
        """A workspace for the caller alone; to be given back by `return_workspace`."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._new_workspace()

    def return_workspace(self, workspace: Workspace) -> None:
        """Give back what `take_workspace` gave."""
        self._idle.append(workspace)

    def _new_workspace(self) -> Workspace:
        return Workspace(self._plan, max(FEW_ROWS, self.group_rows))

    @property
    def plan(self) -> Plan:
        """The layers, packed."""
        return self._plan

    @property
    def long_rows(self) -> int:
        """From so many rows on a call is worth the 50 ns that giving Python's lock to other threads takes."""
        return 0 if self._least_seconds > SHORT_S else int(SHORT_S / self._seconds_per_row)

    @property
    def group_rows(self) -> int:
        """The most rows that go through all layers together."""
        return schedule.GROUP * BLOCK_VECTORS * self._lanes

    def part_panels(self, rows: int, threads: int) -> int:
        """Panels of a layer in a part, if *threads* threads share *rows* rows; 0 if the rows are cut."""
        if rows > self.group_rows:
            return 0
        return max(1, self._plan.widest // PANEL // (threads * _PARTS_PER_THREAD))

    @property
    def layer_count(self) -> int:
        """The number of layers."""
        return self._plan.layer_count


class _Job:
    """One call that several threads share. Held by each of them until it has looked for work."""

    def __init__(self, evaluator: Evaluator, x: FloatArray, y: FloatArray, threads: int) -> None:
        self._evaluator = evaluator
        self._forward_parts = _compiled(schedule.forward_parts)
        self._workspace = evaluator.take_workspace()
        rows = x.shape[0]
        part_panels = evaluator.part_panels(rows, threads)
        # The last stage, and how many of its parts make the job finished.
        self._end = (evaluator.layer_count + 1, 1) if part_panels else (0, rows)
        slots = np.zeros(schedule.JOB_STAGES + (self._end[0] + 1) * schedule.STAGE_SLOTS, np.int64)
        slots[schedule.JOB_X] = address_of(x)
        slots[schedule.JOB_Y] = address_of(y)
        slots[schedule.JOB_ROWS] = rows
        slots[schedule.JOB_THREADS] = threads
        slots[schedule.JOB_PART_PANELS] = part_panels
        slots[schedule.JOB_WORKSPACE] = self._workspace.address
        self._kept = (slots, x, y)
        self.address = address_of(slots)

    def share(self) -> _Share:
        """The part of a helper."""
        return _Share(self, self._evaluator)

    def take_part(self) -> None:
        """Work on the job until nothing is left to take."""
        self._forward_parts(self.address, self._workspace.address)

    def is_finished(self) -> bool:
        """Whether all is done, by whomever; waits busily, for a while."""
        return bool(_compiled(schedule.is_finished)(self.address, *self._end, _PATIENCE))

    def end(self) -> None:
        """Give the buffers back: all is done, and who comes late reads nothing but the job's own slots."""
        self._evaluator.return_workspace(self._workspace)


class _Share:
    """What one helper does for a job."""

    def __init__(self, job: _Job, evaluator: Evaluator) -> None:
        self._job = job
        self._evaluator = evaluator
        self._done = threading.Event()

    def run(self) -> None:
        """Work on the job until nothing is left to take."""
        workspace = self._evaluator.take_workspace()
        _compiled(schedule.forward_parts)(self._job.address, workspace.address)
        self._evaluator.return_workspace(workspace)
        self._done.set()

    def wait(self) -> None:
        """Sleep until `run` has ended."""
        self._done.wait()


def address_of(array: npt.NDArray[Any]) -> int:
    """Where the numbers of *array* begin."""
    # Half the time of array.ctypes.data.
    return array.__array_interface__["data"][0]  # type: ignore[no-any-return]


# The entry points, each for the one signature it is used with: Numba would compile another for every new one.

_SIGNATURES = {
    schedule.forward_addresses: (types.int64,) * 4,
    schedule.forward_parts: (types.int64,) * 2,
    schedule.is_finished: (types.int64,) * 4,
}
_compiling = threading.Lock()


@functools.cache
def _forward_objects() -> Any:
    """The C function, compiled, or loaded, by the first call; it owns its code."""
    return c_callback(schedule.forward_objects, schedule.FORWARD_OBJECTS, "schedule.forward_objects")


def _compiled(entry: Any) -> Callable[..., Any]:
    """*entry* with its one signature compiled, or loaded, by the first call."""
    if not entry.signatures:
        with _compiling:
            if not entry.signatures:
                entry.compile(_SIGNATURES[entry])
                entry.disable_compile()
    return entry  # type: ignore[no-any-return]
