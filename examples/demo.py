"""
A running server in, its accuracy and rate on the digits test set out.

    make demo                      starts a server for it
    python examples/demo.py        uses the one at NNCLIENT_TARGET or 127.0.0.1:50051

Streams the 360 held-back images of handwritten digits through the client, row batch by row
batch, many times over, and compares the labels that come back with the true ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nnclient import Client

BATCH_ROWS = 32
DURATION_S = 3.0


def main() -> None:
    with np.load(Path(__file__).parent / "digits_test.npz", allow_pickle=False) as data:
        x, truth = data["x"], data["y"].astype(str)

    with Client(os.environ.get("NNCLIENT_TARGET", "127.0.0.1:50051")) as client:
        client.wait_ready(timeout_s=30)
        batches = [x[start : start + BATCH_ROWS] for start in range(0, len(x), BATCH_ROWS)]
        answers = [answer.labels[:, 0] for answer in client.stream("digits", batches, output="labels")]
        right = int(np.sum(np.concatenate(answers) == truth))
        print(f"accuracy: {right} of {len(x)} test images right ({right / len(x):.2%})")

        def again_and_again() -> Iterator[NDArray[np.float32]]:
            while time.perf_counter() < end:
                yield from batches

        rows = 0
        start = time.perf_counter()
        end = start + DURATION_S
        for probabilities in client.stream("digits", again_and_again(), output="probabilities"):
            rows += len(probabilities)
        elapsed_s = time.perf_counter() - start
        print(f"rate: {rows / elapsed_s:,.0f} rows/s in messages of {BATCH_ROWS} rows over one stream")


if __name__ == "__main__":
    main()
