"""
This machine in, its limits out: fused multiply-adds a second, and bytes read from memory a second.

Both are measured by loops that do nothing else, on one thread or several, so that a kernel's time can be
given as a share of what the machine could do at best.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from nncore.emitter import FLOAT_POINTER, I64, Emitter, define
from nncore.lanes import Lanes, Target, fma

__all__ = ["Machine"]

# Chains of fused multiply-adds: more than any machine's latency times its rate, and fewer than its registers.
_CHAINS = 12
_MEMORY_BYTES = 256 << 20
# Streams that memory is read in, and how far ahead it is asked for, in floats: the best combination counts.
_STREAMS = (1, 4)
_AHEAD = (0, 512)
_TRIES = 8


class Machine:
    """The limits of so many threads of this machine."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._multiply_add, self._readers, self._flops_a_round = _compiled()
        self._memory = np.ones(1, np.float32)

    def multiply_adds(self, rounds: int = 500_000) -> float:
        """
        Measure in a few milliseconds: floating-point operations a second.

        Of several threads the best of some tries: a system may start two on one core and part them later.
        """
        results = [np.zeros(64, np.float32) for _ in range(self.threads)]
        calls = [functools.partial(self._multiply_add, r.ctypes.data, rounds) for r in results]
        least_s = min(_seconds(calls) for _ in range(1 if self.threads == 1 else _TRIES))
        return self.threads * rounds * self._flops_a_round / least_s

    def read_bytes(self, samples: int = 7) -> float:
        """Measure in a second: bytes read from memory a second, by the best way of reading."""
        if self._memory.size == 1:
            self._memory = np.ones(_MEMORY_BYTES // 4, np.float32)
        parts = np.split(self._memory, self.threads)
        sinks = [np.zeros(64, np.float32) for _ in parts]
        best = 0.0
        for reader in self._readers:
            calls = [
                functools.partial(reader, part.ctypes.data, part.size, sink.ctypes.data)
                for part, sink in zip(parts, sinks, strict=True)
            ]
            rates = [_MEMORY_BYTES / _seconds(calls) for _ in range(samples)]
            best = max(best, statistics.median(rates))
        return best


def _seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """The time that *calls* take, each in a thread of its own, from the first's start to the last's end."""
    if len(calls) == 1:
        started = time.perf_counter()
        calls[0]()
        return time.perf_counter() - started
    barrier = threading.Barrier(len(calls))
    times: list[tuple[float, float]] = []

    def run(call: Callable[[], Any]) -> None:
        barrier.wait()
        started = time.perf_counter()
        call()
        times.append((started, time.perf_counter()))

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in times) - min(start for start, _ in times)


@functools.cache
def _compiled() -> tuple[Callable[..., None], list[Callable[..., None]], int]:
    """The loop of multiply-adds, those that read, and the operations in a round of the first."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, features = llvm.get_default_triple(), llvm.get_host_cpu_features().flatten()
    target = Target.from_features(triple, features)
    module = ir.Module()
    module.triple = triple
    functions = [define(module, "multiply_add", (FLOAT_POINTER, I64), target, _emit_multiply_add)]
    for streams in _STREAMS:
        for ahead in _AHEAD:
            emit = functools.partial(_emit_read, streams=streams, ahead=ahead)
            arguments = (FLOAT_POINTER, I64, FLOAT_POINTER)
            functions.append(define(module, f"read_{streams}_{ahead}", arguments, target, emit))
    for function in functions:
        function.linkage = "external"
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    _engines.append(engine)
    multiply_add, *readers = (engine.get_function_address(function.name) for function in functions)
    one = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(multiply_add)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    return one, [kind(address) for address in readers], 2 * _CHAINS * target.vector_bits // 32


# They own the machine code.
_engines: list[Any] = []


def _emit_multiply_add(e: Emitter, result: ir.Value, rounds: ir.Value) -> None:
    number = e.load(result)
    chains = [number + float(i) for i in range(_CHAINS)]
    with e.loop(rounds, chains) as loop:
        loop.carry(*(fma(chain, number, number) for chain in loop.values))
    e.store(_sum(loop.values), result)


def _emit_read(
    e: Emitter, x: ir.Value, count: ir.Value, result: ir.Value, *, streams: int, ahead: int
) -> None:
    each = e.builder.sdiv(count, e.integer(streams))
    starts = [e.at(x, e.builder.mul(each, e.integer(i))) for i in range(streams)]
    vectors = 4
    sums = [e.constant(0.0)] * (streams * vectors)
    with e.loop(each, sums, step=vectors * e.lanes) as loop:
        after: list[Lanes] = []
        for start in starts:
            place = e.at(start, loop.index)
            for i in range(vectors):
                if ahead:
                    e.prefetch(e.at(place, ahead + i * e.lanes))
                after.append(loop.values[len(after)] + e.load(place, i * e.lanes))
        loop.carry(*after)
    e.store(_sum(loop.values), result)


def _sum(values: list[Lanes]) -> Lanes:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
