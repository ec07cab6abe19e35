"""
Nothing in, server/nnserver/models/primer.safetensors out: the 2-3-2-2 network of the primers.

float64, so that the server answers with the digits that the primers print: for the row (1, 0.5),
0.31682708 and 0.69627909.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import nncore

MODELS = Path(__file__).parent.parent / "server" / "nnserver" / "models"


def main() -> None:
    mlp = nncore.three_layer(
        weights=[
            [[0.1, 0.3, 0.5], [0.2, 0.4, 0.6]],
            [[0.1, 0.4], [0.2, 0.5], [0.3, 0.6]],
            [[0.1, 0.3], [0.2, 0.4]],
        ],
        biases=[[0.1, 0.2, 0.3], [0.1, 0.2], [0.1, 0.2]],
        hidden_activation="sigmoid",
        output_activation="identity",
        dtype="float64",
        name="primer",
    )
    mlp.save(MODELS / "primer.safetensors")
    print(f"{mlp!r}: forward([1, 0.5]) = {np.array2string(mlp.forward([1.0, 0.5]), precision=8)}")


if __name__ == "__main__":
    main()
