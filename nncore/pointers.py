"""
Arrays and descriptors -> typed pointers: the vocabulary of memory for kernels that Numba compiles.

A pointer is a value of `types.CPointer`: `p[i]` reads and `p[i] = v` writes, `advance(p, n)` is the address
of the n-th element after it. A descriptor is a row of int64 slots; a slot holds a number, read as `d[i]`, or
a pointer, read by `floats_at` and `slots_at`.

No kernel computes an address from integers. LLVM may take either operand of `inttoptr(base + offset)` for
the base of the access; code that Numba has loaded from a cache is optimised once more, with that choice in
it, and then reads from a null pointer's neighbourhood: right when compiled, silently wrong when loaded. With
pointers and getelementptr throughout there is nothing to choose.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

__all__ = [
    "FLOATS",
    "SLOTS",
    "advance",
    "claim",
    "data_of",
    "floats_at",
    "floats_from",
    "pause",
    "read_shared",
    "slots_at",
    "slots_from",
]

# The types of pointers to float32, and to the int64 slots of a descriptor.
FLOATS = types.CPointer(types.float32)
SLOTS = types.CPointer(types.int64)

_I64 = ir.IntType(64)
_FLOAT_POINTER = ir.FloatType().as_pointer()
_SLOT_POINTER = _I64.as_pointer()


@intrinsic
def data_of(typing: Any, array: Any) -> Any:
    """The address of the first element of *array*."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return context.make_array(signature.args[0])(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), emit


@intrinsic
def advance(typing: Any, pointer: Any, count: Any) -> Any:
    """The address of the element *count* after the one that *pointer* points to."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), emit


def _load_pointer(kind: Any, llvm_type: ir.Type) -> Any:
    """What an intrinsic returns that reads a pointer of *kind* from a slot of a descriptor."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        slot = builder.gep(arguments[0], [arguments[1]])
        return builder.load(builder.bitcast(slot, llvm_type.as_pointer()))

    return kind(SLOTS, types.int64), emit


@intrinsic
def floats_at(typing: Any, slots: Any, index: Any) -> Any:
    """The pointer to float32 that slot *index* holds."""
    return _load_pointer(FLOATS, _FLOAT_POINTER)


@intrinsic
def slots_at(typing: Any, slots: Any, index: Any) -> Any:
    """The pointer to another descriptor that slot *index* holds."""
    return _load_pointer(SLOTS, _SLOT_POINTER)


def _from_address(kind: Any, llvm_type: ir.Type, name: str) -> Any:
    """
    What an intrinsic returns that makes a pointer of *kind* of an address from Python.

    By a function that is never inlined, so that not even here there is an inttoptr next to the additions
    that could be folded into it. 1 ns; an array argument costs 60.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(llvm_type, [_I64]), name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            body = ir.IRBuilder(function.append_basic_block())
            body.ret(body.inttoptr(function.args[0], llvm_type))
        return builder.call(function, arguments)

    return kind(types.int64), emit


@intrinsic
def slots_from(typing: Any, address: Any) -> Any:
    """The descriptor at *address*."""
    return _from_address(SLOTS, _SLOT_POINTER, "nncore_slots_from")


@intrinsic
def floats_from(typing: Any, address: Any) -> Any:
    """The float32 at *address*."""
    return _from_address(FLOATS, _FLOAT_POINTER, "nncore_floats_from")


# What threads share


@intrinsic
def claim(typing: Any, slots: Any, index: Any, count: Any) -> Any:
    """
    Add *count* to slot *index*, atomically; the number it held before.

    What this thread wrote before is seen by every thread that reads the new number by `claim` or
    `read_shared`.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        slot = builder.gep(arguments[0], [arguments[1]])
        return builder.atomic_rmw("add", slot, arguments[2], "seq_cst")

    return types.int64(SLOTS, types.int64, types.int64), emit


@intrinsic
def read_shared(typing: Any, slots: Any, index: Any) -> Any:
    """Slot *index*, as another thread's `claim` has left it."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        slot = builder.gep(arguments[0], [arguments[1]])
        return builder.load_atomic(slot, "acquire", 8)

    return types.int64(SLOTS, types.int64), emit


@intrinsic
def pause(typing: Any) -> Any:
    """Tell the processor that this is a loop that waits."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        if context.codegen().magic_tuple()[0].startswith("x86_64"):
            name = "llvm.x86.sse2.pause"
            function = builder.module.globals.get(name)
            if function is None:
                function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), []), name)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.none(), emit
