"""
Functions emitted over `nncore.lanes` for a kind of machine -> code that runs here, or assembly to be read.

Where `nncore` has Numba compile for the machine at hand, tests look at every kind: each that this machine can
run is compiled and run in this process, side by side with the others; for the rest the code can be read.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from nncore.lanes import Lanes, Target

Define = Callable[[ir.Module, "Machine"], Mapping[Any, ir.Function]]


@dataclass(frozen=True)
class Machine:
    """A kind of machine: what LLVM calls it, and what nncore is to make of it."""

    name: str
    triple: str
    cpu: str
    features: str
    target: Target

    @property
    def registers(self) -> int:
        """Vector registers, as `nncore.kernel_table.vector_registers` counts them."""
        return 32 if self.target.vector_bits == 512 or self.triple.startswith("aarch64") else 16

    @property
    def runs_here(self) -> bool:
        """Whether this machine has the instructions."""
        if self.triple.split("-")[0] != llvm.get_default_triple().split("-")[0]:
            return False
        here = llvm.get_host_cpu_features()
        return all(here.get(feature[1:], False) for feature in self.features.split(",") if feature[:1] == "+")


_X86 = "x86_64-unknown-linux-gnu"
_AVX512 = "+avx,+avx2,+fma,+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512cd"
MACHINES = [
    Machine("AVX-512", _X86, "skylake-avx512", _AVX512, Target(512, True)),
    Machine("AVX-512, 256 bits forced", _X86, "skylake-avx512", _AVX512, Target(256, True)),
    Machine("AVX2", _X86, "haswell", "+avx,+avx2,+fma", Target(256, True)),
    Machine("AVX2, 128 bits forced", _X86, "haswell", "+avx,+avx2,+fma", Target(128, True)),
    Machine("AVX2 without FMA", _X86, "x86-64", "+avx,+avx2", Target(256, False)),
    Machine("SSE2", _X86, "x86-64", "+sse2", Target(128, False)),
    Machine("AArch64", "aarch64-unknown-linux-gnu", "generic", "+neon", Target(128, True)),
]
MACHINES_HERE = [machine for machine in MACHINES if machine.runs_here]


def module_for(machine: Machine) -> ir.Module:
    """An empty module for *machine*."""
    module = ir.Module("emitted")
    module.triple = machine.triple
    module.data_layout = str(_target_machine(machine).target_data)
    return module


def assembly_and_object(machine: Machine, define: Define) -> tuple[str, bytes]:
    """What *define* puts into a module, as assembly of *machine*, and as an object file for it."""
    optimised, target_machine = _optimised(machine, define), _target_machine(machine, is_run_here=False)
    return target_machine.emit_assembly(optimised), target_machine.emit_object(optimised)


class Code:
    """What *define* puts into a module, compiled for *machine* and ready to be run here."""

    def __init__(self, machine: Machine, define: Define) -> None:
        names: dict[Any, str] = {}
        optimised = _optimised(machine, define, names)
        self._engine = llvm.create_mcjit_compiler(optimised, _target_machine(machine))
        self._engine.finalize_object()
        self._addresses = {key: self._engine.get_function_address(name) for key, name in names.items()}

    def __getitem__(self, key: Any) -> Callable[..., None]:
        """
        The function *key*, called with arrays, whole numbers (int64) and np.float32.
        """
        address = self._addresses[key]

        def call(*arguments: Any) -> None:
            passed: list[Any] = []
            for argument in arguments:
                if isinstance(argument, np.ndarray):
                    passed.append(ctypes.c_void_p(argument.ctypes.data))
                elif isinstance(argument, np.float32):
                    passed.append(ctypes.c_float(float(argument)))
                else:
                    passed.append(ctypes.c_int64(argument))
            ctypes.CFUNCTYPE(None, *map(type, passed))(address)(*passed)

        return call

    def __iter__(self) -> Any:
        return iter(self._addresses)


def _optimised(machine: Machine, define: Define, names: dict[Any, str] | None = None) -> Any:
    module = module_for(machine)
    for key, function in define(module, machine).items():
        function.linkage = ""  # what nobody calls and nobody sees would be dropped
        if names is not None:
            names[key] = function.name
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    target_machine = _target_machine(machine)
    builder = llvm.create_pass_builder(target_machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    return parsed


@cache
def _initialize() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def _target_machine(machine: Machine, is_run_here: bool = True) -> Any:
    _initialize()
    target = llvm.Target.from_triple(machine.triple)
    # Code that is run here may lie far from what it calls; other code names it, which is easier to read.
    place = {"reloc": "static", "codemodel": "jitdefault", "jit": True} if is_run_here else {"reloc": "pic"}
    return target.create_target_machine(cpu=machine.cpu, features=machine.features, opt=3, **place)


# Memory with an end


def guarded(array: NDArray[Any]) -> NDArray[Any]:
    """A copy of *array* that ends where a page begins that cannot be touched: who reads beyond it crashes."""
    size = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    base = np.frombuffer(memory, np.uint8).ctypes.data
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(base + size), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


# Formulas over Lanes as functions of arrays


def elementwise(
    module: ir.Module,
    machine: Machine,
    name: str,
    formula: Callable[..., Any],
    arity: int,
    width: int = 1,
    element: ir.Type | None = None,
) -> ir.Function:
    """
    Define void name(x, ..., out, blocks): out[i] = formula(x[i], ...) for blocks * width numbers.

    element: float (the default) or double; the result may be of another type.
    """
    element = element or ir.FloatType()
    kind = ir.VectorType(element, width) if width > 1 else element
    byte = ir.IntType(8).as_pointer()
    i64 = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte] * (arity + 1) + [i64]), name)
    entry = ir.IRBuilder(function.append_basic_block("entry"))
    builder = ir.IRBuilder(function.append_basic_block("loop"))
    after = function.append_basic_block("after")
    *sources, out, blocks = function.args
    entry.branch(builder.block)
    index = builder.phi(i64)
    index.add_incoming(i64(0), entry.block)

    def at(pointer: ir.Value, of: ir.Type) -> ir.Value:
        return builder.gep(builder.bitcast(pointer, of.as_pointer()), [index])

    lanes = [Lanes(builder, builder.load(at(x, kind), align=4), machine.target) for x in sources]
    result = formula(*lanes).value
    builder.store(result, at(out, result.type), align=4)
    following = builder.add(index, i64(1))
    index.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, blocks), builder.block, after)
    ir.IRBuilder(after).ret_void()
    return function
