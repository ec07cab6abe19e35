"""A seed and sizes -> an Mlp with random weights, for tests."""

import itertools

import numpy as np

from nncore import Layer, Mlp


def random_mlp(seed, sizes, activation="relu", last="identity", alpha=None, dtype="float32", **names):
    """
    Weights are normal with standard deviation 1 / sqrt(n_in), so that values keep their size from layer
    to layer; biases are normal, too. *alpha* goes to every layer with *activation*.
    """
    rng = np.random.default_rng(seed)
    layers = []
    for index, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        weights = rng.standard_normal((n_in, n_out)) / np.sqrt(n_in)
        bias = rng.standard_normal(n_out)
        if index + 2 == len(sizes) and last != activation:
            layers.append(Layer(weights, bias, last))
        else:
            layers.append(Layer(weights, bias, activation, alpha))
    return Mlp([layer.astype(dtype) for layer in layers], **names)


def save_scale(path, weight=2.0, n=1, labels=None):
    """Save the model y = weight * x, of *n* inputs and outputs, to *path*; make the folders on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Mlp([Layer(weight * np.eye(n, dtype=np.float32))], labels).save(path)
    return path
