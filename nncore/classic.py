"""Weights and biases, or sizes and a seed -> Mlp: the three-layer network of every primer."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nncore.errors import ArgumentError
from nncore.model import Layer, Mlp, naming_layer

_LAYER_COUNT = 3


def three_layer(
    weights: Sequence[npt.ArrayLike] | None = None,
    biases: Sequence[npt.ArrayLike] | None = None,
    *,
    sizes: Sequence[int] = (2, 3, 2, 2),
    seed: int | None = None,
    scale: float = 1.0,
    hidden_activation: str = "sigmoid",
    output_activation: str = "identity",
    dtype: npt.DTypeLike | None = None,
    labels: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    name: str = "three_layer",
) -> Mlp:
    """
    The classic network: two hidden layers and an output layer.

    weights: three arrays (n_in, n_out); biases: three arrays (n_out,), zeros if not given.
    Without weights they are drawn: independent normal numbers of mean 0 and standard deviation *scale*
    for the four *sizes* (inputs, hidden, hidden, outputs), the same for the same *seed*.
    dtype: "float32" or "float64"; by default that of the weights, and float64 for drawn ones.

    Raises ArgumentError for a wrong count, else as Layer and Mlp do, naming the layer.
    """
    if weights is None:
        if len(sizes) != _LAYER_COUNT + 1 or min(sizes) < 1:
            raise ArgumentError(f"sizes is {tuple(sizes)}; expected {_LAYER_COUNT + 1} numbers of at least 1")
        rng = np.random.default_rng(seed)
        weights = [scale * rng.standard_normal(shape) for shape in itertools.pairwise(sizes)]
    for what, arrays in (("weights", weights), ("biases", biases)):
        if arrays is not None and len(arrays) != _LAYER_COUNT:
            raise ArgumentError(f"{what} has {len(arrays)} arrays; expected {_LAYER_COUNT}")
    layers = []
    for index in range(_LAYER_COUNT):
        activation = hidden_activation if index + 1 < _LAYER_COUNT else output_activation
        with naming_layer(index):
            layer = Layer(weights[index], biases[index] if biases is not None else None, activation)
            layers.append(layer if dtype is None else layer.astype(dtype))
    return Mlp(layers, labels, feature_names, name)
