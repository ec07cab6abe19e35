"""
Formulas over Lanes -> functions that kernels can call, one number at a time.

`traced(formula)` is callable from any `nncore.compilation.kernel` with float32 or float64 arguments, all of
one type, and emits the formula's instructions in place; `fma` is one. `switched` chooses among formulas by
number at run time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nncore import lanes
from nncore.compilation import target_of
from nncore.lanes import Lanes

__all__ = ["fma", "switched", "traced"]

Formula = Callable[..., Lanes]


def traced(formula: Formula) -> Callable[..., Any]:
    """*formula* as a function for kernels, of as many numbers as it takes Lanes."""

    def typed(*arguments: Any) -> tuple[Any, Callable[..., ir.Value]]:
        kind = arguments[0]
        if kind not in (types.float32, types.float64) or any(a != kind for a in arguments):
            raise TypeError(
                f"{formula.__name__} takes float32 or float64 arguments of one type, not {arguments}"
            )

        def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
            target = target_of(context)
            return formula(*(Lanes(builder, value, target) for value in values)).value

        return kind(*arguments), emit

    arity = len(inspect.signature(formula).parameters)
    if arity == 1:
        return _intrinsic(lambda context, x: typed(x), formula)
    if arity == 2:
        return _intrinsic(lambda context, x, y: typed(x, y), formula)
    return _intrinsic(lambda context, x, y, z: typed(x, y, z), formula)


def _intrinsic(typing: Callable[..., Any], formula: Formula) -> Callable[..., Any]:
    typing.__name__ = typing.__qualname__ = formula.__name__
    typing.__doc__ = formula.__doc__
    return intrinsic(typing)


def switched(formulas: Mapping[int, Formula], name: str) -> Callable[..., Any]:
    """
    A function f(x, code, alpha) for kernels that computes formulas[code](x) or formulas[code](x, alpha).

    x: float32 or float64; code: an integer; alpha is converted to the type of x, as is the result.
    An unknown code gives NaN.
    """

    def typing(context: Any, x: Any, code: Any, alpha: Any) -> tuple[Any, Callable[..., ir.Value]] | None:
        if x not in (types.float32, types.float64):
            raise TypeError(f"{name} takes a float32 or float64, not {x}")

        def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
            target = target_of(context)
            x, code, alpha = values
            done = builder.append_basic_block("activated")
            results = [(ir.Constant(x.type, float("nan")), builder.block)]
            switch = builder.switch(code, done)
            for number, formula in formulas.items():
                block = builder.append_basic_block(formula.__name__)
                switch.add_case(ir.Constant(code.type, number), block)
                builder.position_at_end(block)
                arguments = [x, alpha][: len(inspect.signature(formula).parameters)]
                y = formula(*(Lanes(builder, value, target) for value in arguments)).value
                results.append((y, builder.block))
                builder.branch(done)
            builder.position_at_end(done)
            phi = builder.phi(x.type)
            for y, block in results:
                phi.add_incoming(y, block)
            return phi

        return x(x, types.int64, x), emit

    typing.__name__ = typing.__qualname__ = name
    return intrinsic(typing)


fma = traced(lanes.fma)
