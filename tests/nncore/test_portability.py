"""Every kind of machine: right bits, cold and from the cache, if it can be run here; right instructions."""

import functools
import platform
import re
from typing import Any

import llvmlite.binding as llvm
import numba
import pytest
from llvmlite import ir
from numba.core import types
from support import processes
from support.emitted import MACHINES, Machine, assembly_and_object, module_for

import nncore
from nncore import compilation, derivative_schedule, schedule
from nncore import kernel_table as kt
from nncore.slopes import slope_functions
from nncore.ufuncs import _Loop

# Models of activations that round at most once against a twin in NumPy, bit by bit; any models, functions,
# batches and numbers of threads against each other, and as a hash for other processes to compare.
CHECK = """
import hashlib, sys
import numpy as np
import nncore
from numba.core.registry import cpu_target
from nncore import kernel_table
from nncore.compilation import target_of
from nncore.layers import complete_table
from support import naive_float32 as naive
from support.random_models import normal, random_model, same_bits

target = target_of(cpu_target.target_context)
rng = np.random.default_rng(0)
for n_in, n_out in ((1, 1), (3, 17), (16, 16), (64, 5), (255, 33), (256, 8), (257, 40), (600, 70)):
    name, last = rng.choice(list(naive.EXACT), 2)
    hidden = nncore.Layer(normal(rng, (n_in, n_out)), normal(rng, n_out), name)
    mlp = nncore.Mlp([hidden, nncore.Layer(normal(rng, (n_out, 7)), normal(rng, 7), last)])
    x = normal(rng, (230, n_in))
    y = naive.forward(mlp, x, target.has_fma)
    for rows in (1, 2, 3, 5, 8, 9, 17, 48, 49, 230):
        assert same_bits(mlp.forward(x[:rows]), y[:rows]), (mlp, rows)
    assert same_bits(mlp.forward(x, threads=2), y), mlp
    assert same_bits(mlp.forward(x[:40], threads=2), y[:40]), mlp

digest = hashlib.sha256()
for _ in range(100):
    mlp = random_model(rng, most_width=200)
    x = normal(rng, (int(rng.integers(1, 120)), mlp.n_in))
    y = mlp.forward(x)
    assert same_bits(mlp.forward(x, threads=2), y), mlp
    assert same_bits(np.concatenate([mlp.forward(row[None]) for row in x[-9:]]), y[-9:]), mlp
    for numbers in (y, nncore.softmax(y), mlp.jacobian(x[:20]), mlp.jvp(x, x), mlp.vjp(x, y)):
        digest.update(np.where(np.isnan(numbers), np.float32(7), numbers).tobytes())
# A function of its own has the bits that it has in a layer.
x = normal(rng, (300, 3)) * np.float32(4)
y = nncore.Mlp([nncore.Layer(np.eye(3, dtype=np.float32), None, "gelu")]).forward(x)
assert same_bits(y, nncore.gelu(x))
# The vectors of the code that was run, which must be those that were asked for.
print(32 * complete_table()[kernel_table.LANES], target.has_fma, digest.hexdigest())
"""

# Settings: the vectors' width, whether there is fused multiply-add. NUMBA_CPU_* is Numba's.
NO_FMA = {"NUMBA_CPU_NAME": "x86-64"}
FORCED = {
    (512, True): {"NNCORE_VECTOR_BITS": "512"},
    (256, True): {"NNCORE_VECTOR_BITS": "256"},
    (128, True): {"NNCORE_VECTOR_BITS": "128"},
    (256, False): NO_FMA | {"NUMBA_CPU_FEATURES": "+avx,+avx2"},
    (128, False): NO_FMA | {"NUMBA_CPU_FEATURES": "+sse2"},
}


def can_be_forced(bits, has_fma):
    here = llvm.get_host_cpu_features()
    if platform.machine() not in ("x86_64", "AMD64"):
        return (bits, has_fma) == (128, True)
    return here.get({512: "avx512f", 256: "avx2", 128: "sse2"}[bits], False) and (
        not has_fma or here.get("fma", False)
    )


def test_every_kind_of_vector_has_its_bits_cold_and_from_the_cache(tmp_path):
    """
    One cache for all, in which each finds its own code only: compiled in a first process, loaded in a second.

    With fused multiply-add all widths have the same bits; without, all widths have the same others.
    """
    kinds = [kind for kind in FORCED if can_be_forced(*kind)]
    digests: dict[bool, set[str]] = {True: set(), False: set()}
    filled = None
    for _ in ("cold", "warm"):
        # Two at a time: most machines have a second core.
        for pair in (kinds[i : i + 2] for i in range(0, len(kinds), 2)):
            running = [processes.start(CHECK, tmp_path, **FORCED[kind]) for kind in pair]
            for (bits, has_fma), process in zip(pair, running, strict=True):
                *found, digest = processes.finish(process).split()
                assert found == [str(bits), str(has_fma)]
                digests[has_fma].add(digest)
        filled = filled or processes.files(tmp_path)
    assert processes.files(tmp_path) == filled
    assert [len(found) for found in digests.values()] == [
        len({has_fma for _, has_fma in kinds if has_fma}),
        len({has_fma for _, has_fma in kinds if not has_fma}),
    ]


# Machines that need not be at hand


def table(module: ir.Module, machine: Machine) -> dict[int, ir.Function]:
    """The kernel table, and that of derivatives."""
    functions = kt._functions(module, machine.target, machine.registers)
    return functions | {-1 - slot: f for slot, f in slope_functions(module, machine.target).items()}


def loops(module: ir.Module, machine: Machine, element: ir.Type) -> dict[str, ir.Function]:
    """The loops of all ufuncs for numbers of the type *element*."""
    functions: dict[str, ir.Function] = {}
    byte = ir.IntType(8).as_pointer()
    for activation in nncore.ACTIVATIONS.values():
        for trace, suffix in ((activation.trace, ""), (activation.trace_derivative, "_grad")):
            name = f"loop_{activation.name}{suffix}"
            function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte, byte, byte]), name)
            builder = ir.IRBuilder(function.append_basic_block("entry"))
            arity = 2 if activation.takes_alpha else 1
            _Loop(builder, machine.target, trace, element, arity).emit(*function.args)
            builder.ret_void()
            functions[name] = function
    return functions


def called(text: str) -> set[str]:
    """The functions that assembly *text* calls."""
    return set(re.findall(r"\t(?:callq?|bl)\t(\w+)", text))


# machine: instructions that its code must have, and must not have. %zmm and %ymm are 512 and 256 bits.
INSTRUCTIONS = {
    "AVX-512": (r"vfmadd\w+ps\t.*%zmm", r"%[xyz]mm3[2-9]"),
    "AVX-512, 256 bits forced": (r"vfmadd\w+ps\t.*%ymm", r"vfmadd\w+ps\t.*%zmm"),
    "AVX2": (r"vfmadd\w+ps\t.*%ymm", r"%zmm"),
    "AVX2, 128 bits forced": (r"vfmadd\w+ps\t.*%xmm", r"vfmadd\w+ps\t.*%ymm|%zmm"),
    "AVX2 without FMA": (r"vmulps\t.*%ymm", r"vfn?m(add|sub)|%zmm"),
    "SSE2": (r"mulps\t.*%xmm", r"\tv\w+ps|%[yz]mm|pshufb|blendv|pinsr[dq]|roundps|dpps"),
    "AArch64": (r"fmla\tv\d+\.4s, v\d+\.4s, v\d+\.(4s|s\[\d\])", r"%[xyz]mm"),
}


# ELF's numbers of processors.
PROCESSORS = {"x86_64": 62, "aarch64": 183}


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_the_kernels_are_code_of_their_machine(machine):
    """They use its vectors and fused multiply-add, nothing that it lacks, and call nobody but memset."""
    text, code = assembly_and_object(machine, table)
    wanted, unwanted = INSTRUCTIONS[machine.name]
    assert len(re.findall(wanted, text)) > 100
    assert re.findall(f"^.*(?:{unwanted}).*$", text, re.MULTILINE) == []
    assert called(text) <= {"memset", "memcpy"}
    assert code.startswith(b"\x7fELF")
    assert int.from_bytes(code[18:20], "little") == PROCESSORS[machine.triple.split("-")[0]]


AARCH64 = next(machine for machine in MACHINES if machine.name == "AArch64")


@pytest.mark.parametrize("element", [ir.FloatType(), ir.DoubleType()], ids=["float32", "float64"])
def test_the_ufuncs_are_code_of_aarch64(element):
    """They use its fused multiply-add and keep its status; float64 gelu alone calls the C library."""
    text, _ = assembly_and_object(AARCH64, lambda module, machine: loops(module, machine, element))
    lanes = "4s" if element == ir.FloatType() else "2d"
    assert len(re.findall(rf"fmla\tv\d+\.{lanes}", text)) > 100
    assert text.count("msr\tFPSR") == text.count("mrs\tx") == 2 * len(nncore.ACTIVATIONS)
    assert called(text) <= (
        {"memset", "memcpy"} if element == ir.FloatType() else {"memset", "memcpy", "erfc"}
    )


@functools.cache
def drivers() -> list[str]:
    """The LLVM code of what Python calls, as Numba makes it for the machine at hand."""
    texts = []
    compiler: Any = numba.njit
    entries: list[tuple[Any, int]] = [
        (schedule.forward_parts, 2),
        (schedule.forward_addresses, 4),
        (derivative_schedule.derive_addresses, 9),
    ]
    for entry, arguments in entries:
        driver: Any = compiler(**compilation._OPTIONS)(entry.py_func)
        driver.compile((types.int64,) * arguments)
        texts.append(driver.inspect_llvm(driver.signatures[0]))
    return texts


def test_no_code_for_aarch64_names_an_intrinsic_of_x86():
    """Neither the kernels nor the drivers that call them: these but for a pause, on x86-64 only."""
    module = module_for(AARCH64)
    table(module, AARCH64)
    assert "llvm.x86" not in str(module)

    target_machine = llvm.Target.from_triple(AARCH64.triple).create_target_machine(features="+neon")
    for text in drivers():
        text = re.sub(r"^.*@llvm\.x86\.sse2\.pause.*$", "", text, flags=re.MULTILINE)
        assert "llvm.x86" not in text
        # Given to AArch64, the code of this machine must compile all the same.
        text = re.sub(r"^target .*$", "", text, flags=re.MULTILINE)
        code = target_machine.emit_object(llvm.parse_assembly(text))
        assert int.from_bytes(code[18:20], "little") == PROCESSORS["aarch64"]


def test_addresses_are_made_of_numbers_in_one_place_only():
    """
    inttoptr stands in functions of its own, with no addition beside it.

    Where LLVM sees inttoptr(base + offset) it may take the offset for the base: code that was loaded from the
    cache, and so optimised once more, has read from wrong places.
    """
    for text in drivers():
        functions = re.findall(r"^define .*?^}", text, re.MULTILINE | re.DOTALL)
        makers = [function for function in functions if "inttoptr" in function]
        assert makers
        for function in makers:
            assert re.match(r"define .*@nncore_(slots|floats)_from\(", function)
            assert not re.search(r"\b(add|sub|mul|shl|or|getelementptr)\b", function)
