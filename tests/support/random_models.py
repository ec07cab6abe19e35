"""A generator of random numbers in, a random float32 model out: any depth, width, activation and alpha."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nncore


def random_model(rng: np.random.Generator, most_width: int = 300, most_depth: int = 4) -> nncore.Mlp:
    """A model of 1 to *most_depth* layers; widths are drawn evenly over their orders of magnitude."""
    depth = int(rng.integers(1, most_depth + 1))
    widths = [int(w) for w in np.exp(rng.uniform(0, np.log(most_width + 1), depth + 1))]
    layers = []
    for index, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        name = str(rng.choice(list(nncore.ACTIVATIONS)))
        if index == depth - 1 and rng.random() < 0.3:
            name = "softmax"
        alpha: Any = None
        if name != "softmax" and nncore.ACTIVATIONS[name].default_alpha is not None and rng.random() < 0.7:
            alpha = normal(rng, n_out) if rng.random() < 0.5 else float(rng.standard_normal())
        weights = normal(rng, (n_in, n_out)) * np.float32(2 / np.sqrt(n_in))
        layers.append(nncore.Layer(weights, normal(rng, n_out), name, alpha))
    return nncore.Mlp(layers)


def normal(rng: np.random.Generator, shape: Any) -> NDArray[np.float32]:
    """Normal random numbers in float32."""
    numbers: NDArray[np.float32] = rng.standard_normal(shape).astype(np.float32)
    return numbers


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two float32 arrays are equal bit for bit, but for which NaN a NaN is."""
    nan = np.isnan(a)
    return bool(
        np.array_equal(nan, np.isnan(b)) and np.array_equal(a.view(np.uint32)[~nan], b.view(np.uint32)[~nan])
    )
