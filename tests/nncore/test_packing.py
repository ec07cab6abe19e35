"""Packed weights lie as a slow twin lays them, and a plan's descriptor says where."""

import ctypes
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import naive_float32 as naive
from support.random_models import normal, random_model

import nncore
from nncore import packing
from nncore.layers import complete_table
from nncore.packing import Plan, aligned_floats, packed_panels, padded


@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(0, 2**32 - 1))
def test_weights_are_packed_as_the_twin_packs_them(n_in, n_out, is_transposed, seed):
    """Any shape, rows or columns first: every number is in its place, and zeros behind the last output."""
    w = normal(np.random.default_rng(seed), (n_out, n_in)).T if is_transposed else None
    w = normal(np.random.default_rng(seed), (n_in, n_out)) if w is None else w
    panels = packed_panels(w)
    np.testing.assert_array_equal(panels, naive.packed(w))
    assert panels.flags.c_contiguous
    assert panels.ctypes.data % 64 == 0


@pytest.mark.parametrize("n_out", [1, 15, 16, 17, 32, 33])
def test_panels_hold_sixteen_outputs(n_out):
    """As many whole panels as are needed."""
    assert padded(n_out) == len(range(0, n_out, 16)) * 16
    assert packed_panels(np.ones((3, n_out), np.float32)).shape == (padded(n_out) // 16, 3, 16)


def test_memory_begins_at_a_cache_line():
    """However many arrays are made, and of whatever size."""
    arrays = [aligned_floats(count) for count in (1, 2, 3, 16, 17, 1000) * 10]
    assert {array.ctypes.data % 64 for array in arrays} == {0}
    assert [array.size for array in arrays[:6]] == [1, 2, 3, 16, 17, 1000]


def floats_at(address, count):
    """*count* float32 at *address*."""
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(int(address)))


@given(st.integers(0, 2**32 - 1))
def test_the_descriptor_says_where_everything_lies(seed):
    """Read back through its addresses, a plan is the model that it was made of."""
    mlp = random_model(np.random.default_rng(seed), most_width=60)
    layers: Any = mlp.layers
    plan = Plan(layers, complete_table())
    slots = plan.descriptor
    assert not slots.flags.writeable
    assert slots[packing.LAYERS] == plan.layer_count == len(mlp.layers)
    assert (slots[packing.N_IN], slots[packing.N_OUT]) == (mlp.n_in, mlp.n_out)
    assert slots[packing.TABLE] == complete_table().ctypes.data
    widths = [mlp.n_in, *(layer.n_out for layer in mlp.layers)]
    assert slots[packing.WIDEST] == max(map(padded, widths))
    for index, layer in enumerate(mlp.layers):
        here = slots[packing.HEADER_SLOTS + index * packing.LAYER_SLOTS :]
        width = padded(layer.n_out)
        assert (here[packing.LAYER_N_IN], here[packing.LAYER_N_OUT]) == (layer.n_in, layer.n_out)
        expected = naive.packed(layer.weights).ravel()
        np.testing.assert_array_equal(floats_at(here[packing.LAYER_WEIGHTS], expected.size), expected)
        behind = width - layer.n_out
        bias, alpha = (floats_at(here[slot], width) for slot in (packing.LAYER_BIAS, packing.LAYER_ALPHA))
        np.testing.assert_array_equal(bias, [*layer.bias, *[0.0] * behind])
        given_alpha = np.broadcast_to(np.float32(1.0 if layer.alpha is None else layer.alpha), layer.n_out)
        np.testing.assert_array_equal(alpha, [*given_alpha, *[1.0] * behind])
        if layer.activation in nncore.ACTIVATIONS and here[packing.LAYER_KIND] == packing.SWEPT:
            assert here[packing.LAYER_CODE] == nncore.ACTIVATIONS[layer.activation].code
        kinds = {"identity": packing.LINEAR, "relu": packing.RELU, "softmax": packing.SOFTMAX}
        assert here[packing.LAYER_KIND] == kinds.get(layer.activation, packing.SWEPT)


def test_no_two_slots_are_one():
    """The names of a descriptor's slots are different places, within what is set aside."""
    header = [packing.LAYERS, packing.WIDEST, packing.TABLE, packing.N_IN, packing.N_OUT]
    layer = [
        *(packing.LAYER_N_IN, packing.LAYER_N_OUT, packing.LAYER_KIND, packing.LAYER_CODE),
        *(packing.LAYER_WEIGHTS, packing.LAYER_BIAS, packing.LAYER_ALPHA),
    ]
    for slots, size in ((header, packing.HEADER_SLOTS), (layer, packing.LAYER_SLOTS)):
        assert all(a != b for a, b in itertools.combinations(slots, 2))
        assert 0 <= min(slots) <= max(slots) < size
