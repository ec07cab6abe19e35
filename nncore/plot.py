"""
Names of activations -> a figure of each with its derivative.

Needs matplotlib (`pip install 'nnserve[plot]'`). Where a curve jumps it is interrupted: a dot marks the value
at the jump, a ring the limit that is not reached.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nncore.activations import ACTIVATIONS, Activation
from nncore.errors import ArgumentError, NncoreError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")

# The same axes for all, so that shapes can be compared; wide enough for relu6's second kink.
_X_RANGE = (-5.0, 7.0)
_Y_RANGE = (-2.0, 6.5)
_POINTS = 400
_LEAST_JUMP = 1e-6
_PANEL_INCHES = (3.1, 2.75)
_LARGE_PANEL_INCHES = (4.4, 3.55)  # where one row is all
_LEGEND_INCHES = 0.6
_DPI = 160
_MOST_COLUMNS = 5

_FUNCTION_COLOR = "#1b4f9c"
_DERIVATIVE_COLOR = "#d1602b"
_GRID_COLOR = "#e7e7ea"
_AXIS_COLOR = "#b4b4bb"
_TEXT_COLOR = "#26262b"

# Where the function or its derivative may jump.
_KINKS = {
    "step": (0.0,),
    "relu": (0.0,),
    "leaky_relu": (0.0,),
    "prelu": (0.0,),
    "relu6": (0.0, 6.0),
    "selu": (0.0,),
    "hard_sigmoid": (-3.0, 3.0),
    "hard_swish": (-3.0, 3.0),
    "hard_tanh": (-1.0, 1.0),
    "thresholded_relu": (1.0,),
}

_FORMULAS = {
    "identity": "$x$",
    "step": r"$1\ \mathrm{for}\ x>0,\ \mathrm{else}\ 0$",
    "sigmoid": r"$\sigma(x)=1\,/\,(1+e^{-x})$",
    "relu": r"$\max(0,\,x)$",
    "leaky_relu": r"$x\ \mathrm{for}\ x>0,\ \mathrm{else}\ \alpha x$",
    "prelu": r"$x\ \mathrm{for}\ x>0,\ \mathrm{else}\ \alpha x$",
    "elu": r"$x\ \mathrm{for}\ x\geq 0,\ \mathrm{else}\ \alpha(e^{x}-1)$",
    "tanh": r"$(e^{x}-e^{-x})\,/\,(e^{x}+e^{-x})$",
    "swish": r"$x\,\sigma(x)$",
    "relu6": r"$\min(\max(0,\,x),\,6)$",
    "selu": r"$\lambda x\ \mathrm{for}\ x\geq 0,\ \mathrm{else}\ \lambda\alpha(e^{x}-1)$",
    "celu": r"$x\ \mathrm{for}\ x\geq 0,\ \mathrm{else}\ \alpha(e^{x/\alpha}-1)$",
    "gelu": r"$x\,\Phi(x)=\frac{1}{2}x\,(1+\mathrm{erf}(x/\sqrt{2}))$",
    "gelu_tanh": r"$\frac{1}{2}x\,(1+\tanh(\sqrt{2/\pi}\,(x+0.044715\,x^{3})))$",
    "softplus": r"$\ln(1+e^{x})$",
    "softsign": r"$x\,/\,(1+|x|)$",
    "mish": r"$x\,\tanh(\ln(1+e^{x}))$",
    "hard_sigmoid": r"$\min(\max(0,\,x/6+1/2),\,1)$",
    "hard_swish": r"$x\,\min(\max(0,\,x/6+1/2),\,1)$",
    "hard_tanh": r"$\min(\max(-1,\,x),\,1)$",
    "thresholded_relu": r"$x\ \mathrm{for}\ x>\alpha,\ \mathrm{else}\ 0$",
}


def save_figure(names: Sequence[str], path: str | Path) -> None:
    """
    Draw the activations called *names*, all if there are none, and write the figure to *path*.

    Raises ArgumentError for an unknown name or a suffix not in FORMATS, OSError if it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError(f"cannot write {path.name}: its name should end in {', '.join(FORMATS)}")
    figure = draw(names)
    import matplotlib

    # Nothing that depends on the run: the same figure gives the same file.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "nncore"}):
        figure.savefig(path, dpi=_DPI, metadata=metadata)


def draw(names: Sequence[str] = ()) -> Figure:
    """A figure of the activations called *names*, one panel each; of all if there are none."""
    for name in names:
        if name not in ACTIVATIONS:
            raise ArgumentError(f"unknown activation {name!r}; known are {', '.join(ACTIVATIONS)}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise NncoreError("matplotlib is not installed: pip install 'nnserve[plot]'") from None

    activations = [ACTIVATIONS[name] for name in names or ACTIVATIONS]
    rows, columns = _grid(len(activations))
    width, height = _PANEL_INCHES if rows > 1 else _LARGE_PANEL_INCHES
    size = (columns * width, rows * height + _LEGEND_INCHES)
    # Figure itself, not pyplot: no window, no global state.
    with matplotlib.rc_context({"mathtext.fontset": "cm"}):
        figure = Figure(figsize=size, facecolor="white", layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for panel, activation in zip(panels.flat, activations, strict=False):
            _draw_panel(panel, activation)
        for panel, above in zip(panels[-1], panels[-2] if rows > 1 else (), strict=False):
            if not panel.has_data():
                panel.set_visible(False)
                above.tick_params(labelbottom=True)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=2,
            frameon=False,
            labelcolor=_TEXT_COLOR,
            fontsize=11,
        )
    return figure


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns for *count* panels: few empty places, then few rows."""
    if count <= _MOST_COLUMNS - 2:
        return 1, count
    fitting = [(math.ceil(count / columns), columns) for columns in range(3, _MOST_COLUMNS + 1)]
    return min(fitting, key=lambda grid: (grid[0] * grid[1] - count, grid[0]))


def _draw_panel(panel: Axes, activation: Activation) -> None:
    panel.set_xlim(*_X_RANGE)
    panel.set_ylim(*_Y_RANGE)
    panel.set_aspect("equal")
    panel.set_xticks(range(-4, 7, 2))
    panel.set_yticks(range(-2, 7, 2))
    panel.tick_params(length=0, labelsize=7.5, labelcolor="#77777f", pad=2)
    panel.grid(color=_GRID_COLOR, linewidth=0.6)
    panel.set_axisbelow(True)
    for spine in panel.spines.values():
        spine.set_visible(False)
    panel.axhline(0, color=_AXIS_COLOR, linewidth=0.8)
    panel.axvline(0, color=_AXIS_COLOR, linewidth=0.8)
    alpha = "" if activation.default_alpha is None else rf"$\quad(\alpha={activation.default_alpha:g})$"
    panel.set_title(activation.name, fontsize=11, fontweight="bold", color=_TEXT_COLOR, pad=22)
    formula = _FORMULAS.get(activation.name, activation.formula)
    panel.text(
        0.5, 1.03, formula + alpha, transform=panel.transAxes, fontsize=10.5, color=_TEXT_COLOR, ha="center"
    )
    kinks = _KINKS.get(activation.name, ())
    _draw_curve(panel, activation.function, kinks, "function", _FUNCTION_COLOR, 2.0, "-")
    _draw_curve(panel, activation.derivative, kinks, "derivative", _DERIVATIVE_COLOR, 1.6, (0, (4, 2)))


def _draw_curve(
    panel: Axes,
    function: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    kinks: Sequence[float],
    label: str,
    color: str,
    width: float,
    style: Any,
) -> None:
    edges = [_X_RANGE[0], *kinks, _X_RANGE[1]]
    for start, end in itertools.pairwise(edges):
        # Up to the kinks, not onto them: a line drawn across a jump would look like a steep slope.
        x = np.linspace(np.nextafter(start, np.inf), np.nextafter(end, -np.inf), _POINTS)
        panel.plot(x, function(x), linestyle=style, color=color, linewidth=width, label=label, zorder=3)
        label = "_"  # matplotlib's word for "not in the legend"
    for kink in kinks:
        left, here, right = function(
            np.array([np.nextafter(kink, -np.inf), kink, np.nextafter(kink, np.inf)])
        )
        if abs(left - right) > _LEAST_JUMP:
            for limit in (left, right):
                if abs(limit - here) > _LEAST_JUMP:
                    panel.plot(kink, limit, "o", color=color, markerfacecolor="white", markersize=4, zorder=4)
            panel.plot(kink, here, "o", color=color, markersize=4, zorder=5)
