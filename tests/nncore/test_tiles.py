"""Every tile, sweep and transpose against its slow twin, bit by bit, for each kind of machine at hand."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from support import naive_float32 as naive
from support.emitted import MACHINES_HERE, Code, elementwise, guarded
from support.random_models import normal, same_bits

import nncore
from nncore import elementary
from nncore import kernel_table as kt
from nncore.tiles import CHUNK, PANEL, few_rows_tiles, many_rows_tiles

INF, NAN = np.float32(np.inf), np.float32(np.nan)
# Written around results; a kernel that touches what is not its own changes it.
MARK = np.float32(-12345.5)


def define(module, machine):
    """The functions of the kernel table, and what their twins are made of: formulas one number at a time."""
    functions: dict[Any, Any] = dict(kt._functions(module, machine.target, machine.registers))
    functions["exp"] = elementwise(module, machine, "scalar_exp", elementary.exp, 1)
    for name, activation in nncore.ACTIVATIONS.items():
        arity = 2 if activation.takes_alpha else 1
        functions[name] = elementwise(module, machine, f"scalar_{name}", activation.trace, arity)
    return functions


class Kernels:
    """The kernel table of one kind of machine."""

    def __init__(self, machine):
        self.machine = machine
        self.target = machine.target
        self.lanes = machine.target.vector_bits // 32
        self.code = Code(machine, define)

    def one_by_one(self, name, x, alpha=None):
        """The formula *name* for every number of x."""
        x = np.ascontiguousarray(x)
        y = np.empty_like(x)
        alphas = [] if alpha is None else [np.ascontiguousarray(np.broadcast_to(np.float32(alpha), x.shape))]
        self.code[name](x, *alphas, y, x.size)
        return y


@pytest.fixture(scope="module", params=MACHINES_HERE, ids=lambda machine: machine.name)
def kernels(request):
    return Kernels(request.param)


def with_specials(rng, shape, scale=1.0):
    """Normal numbers, a few of them replaced by zeros, infinities, NaN, huge and tiny ones."""
    x = normal(rng, shape) * np.float32(scale)
    special = rng.random(shape) < 0.02
    x[special] = rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-42], special.sum())
    return x


def test_the_twin_of_fma_rounds_once():
    """Against exact fractions: no float32 is nearer, and of two that are as near it is the even one."""
    rng = np.random.default_rng(0)
    x, y = normal(rng, 3000), normal(rng, 3000)
    z = np.concatenate(
        [normal(rng, 1000), -x[1000:2000] * y[1000:2000], np.exp2(rng.integers(-60, 60, 1000))]
    )
    z = z.astype(np.float32)
    # Ties: products of short numbers, to which a single bit far below, or none, is added.
    x[:500], y[:500] = 1 + np.exp2(-rng.integers(1, 13, 500)), 1 + np.exp2(-rng.integers(11, 13, 500))
    z[:500] = rng.choice([0, 1, -1], 500) * np.exp2(-rng.integers(20, 100, 500))
    for a, b, c, result in zip(x, y, z, naive.fma(x, y, z), strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        off = abs(Fraction(float(result)) - exact)
        for neighbour in (np.nextafter(result, -INF), np.nextafter(result, INF)):
            other = abs(Fraction(float(neighbour)) - exact)
            assert off < other or (off == other and result.view(np.uint32) % 2 == 0)


def test_every_many_rows_tile(kernels):
    """Each number of outputs and vectors; short and whole chunks, first and later ones, relu or not."""
    rng = np.random.default_rng(1)
    for tile in many_rows_tiles(kernels.target, kernels.machine.registers):
        run = kernels.code[kt.MANY_TILES + 4 * (tile.outputs.bit_length() - 1) + tile.vectors - 1]
        rows = tile.vectors * kernels.lanes
        counts = (1, 2, 7, CHUNK) if tile.outputs * tile.vectors in (1, 8, 24) else (1, 2, 7)
        for count in counts:
            for continues, floor in ((0, -INF), (1, np.float32(0)), (0, np.float32(0)), (256, -INF)):
                x, w = with_specials(rng, (count, rows)), normal(rng, (count, PANEL))
                first = int(rng.integers(0, PANEL - tile.outputs + 1))
                bias, before = normal(rng, tile.outputs), normal(rng, (tile.outputs, rows))
                y = guarded(before)
                at_w = guarded(w)[:, first:]
                run(guarded(x), at_w, count, guarded(bias), y, continues, at_w, floor)
                start = np.float32(0) if continues else bias
                sums = naive.chunk_sums(
                    x.T, w[:, first : first + tile.outputs], start, kernels.target.has_fma
                )
                with np.errstate(all="ignore"):
                    sums = before.T + sums if continues else sums
                assert same_bits(y.T, naive.at_least(sums, floor)), (tile.outputs, tile.vectors, count)


def test_every_few_rows_tile(kernels):
    """Each number of rows and panels; rows that are not there are filled with the last one's results."""
    rng = np.random.default_rng(2)
    for tile in few_rows_tiles(kernels.target, kernels.machine.registers):
        log2_rows, log2_panels = tile.rows.bit_length() - 1, tile.panels.bit_length() - 1
        run = kernels.code[kt.FEW_TILES + 4 * log2_rows + log2_panels]
        width = tile.panels * PANEL
        counts = (1, 2, 7, CHUNK) if tile.rows * tile.panels in (1, 8) else (1, 2, 7)
        for count in counts:
            for continues, floor in ((0, -INF), (1, np.float32(0)), (0, np.float32(0)), (256, -INF)):
                given = int(rng.integers(tile.rows // 2, tile.rows)) + 1
                x, w = with_specials(rng, (given, count + 3)), normal(rng, (tile.panels, count + 2, PANEL))
                bias, before = normal(rng, width), np.full((tile.rows, width + 5), MARK)
                before[:, :width] = normal(rng, (tile.rows, width))
                y = before.copy()
                at_x, at_w = guarded(x[:, 3:]) if given == 1 else guarded(x)[:, 3:], guarded(w)[:, 2:]
                strides = count + 3, (count + 2) * PANEL
                run(
                    *(at_x, strides[0], given - 1, at_w, strides[1], count),
                    *(guarded(bias), y, width + 5, continues, floor),
                )
                rows = x[np.minimum(np.arange(tile.rows), given - 1), 3:]
                weights = np.concatenate(list(w[:, 2:]), axis=1)
                start = np.float32(0) if continues else bias
                sums = naive.chunk_sums(rows, weights, start, kernels.target.has_fma)
                with np.errstate(all="ignore"):
                    sums = before[:, :width] + sums if continues else sums
                assert same_bits(y[:, :width], naive.at_least(sums, floor)), (tile.rows, tile.panels, count)
                assert (y[:, width:] == MARK).all()


SHAPES = [(1, 1), (1, 3), (2, 1), (5, 2), (16, 3), (31, 1)]


@pytest.mark.parametrize("name", nncore.ACTIVATIONS)
def test_every_sweep(kernels, name):
    """Vectors of rows, and vectors of outputs: the bits of the formula for one number, and of the ufunc."""
    activation = nncore.ACTIVATIONS[name]
    rng = np.random.default_rng(3)
    for count, vectors in SHAPES:
        x = with_specials(rng, (count, vectors * kernels.lanes), 8.0)
        by_feature, by_output = with_specials(rng, (count, 1)), with_specials(rng, vectors * kernels.lanes)
        for slots, alpha in ((kt.SWEEPS_MANY, by_feature), (kt.SWEEPS_FEW, by_output)):
            y = guarded(x)
            kernels.code[slots + activation.code](y, count, vectors, guarded(alpha))
            used = alpha if activation.takes_alpha else None
            assert same_bits(y, kernels.one_by_one(name, x, used)), (count, vectors)
            if kernels.target.has_fma == nncore_has_fma():
                arguments = (x,) if used is None else (x, alpha)
                assert same_bits(y, activation.function(*arguments)), (count, vectors)
            if name in naive.EXACT:
                assert same_bits(y, naive.EXACT[name](x, used)), (count, vectors)


def nncore_has_fma():
    """Whether this process's own kernels use fused multiply-add."""
    from numba.core.registry import cpu_target

    from nncore.compilation import target_of

    return target_of(cpu_target.target_context).has_fma


FEATURES = (1, 2, 3, 10, 16, 17, 33, 100)


def logits(rng, shape):
    """Rows of numbers, one with infinities, one with NaN, one with -inf alone, one far from zero."""
    x = normal(rng, shape) * np.float32(10)
    x[0] += np.float32(1e6)
    x[1 % len(x), 0] = np.inf
    x[2 % len(x)] = -np.inf
    x[3 % len(x), -1] = np.nan
    x[4 % len(x), 0] = -np.inf
    return x


def test_softmax_down_the_features(kernels):
    rng = np.random.default_rng(4)
    for features in FEATURES:
        for vectors in (1, 2, 3):
            x = logits(rng, (vectors * kernels.lanes, features))
            y = guarded(np.ascontiguousarray(x.T))
            kernels.code[kt.SOFTMAX_MANY](y, features, vectors)
            assert same_bits(y.T, naive.softmax(x, lambda d: kernels.one_by_one("exp", d))), features


def test_softmax_of_a_row(kernels):
    rng = np.random.default_rng(5)
    for features in FEATURES:
        vectors = -(-features // kernels.lanes)
        for x in logits(rng, (6, features)):
            y = np.full(vectors * kernels.lanes, NAN)
            y[:features] = x
            y = guarded(y)
            kernels.code[kt.SOFTMAX_ROW](y, features, vectors)
            twin = naive.softmax(x[None], lambda d: kernels.one_by_one("exp", d))[0]
            assert same_bits(y[:features], twin), features


def test_transpose_in(kernels):
    """Each number of rows and every remainder of features; nothing but x is read, nothing but y written."""
    rng = np.random.default_rng(6)
    for rows in range(1, kernels.lanes + 1):
        for features in range(1, 2 * kernels.lanes + 2):
            for further, stride in ((0, kernels.lanes), (3, 3 * kernels.lanes)):
                x = with_specials(rng, (rows, features + further))
                y = np.full((features, stride), MARK)
                kernels.code[kt.TRANSPOSE_IN](
                    guarded(x.ravel()[further:]), features + further, rows, features, y, stride
                )
                taken = x[np.minimum(np.arange(kernels.lanes), rows - 1), further:]
                assert same_bits(y[:, : kernels.lanes], taken.T), (rows, features)
                assert (y[:, kernels.lanes :] == MARK).all()


def test_transpose_out(kernels):
    """Each number of rows and every remainder of features; nothing but y is read, nothing but x written."""
    rng = np.random.default_rng(7)
    for rows in range(1, kernels.lanes + 1):
        for features in range(1, 2 * kernels.lanes + 2):
            for further, stride in ((0, kernels.lanes), (3, 3 * kernels.lanes)):
                y = with_specials(rng, (features, stride))
                x = guarded(np.full((rows, features + further), MARK))
                last = (features - 1) * stride + kernels.lanes
                kernels.code[kt.TRANSPOSE_OUT](
                    *(guarded(y.ravel()[:last]), stride, rows, features),
                    *(x.ravel()[further:], features + further),
                )
                assert same_bits(x[:, further:], y[:, :rows].T), (rows, features)
                assert (x[:, :further] == MARK).all()
