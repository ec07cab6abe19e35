"""
A model and its source -> a report: how far their answers differ on random and edge rows.

Rows come in groups of like size, and each group's differences are measured against its own largest answer: a
difference that counts for rows of about 1 must not hide behind rows of 100. One group lies where the first
layer's sums are small, as the rows of scaled data do; there a scaler that was folded into weights of too few
digits shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.errors import ConversionError
from nncore.model import Layer, Mlp

Rows = npt.NDArray[np.float64]

# Differences are roundings: sums in another order, formulas written otherwise. They reach a few hundred units
# in the last place in deep networks; what is converted wrongly differs by far more.
_TOLERANCES = {"float32": 1e-4, "float64": 1e-9}
_MOST_NUMBERS = 1 << 21
_MOST_CENTERED = 1 << 22


@dataclass(frozen=True)
class Source:
    """
    What a model was converted from, able to answer.

    name: the runtime that answers.  run: rows (rows, n_in) -> (rows, n_out).
    compares: "outputs" or "probabilities" of the converted model.
    tolerance: None for the usual one, another for sources of few digits.
    """

    name: str
    run: Callable[[Rows], npt.NDArray[Any]]
    compares: str = "outputs"
    tolerance: float | None = None


@dataclass(frozen=True)
class Report:
    """
    How a check went.

    rows: compared.  skipped: rows for which the source itself answers no finite numbers.
    difference: the largest one.  largest: the largest answer.  relative: the largest difference over the
    largest answer of its group.
    """

    source: str
    rows: int
    skipped: int
    difference: float
    largest: float
    relative: float

    def __str__(self) -> str:
        text = (
            f"checked against {self.source} on {self.rows:,} rows:"
            f" largest difference {self.difference:.2g}, of answers up to {self.largest:.3g}"
        )
        if self.skipped:
            text += f" ({self.skipped:,} rows left out, where the source overflows)"
        return text


def check(mlp: Mlp, source: Source, tolerance: float | None = None, rows: Rows | None = None) -> Report:
    """
    Compare *mlp* with *source* on random and edge rows, and on *rows* if given.

    tolerance: the largest difference allowed, over the largest answer of a group of rows.
    Raises ConversionError if they differ by more.
    """
    allowed = tolerance or source.tolerance or _TOLERANCES[str(mlp.dtype)]
    groups = list(probe_rows(mlp))
    if rows is not None and len(rows):
        groups.append(("the given rows", rows))
    count = skipped = 0
    difference = largest = relative = 0.0
    worst = ""
    for name, x in groups:
        x = x.astype(mlp.dtype).astype(np.float64)  # the source is given what the model is given
        expected = _answers(source, x, mlp)
        answer = mlp.forward(x) if source.compares == "outputs" else mlp.predict_proba(x)
        finite = np.isfinite(expected).all(axis=1)
        skipped += int((~finite).sum())
        if not finite.any():
            continue
        count += int(finite.sum())
        off = np.abs(answer[finite].astype(np.float64) - expected[finite])
        off = np.where(np.isnan(off), np.inf, off)
        top = float(np.abs(expected[finite]).max())
        share = float(off.max()) / (top or 1.0)
        difference, largest = max(difference, float(off.max())), max(largest, top)
        if share > relative:
            relative, worst = share, name
    if count == 0:
        raise ConversionError(f"{source.name} answers no finite numbers, so that nothing could be compared")
    if relative > allowed:
        advice = "; try --dtype float64" if str(mlp.dtype) == "float32" and relative < 0.1 else ""
        raise ConversionError(
            f"the converted model differs from {source.name} by {relative:.2g} of the largest answer on"
            f" {worst};"
            f" allowed is {allowed:.2g}{advice}"
        )
    return Report(source.name, count, skipped, difference, largest, relative)


def _answers(source: Source, x: Rows, mlp: Mlp) -> Rows:
    try:
        with np.errstate(all="ignore"):
            answers = np.asarray(source.run(x), np.float64).reshape(len(x), -1)
    except ConversionError:
        raise
    except Exception as error:  # whatever another library says
        raise ConversionError(f"{source.name} fails on the model: {error}") from None
    if answers.shape != (len(x), mlp.n_out):
        raise ConversionError(
            f"{source.name} answers {answers.shape[1]} numbers a row; the converted model {mlp.n_out}"
        )
    return answers


def probe_rows(mlp: Mlp, seed: int = 0) -> Iterator[tuple[str, Rows]]:
    """Groups of rows for *mlp*, each with its name: random ones, edges, and rows of small first sums."""
    rng = np.random.default_rng(seed)
    n = mlp.n_in
    many = int(max(8, min(256, _MOST_NUMBERS // n)))
    few = max(4, many // 8)
    yield "normal rows", rng.standard_normal((many, n))
    yield "rows in [0, 1]", rng.random((many, n))
    yield "rows of about 10", 10.0 * rng.standard_normal((few, n))
    yield "rows of about 0.001", 1e-3 * rng.standard_normal((few, n))
    yield "rows of one number each", np.repeat([[0.0], [1.0], [-1.0], [0.5]], n, axis=1)
    yield "rows of 100 and -100", np.repeat([[100.0], [-100.0]], n, axis=1)
    chosen = rng.choice(n, min(n, few), replace=False)
    yield "unit rows", np.eye(n)[chosen] if n <= 4096 else (np.arange(n) == chosen[:, np.newaxis]) * 1.0
    center = _center(mlp)
    if center is not None:
        middle, spread = center
        yield "rows around the first layer's middle", middle + spread * rng.standard_normal((many, n))


def _center(mlp: Mlp) -> tuple[Rows, Rows] | None:
    """A row for which the first layer's sums are small, and how far from it features may go."""
    first = mlp.layers[0]
    if not isinstance(first, Layer) or first.weights.size > _MOST_CENTERED or mlp.n_in > 2048:
        return None
    w, b = first.weights.astype(np.float64), first.bias.astype(np.float64)
    size = np.sqrt((w * w).mean(axis=1))
    spread = 1.0 / np.where(size > 0.0, size, 1.0)
    # In units of spread: features of very different size count alike.
    middle = np.linalg.lstsq((w * spread[:, np.newaxis]).T, -b, rcond=None)[0] * spread
    if not np.isfinite(middle).all() or np.abs(middle).max() > 1e30:
        return None
    return middle, np.minimum(spread, 1e30)
