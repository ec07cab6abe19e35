"""
Formulas over Lanes -> NumPy ufuncs, for float32 and float64.

A `Ufunc` is what `numba.vectorize` makes, a DUFunc, but for its loops. Numba's loop is compiled anew in every
process, handles one number at a time wherever an operand is broadcast or the output overlaps an input, and
lets the underflow of e^-90 surface as a NumPy warning. Ours is one C function from the cache:

    whole blocks of contiguous elements   loaded, computed, stored; an alpha for all is spread once
    everything else                       copied to a block on the stack, computed there, copied back

A block is two vectors wide (2 x 16 float32 with AVX-512): LLVM splits each operation in two, whose latencies
then overlap. The floating-point status is put back afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.numpy_support import as_dtype, ufunc_find_matching_loop
from numba.np.ufunc.dufunc import DUFunc

from nncore.compilation import c_callback, target_of
from nncore.lanes import Lanes, Target
from nncore.tracing import Formula, traced

__all__ = ["Ufunc"]

_I8_POINTER = ir.IntType(8).as_pointer()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VECTORS_PER_BLOCK = 2

# (args, dimensions, steps, data), as NumPy calls the inner loop of a ufunc.
_LOOP_SIGNATURE = types.void(types.voidptr, types.voidptr, types.voidptr, types.voidptr)


# Numba's annotations do not cover its DUFunc.
_DUFunc: Any = DUFunc


class Ufunc(_DUFunc):  # type: ignore[misc]
    """
    A NumPy ufunc of one formula; callable from kernels too.

    With an alpha it takes (x, alpha), and alpha may be left out if it has a default. Integers are converted
    by NumPy's rules for ufuncs without a loop for them: 8 and 16 bits to float32, others to float64.
    """

    def __init__(self, formula: Formula, name: str, doc: str, default_alpha: float | None = None) -> None:
        self._formula = formula
        self._default_alpha = default_alpha
        super().__init__(_element_function(formula, name, doc), targetoptions={"nopython": True})
        arity = len(inspect.signature(formula).parameters)
        for kind in (types.float32, types.float64):
            self._add(kind, arity, name)
        self._frozen = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._default_alpha is not None and len(args) == 1:
            args = (*args, self._default_alpha)
        return super().__call__(*args, **kwargs)

    def _add(self, kind: Any, arity: int, name: str) -> None:
        """Compile the loop for *kind*, or load it, and make it known to NumPy."""
        loop = c_callback(_loop_function(self._formula, kind, arity), _LOOP_SIGNATURE, f"ufunc.{name}.{kind}")
        self._add_loop(loop.address, [as_dtype(kind).num] * (arity + 1))
        self._keepalive.append(loop)

    def find_ewise_function(self, ewise_types: Any) -> Any:
        """The function of one element, for kernels that call the ufunc; compiled only then."""
        loop = ufunc_find_matching_loop(self, ewise_types)
        if loop is not None and not any(s.args == tuple(loop.inputs) for s in self._dispatcher.overloads):
            element = self._dispatcher.compile(tuple(loop.inputs))
            self._lower_me.libs.append(element.library)
        return super().find_ewise_function(ewise_types)


def _element_function(formula: Formula, name: str, doc: str) -> Callable[..., Any]:
    """A Python function of one element, which Numba takes the ufunc's name, docstring and arity from."""
    compute = traced(formula)
    if len(inspect.signature(formula).parameters) == 1:

        def element(x: Any) -> Any:
            return compute(x)
    else:

        def element(x: Any, alpha: Any) -> Any:  # type: ignore[misc]
            return compute(x, alpha)

    element.__name__ = element.__qualname__ = name
    element.__doc__ = doc
    return element


def _loop_function(formula: Formula, kind: Any, arity: int) -> Callable[..., None]:
    """The inner loop of a ufunc of *arity* operands of Numba type *kind*, as a Python function to compile."""

    def typing(context: Any, args: Any, dimensions: Any, steps: Any) -> tuple[Any, Callable[..., Any]]:
        def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> Any:
            element = ir.DoubleType() if kind == types.float64 else ir.FloatType()
            _Loop(builder, target_of(context), formula, element, arity).emit(*values)
            return context.get_dummy_value()

        return types.none(args, dimensions, steps), emit

    emit_loop: Any = intrinsic(typing)

    def loop(args: Any, dimensions: Any, steps: Any, data: Any) -> None:
        emit_loop(args, dimensions, steps)

    return loop


class _Loop:
    """
    Emits the inner loop.

    args: the operands' data pointers, the result's last; dimensions: the count; steps: strides in bytes.
    """

    def __init__(
        self, builder: ir.IRBuilder, target: Target, formula: Formula, element: ir.Type, arity: int
    ) -> None:
        self.builder = builder
        self.target = target
        self.formula = formula
        self.element = element
        self.arity = arity
        self.width = _VECTORS_PER_BLOCK * target.lanes(element)
        self.size = 8 if element == ir.DoubleType() else 4
        self.block = ir.VectorType(element, self.width)

    def emit(self, args: ir.Value, dimensions: ir.Value, steps: ir.Value) -> None:
        b = self.builder
        count = b.load(b.bitcast(dimensions, _I64.as_pointer()))
        args = b.bitcast(args, _I8_POINTER.as_pointer())
        steps = b.bitcast(steps, _I64.as_pointer())
        pointers = [b.load(b.gep(args, [_I64(i)])) for i in range(self.arity + 1)]
        strides = [b.load(b.gep(steps, [_I64(i)])) for i in range(self.arity + 1)]
        # One block of stack an operand: operands that are not contiguous pass through it.
        with b.goto_entry_block():
            buffers = [self._stack_block() for _ in pointers]

        with _status_kept(b):
            x, *alphas, y = range(self.arity + 1)
            contiguous = b.and_(self._is_packed(strides[x]), self._is_packed(strides[y]))
            for alpha in alphas:
                spread = b.icmp_signed("==", strides[alpha], _I64(0))
                contiguous = b.and_(contiguous, b.or_(spread, self._is_packed(strides[alpha])))
            whole = b.select(contiguous, b.sub(count, b.srem(count, _I64(self.width))), _I64(0))
            self._whole_blocks(pointers, strides, buffers, whole)
            self._other_elements(pointers, strides, buffers, whole, count)

    def _stack_block(self) -> ir.Value:
        return self.builder.bitcast(self.builder.alloca(self.block), _I8_POINTER)

    def _is_packed(self, stride: ir.Value) -> ir.Value:
        return self.builder.icmp_signed("==", stride, _I64(self.size))

    def _whole_blocks(
        self, pointers: list[ir.Value], strides: list[ir.Value], buffers: list[ir.Value], end: ir.Value
    ) -> None:
        """Elements [0, end) of contiguous operands, block by block; end is a multiple of the width."""
        b = self.builder
        bytes_a_block = _I64(self.width * self.size)
        sources, advances = [pointers[0]], [bytes_a_block]
        for pointer, stride, buffer in zip(pointers[1:-1], strides[1:-1], buffers[1:-1], strict=True):
            # An alpha that is the same for all elements is read from a block filled with it.
            spread = b.icmp_signed("==", stride, _I64(0))
            with (
                b.if_then(b.and_(spread, b.icmp_signed(">", end, _I64(0)))),
                self._counted(_I64(0), _I64(self.width)) as i,
            ):
                self._copy(pointer, _I64(0), buffer, b.mul(i, _I64(self.size)))
            sources.append(b.select(spread, buffer, pointer))
            advances.append(b.select(spread, _I64(0), bytes_a_block))
        with self._counted(_I64(0), end, self.width) as i:
            block = b.sdiv(i, _I64(self.width))
            inputs = [
                self._load_block(b.gep(source, [b.mul(block, advance)]))
                for source, advance in zip(sources, advances, strict=True)
            ]
            self._store_block(self._compute(inputs), b.gep(pointers[-1], [b.mul(i, _I64(self.size))]))

    def _other_elements(
        self,
        pointers: list[ir.Value],
        strides: list[ir.Value],
        buffers: list[ir.Value],
        start: ir.Value,
        end: ir.Value,
    ) -> None:
        """Elements [start, end) of any operands, by way of the blocks on the stack."""
        b = self.builder
        # Lanes that are not filled are computed too, whatever they hold; zeros are never slow.
        for buffer in buffers[:-1]:
            b.store(ir.Constant(self.block, None), b.bitcast(buffer, self.block.as_pointer()), self.size)
        with self._counted(start, end, self.width) as first:
            left = b.sub(end, first)
            filled = b.select(b.icmp_signed("<", left, _I64(self.width)), left, _I64(self.width))
            for pointer, stride, buffer in zip(pointers[:-1], strides[:-1], buffers[:-1], strict=True):
                with self._counted(_I64(0), filled) as i:
                    self._copy(pointer, b.mul(b.add(first, i), stride), buffer, b.mul(i, _I64(self.size)))
            self._store_block(self._compute([self._load_block(x) for x in buffers[:-1]]), buffers[-1])
            with self._counted(_I64(0), filled) as i:
                self._copy(
                    buffers[-1], b.mul(i, _I64(self.size)), pointers[-1], b.mul(b.add(first, i), strides[-1])
                )

    def _compute(self, inputs: list[ir.Value]) -> ir.Value:
        return self.formula(*(Lanes(self.builder, value, self.target) for value in inputs)).value

    def _load_block(self, pointer: ir.Value) -> ir.Value:
        b = self.builder
        return b.load(b.bitcast(pointer, self.block.as_pointer()), align=self.size)

    def _store_block(self, value: ir.Value, pointer: ir.Value) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, self.block.as_pointer()), align=self.size)

    def _copy(self, source: ir.Value, source_at: ir.Value, sink: ir.Value, sink_at: ir.Value) -> None:
        """One element from byte source_at of source to byte sink_at of sink."""
        b = self.builder
        kind = self.element.as_pointer()
        b.store(b.load(b.bitcast(b.gep(source, [source_at]), kind)), b.bitcast(b.gep(sink, [sink_at]), kind))

    @contextmanager
    def _counted(self, start: ir.Value, end: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """A loop over start, start + step, ... below end; the body is what is emitted inside."""
        b = self.builder
        before = b.block
        test, body, after = (b.append_basic_block(name) for name in ("test", "body", "after"))
        b.branch(test)
        b.position_at_end(test)
        i = b.phi(_I64)
        i.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", i, end), body, after)
        b.position_at_end(body)
        yield i
        i.add_incoming(b.add(i, _I64(step)), b.block)
        b.branch(test)
        b.position_at_end(after)


@contextmanager
def _status_kept(builder: ir.IRBuilder) -> Iterator[None]:
    """
    Put the floating-point status back as it was before what is emitted inside.

    NumPy turns it into warnings after the loop; but underflow and overflow inside a formula are part of it.
    """
    triple, module = builder.module.triple, builder.module
    if triple.startswith(("x86_64", "i686")):
        with builder.goto_entry_block():
            saved = builder.bitcast(builder.alloca(_I32), _I8_POINTER)
        kind = ir.FunctionType(ir.VoidType(), [_I8_POINTER])
        builder.call(module.declare_intrinsic("llvm.x86.sse.stmxcsr", (), kind), [saved])
        yield
        builder.call(module.declare_intrinsic("llvm.x86.sse.ldmxcsr", (), kind), [saved])
    elif triple.startswith(("aarch64", "arm64")):
        read = module.declare_intrinsic("llvm.aarch64.get.fpsr", (), ir.FunctionType(_I64, []))
        write = module.declare_intrinsic("llvm.aarch64.set.fpsr", (), ir.FunctionType(ir.VoidType(), [_I64]))
        saved = builder.call(read, [])
        yield
        builder.call(write, [saved])
    else:
        yield
