"""
A C function over Python's objects -> a callable that Python calls in 40 ns, arrays and all.

Numba's dispatch costs 130 ns, and 60 more for each array it takes apart; checking an array from Python as
much again. A model of a few thousand weights takes less than that. So the shortest way into the kernels is a
function as extension modules have them (METH_FASTCALL), compiled by Numba:

    function(me, arguments, count)    me, arguments[i]: PyObject *, read as rows of 8-byte slots

It reads arrays where NumPy keeps their fields. That layout has been part of NumPy's binary interface since
1.7; `layout_is_known` compares it with what NumPy says, once, and without it there is no such function.

The caller holds the interpreter's lock (GIL); `release_lock` and `take_lock` let others run meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nncore.pointers import SLOTS

__all__ = [
    "ARRAY_AXES",
    "ARRAY_DATA",
    "ARRAY_DTYPE",
    "ARRAY_FLAGS",
    "ARRAY_SHAPE",
    "OBJECT_TYPE",
    "call_with",
    "callable_over",
    "counted",
    "forget",
    "is_null",
    "layout_is_known",
    "low_half",
    "release_lock",
    "take_lock",
]

# Slots of an object; the type is the last field of what every object begins with.
_HEADER_SLOTS = object.__basicsize__ // 8
OBJECT_TYPE = _HEADER_SLOTS - 1
# Slots of an array.
ARRAY_DATA = _HEADER_SLOTS
ARRAY_AXES = _HEADER_SLOTS + 1  # an int: see `low_half`
ARRAY_SHAPE = _HEADER_SLOTS + 2  # -> an int64 an axis
ARRAY_DTYPE = _HEADER_SLOTS + 5
ARRAY_FLAGS = _HEADER_SLOTS + 6  # an int

_METH_FASTCALL = 0x80

_I64 = ir.IntType(64)
_VOID = ir.VoidType()
_OBJECT = ir.IntType(8).as_pointer()


class _Definition(ctypes.Structure):
    """PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


def callable_over(address: int, me: npt.NDArray[np.int64]) -> Callable[..., Any]:
    """
    The C function at *address* as a builtin function that is passed *me* before its arguments.

    *me* lives as long as the callable; whoever owns the code must keep it.
    """
    result: Callable[..., Any] = _new_builtin()(_definition(address), me, None)
    return result


@functools.cache
def _definition(address: int) -> Any:
    """Kept for ever, as builtin functions want it."""
    return ctypes.pointer(_Definition(b"nncore_function", address, _METH_FASTCALL, None))


@functools.cache
def _new_builtin() -> Callable[..., Any]:
    kind = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    return kind(("PyCFunction_NewEx", ctypes.pythonapi))


@functools.cache
def layout_is_known() -> bool:
    """Whether arrays lie in memory as the slots above say."""
    if struct.calcsize("P") != 8:
        return False
    probe = np.zeros((3, 5), np.float32)
    probe.flags.writeable = False
    slots = (ctypes.c_int64 * (ARRAY_FLAGS + 1)).from_address(id(probe))
    axes, flags = slots[ARRAY_AXES] & 0xFFFFFFFF, slots[ARRAY_FLAGS] & 0xFFFFFFFF
    if (slots[OBJECT_TYPE], slots[ARRAY_DATA], axes) != (id(np.ndarray), probe.ctypes.data, 2):
        return False
    shape = (ctypes.c_int64 * 2).from_address(slots[ARRAY_SHAPE])
    return (tuple(shape), slots[ARRAY_DTYPE], flags) == ((3, 5), id(probe.dtype), probe.flags.num)


# What such a function does with Python


def _calls(name: str, result: ir.Type, arguments: list[ir.Type], kind: Any) -> Any:
    """What an intrinsic returns that calls the function *name* of Python's C interface."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
        passed = [builder.bitcast(value, kind) for value, kind in zip(values, arguments, strict=True)]
        answer = builder.call(_declared(builder, name, result, arguments), passed)
        if result == _VOID:
            return context.get_dummy_value()
        return builder.bitcast(answer, _I64.as_pointer())

    return kind, emit


def _declared(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, arguments), name)
    return function


@intrinsic
def counted(typing: Any, item: Any) -> Any:
    """The object *item*, with one more reference to it: what a function returns belongs to its caller."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        function = _declared(builder, "Py_IncRef", _VOID, [_OBJECT])
        builder.call(function, [builder.bitcast(arguments[0], _OBJECT)])
        return arguments[0]

    return SLOTS(SLOTS), emit


@intrinsic
def forget(typing: Any, item: Any) -> Any:
    """Give back a reference to the object *item*."""
    return _calls("Py_DecRef", _VOID, [_OBJECT], types.none(SLOTS))


@intrinsic
def call_with(typing: Any, function: Any, argument: Any) -> Any:
    """function(argument), a new reference; null if it has raised, and then null is to be returned."""
    return _calls("PyObject_CallOneArg", _OBJECT, [_OBJECT, _OBJECT], SLOTS(SLOTS, SLOTS))


@intrinsic
def is_null(typing: Any, item: Any) -> Any:
    """Whether there is no object."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return builder.icmp_unsigned("==", arguments[0], ir.Constant(arguments[0].type, None))

    return types.boolean(SLOTS), emit


@intrinsic
def release_lock(typing: Any) -> Any:
    """Let other threads run Python; what is returned is for `take_lock`."""
    return _calls("PyEval_SaveThread", _OBJECT, [], SLOTS())


@intrinsic
def take_lock(typing: Any, state: Any) -> Any:
    """Wait for the interpreter's lock."""
    return _calls("PyEval_RestoreThread", _VOID, [_OBJECT], types.none(SLOTS))


@intrinsic
def low_half(typing: Any, slots: Any, index: Any) -> Any:
    """The 32-bit int at the beginning of slot *index*."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        place = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), ir.IntType(32).as_pointer())
        return builder.zext(builder.load(place), _I64)

    return types.int64(SLOTS, types.int64), emit
