"""
A number of calls in, of one model by eight threads at once; how many had a wrong bit out: it must be none.

    python -m support.soak                    a million calls
    python -m support.soak --calls 20000

Calls differ in where their rows begin and how many there are, and in the way in: arrays, arrays to write to,
single rows, read-only views of bytes, float64 to be rounded, and calls that helpers share.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nncore
from nncore.forward import PlainEvaluator
from support.random_models import normal

THREADS = 8
ROWS = 400
# Long enough for several blocks of rows, and for calls that let others run Python meanwhile.
MOST_ROWS = 130


def model() -> nncore.Mlp:
    """64-64-32-10 with an activation a layer, about as large as the digits model."""
    rng = np.random.default_rng(0)
    return nncore.Mlp(
        [
            nncore.Layer(normal(rng, (64, 64)) / np.float32(8), normal(rng, 64), "swish"),
            nncore.Layer(normal(rng, (64, 32)) / np.float32(8), normal(rng, 32), "tanh"),
            nncore.Layer(normal(rng, (32, 10)), normal(rng, 10), "softmax"),
        ]
    )


def wrong_calls(mlp: nncore.Mlp, calls: int) -> int:
    """How many of *calls* calls by THREADS threads at once answer other bits than the plain kernel alone."""
    x = normal(np.random.default_rng(1), (ROWS, mlp.n_in))
    expected = np.empty((ROWS, mlp.n_out), np.float32)
    layers: Any = mlp.layers
    PlainEvaluator(layers).evaluate(x, expected)
    begin = threading.Barrier(THREADS)
    shares = [calls // THREADS + (index < calls % THREADS) for index in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(lambda job: _call(mlp, x, expected, begin, *job), enumerate(shares)))


def _call(
    mlp: nncore.Mlp, x: NDArray[Any], expected: NDArray[Any], begin: threading.Barrier, seed: int, calls: int
) -> int:
    """One thread's part."""
    rng = np.random.default_rng(seed)
    out = np.empty((MOST_ROWS, mlp.n_out), np.float32)
    wrong = 0
    begin.wait()
    for start in range(0, calls, 1000):
        # Drawn a thousand at a time: the generator would be most of the work.
        count = min(1000, calls - start)
        rows = np.exp(rng.uniform(0, np.log(MOST_ROWS), count)).astype(int)
        firsts = (rng.random(count) * (ROWS - rows)).astype(int)
        ways = rng.integers(0, 64, count)
        for first, n, way in zip(firsts.tolist(), rows.tolist(), ways.tolist(), strict=True):
            part, right = x[first : first + n], expected[first : first + n]
            if way >= 12:
                y = mlp.forward(part)
            elif way >= 4:
                y = mlp.forward(part, out=out[:n])
            elif way == 3:
                y, right = mlp.forward(part[0]), right[0]
            elif way == 2:
                y = mlp.forward(np.frombuffer(part.tobytes(), np.float32).reshape(part.shape))
            elif way == 1:
                y = mlp.forward(part.astype(np.float64))
            else:
                y = mlp.forward(part, threads=2)
            wrong += y.tobytes() != right.tobytes()
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1_000_000)
    calls = parser.parse_args().calls
    started = time.perf_counter()
    wrong = wrong_calls(model(), calls)
    elapsed_s = time.perf_counter() - started
    print(f"{calls:,} calls by {THREADS} threads in {elapsed_s:.0f} s: {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
