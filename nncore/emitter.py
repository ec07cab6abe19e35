"""
An llvmlite function -> its body: loads, stores, loops and masks for code over vectors of float32.

An `Emitter` adds memory and control flow to the arithmetic of `nncore.lanes`. Offsets are counted in floats,
and every address is a typed pointer plus such an offset (see `nncore.pointers` for why).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from nncore.lanes import Lanes, Target

__all__ = ["FLOAT", "FLOAT_POINTER", "I64", "Emitter", "Loop", "define"]

FLOAT = ir.FloatType()
FLOAT_POINTER = FLOAT.as_pointer()
I64 = ir.IntType(64)
_I1 = ir.IntType(1)
_I32 = ir.IntType(32)
_BYTE_POINTER = ir.IntType(8).as_pointer()


def define(
    module: ir.Module,
    name: str,
    argument_types: Sequence[ir.Type],
    target: Target,
    body: Callable[..., None],
) -> ir.Function:
    """
    Define the void function *name* in *module*; *body* gets an Emitter and the arguments.

    Internal, and never inlined: callers reach it by its address.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), argument_types), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    function.attributes.add("nounwind")
    emitter = Emitter(ir.IRBuilder(function.append_basic_block("entry")), target)
    body(emitter, *function.args)
    emitter.builder.ret_void()
    return function


class Emitter:
    """Places instructions for one target; `builder` is llvmlite's and may be used beside it."""

    def __init__(self, builder: ir.IRBuilder, target: Target) -> None:
        self.builder = builder
        self.target = target
        self.lanes = target.lanes(FLOAT)
        self.vector_type = ir.VectorType(FLOAT, self.lanes)

    # Numbers

    def integer(self, value: int) -> ir.Constant:
        """*value* as an i64."""
        return ir.Constant(I64, value)

    def splat(self, number: ir.Value) -> Lanes:
        """A float, or a double, in every lane."""
        undefined = ir.Constant(ir.VectorType(number.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, number, _I32(0))
        zeros = ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        return self._lanes(self.builder.shuffle_vector(first, undefined, zeros))

    def constant(self, number: float) -> Lanes:
        """*number* in every lane."""
        return self._lanes(ir.Constant(self.vector_type, [0.0] * self.lanes)).constant(number)

    def across(self, x: Lanes, operation: Callable[[Lanes, Lanes], Lanes]) -> Lanes:
        """All lanes of *x* combined by *operation*, pairwise, in every lane."""
        distance = self.lanes // 2
        while distance:
            moved = [(lane + distance) % self.lanes for lane in range(self.lanes)]
            mask = ir.Constant(ir.VectorType(_I32, self.lanes), moved)
            undefined = ir.Constant(self.vector_type, ir.Undefined)
            x = operation(x, self._lanes(self.builder.shuffle_vector(x.value, undefined, mask)))
            distance //= 2
        return x

    def least(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The lesser of two i64."""
        return self.builder.select(self.builder.icmp_signed("<", x, y), x, y)

    def _lanes(self, value: ir.Value) -> Lanes:
        return Lanes(self.builder, value, self.target)

    # Memory. A pointer is a float*; offsets are in floats, numbers or i64.

    def at(self, pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
        """*pointer*, *offset* floats further."""
        if isinstance(offset, int):
            if offset == 0:
                return pointer
            offset = self.integer(offset)
        return self.builder.gep(pointer, [offset])

    def load(self, pointer: ir.Value, offset: ir.Value | int = 0) -> Lanes:
        """One vector; no alignment is assumed."""
        address = self.builder.bitcast(self.at(pointer, offset), self.vector_type.as_pointer())
        return self._lanes(self.builder.load(address, align=4))

    def store(self, vector: Lanes, pointer: ir.Value, offset: ir.Value | int = 0) -> None:
        """Write one vector; no alignment is assumed."""
        address = self.builder.bitcast(self.at(pointer, offset), self.vector_type.as_pointer())
        self.builder.store(vector.value, address, align=4)

    def load_number(self, pointer: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
        """One float."""
        return self.builder.load(self.at(pointer, offset), align=4)

    def store_number(self, number: ir.Value, pointer: ir.Value, offset: ir.Value | int = 0) -> None:
        """Write one float."""
        self.builder.store(number, self.at(pointer, offset), align=4)

    def broadcast(self, pointer: ir.Value, offset: ir.Value | int = 0) -> Lanes:
        """One float from memory in every lane."""
        return self.splat(self.load_number(pointer, offset))

    def first_lanes(self, count: ir.Value) -> ir.Value:
        """The mask of the first *count* lanes (i64, any size)."""
        narrow = self.builder.trunc(self.least(count, self.integer(self.lanes)), _I32)
        kind = ir.VectorType(_I32, self.lanes)
        undefined = ir.Constant(kind, ir.Undefined)
        wanted = self.builder.insert_element(undefined, narrow, _I32(0))
        wanted = self.builder.shuffle_vector(wanted, undefined, ir.Constant(kind, [0] * self.lanes))
        return self.builder.icmp_signed("<", ir.Constant(kind, list(range(self.lanes))), wanted)

    def load_masked(self, pointer: ir.Value, mask: ir.Value) -> Lanes:
        """One vector of which only the lanes in *mask* are read; the others are 0."""
        name = f"llvm.masked.load.v{self.lanes}f32.p0"
        kind = [self.vector_type.as_pointer(), _I32, mask.type, self.vector_type]
        zeros = ir.Constant(self.vector_type, [0.0] * self.lanes)
        arguments = [self.builder.bitcast(pointer, kind[0]), _I32(4), mask, zeros]
        return self._lanes(self._call(name, self.vector_type, kind, arguments))

    def store_masked(self, vector: Lanes, pointer: ir.Value, mask: ir.Value) -> None:
        """Write only the lanes in *mask*."""
        name = f"llvm.masked.store.v{self.lanes}f32.p0"
        kind = [self.vector_type, self.vector_type.as_pointer(), _I32, mask.type]
        arguments = [vector.value, self.builder.bitcast(pointer, kind[1]), _I32(4), mask]
        self._call(name, ir.VoidType(), kind, arguments)

    def prefetch(self, pointer: ir.Value) -> None:
        """Ask for the cache line at *pointer*, which need not be valid, to be read into the first cache."""
        kind = [_BYTE_POINTER, _I32, _I32, _I32]
        arguments = [self.builder.bitcast(pointer, _BYTE_POINTER), _I32(0), _I32(3), _I32(1)]
        self._call("llvm.prefetch.p0", ir.VoidType(), kind, arguments)

    def scratch(self, vectors: int) -> ir.Value:
        """*vectors* vectors of memory on the stack."""
        with self.builder.goto_entry_block():
            memory = self.builder.alloca(ir.ArrayType(self.vector_type, vectors))
            return self.builder.bitcast(memory, FLOAT_POINTER)

    def _call(
        self, name: str, result: ir.Type, argument_types: list[ir.Type], arguments: list[ir.Value]
    ) -> ir.Value:
        function = self.builder.module.globals.get(name)
        if function is None:
            function = ir.Function(self.builder.module, ir.FunctionType(result, argument_types), name)
        return self.builder.call(function, arguments)

    # Control flow

    @contextmanager
    def loop(
        self,
        count: ir.Value,
        carried: Sequence[Any] = (),
        start: ir.Value | None = None,
        step: int = 1,
    ) -> Iterator[Loop]:
        """
        Repeat the block for indices *start*, *start* + *step*, … below *count*.

        carried: Lanes or LLVM values that pass from one round to the next through `Loop.carry`; after the
        block, `Loop.values` has those of the last round (the initial ones if there was none).
        """
        builder = self.builder
        before = builder.block
        head = builder.append_basic_block("loop")
        body = builder.append_basic_block("body")
        after = builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(I64)
        index.add_incoming(self.integer(0) if start is None else start, before)
        phis = []
        for value in carried:
            plain = value.value if isinstance(value, Lanes) else value
            phi = builder.phi(plain.type)
            phi.add_incoming(plain, before)
            phis.append(phi)
        values = [
            self._lanes(phi) if isinstance(value, Lanes) else phi
            for phi, value in zip(phis, carried, strict=True)
        ]
        builder.cbranch(builder.icmp_signed("<", index, count), body, after)
        builder.position_at_end(body)
        loop = Loop(index, values)
        yield loop
        index.add_incoming(builder.add(index, self.integer(step)), builder.block)
        for phi, value in zip(phis, loop.next_values, strict=True):
            phi.add_incoming(value.value if isinstance(value, Lanes) else value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def when(self, condition: ir.Value) -> Iterator[None]:
        """Run the block only if *condition*, an i1, holds."""
        with self.builder.if_then(condition):
            yield


class Loop:
    """A loop under construction: see `Emitter.loop`."""

    def __init__(self, index: ir.Value, values: list[Any]) -> None:
        self.index = index
        self.values = values
        self.next_values: Sequence[Any] = ()

    def carry(self, *values: Any) -> None:
        """Hand *values* to the next round."""
        self.next_values = values
