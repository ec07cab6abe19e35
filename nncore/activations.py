"""
Names -> activations: each function, its derivative, and what there is to know about it, in one table.

    ACTIVATIONS["elu"].function(x, alpha)      the ufunc, also nncore.elu; compiled or loaded when first used
    ACTIVATIONS["elu"].derivative(x, alpha)    also nncore.elu_grad
    ACTIVATIONS["elu"].second_derivative(x, alpha)

x and alpha are float32 or float64; alpha is broadcast (a number, or one for each feature) and may be left
out. The formulas themselves are in `nncore.formulas`; kernels choose among them by `nncore.switch`.
Numba is imported with the first ufunc, so that a model can be described without it.

Derivatives at kinks, and everywhere else where a function has none:

    step            0, as elsewhere                   relu'(0)         0
    leaky_relu'(0)  alpha                             prelu'(0)        alpha
    elu'(0)         1, also if alpha is not           selu'(0)         1.0507, the slope on the right
    celu'(0)        1                                 relu6'           0 at 0 and 6
    hard_tanh'      0 at -1 and 1                     hard_sigmoid'    0 at -3 and 3
    hard_swish'     0 at -3, 1 at 3                   thresholded_relu'  0 at alpha

Second derivatives are those of the side on the right at 0 of elu, selu and celu: 0. Everywhere else where a
function has none it is 0, too: at the kinks of relu, leaky_relu, prelu, relu6, hard_tanh, hard_sigmoid,
hard_swish, step and thresholded_relu, and at 0 of softsign.

Signed zeros: f(-0) = -0 for every function with f(0) = 0 but step and thresholded_relu, which give 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from nncore import formulas

if TYPE_CHECKING:
    from nncore.tracing import Formula
    from nncore.ufuncs import Ufunc

__all__ = ["ACTIVATIONS", "Activation"]


@dataclass(frozen=True)
class Activation:
    """
    One activation function.

    code: its number in kernels, stored nowhere.
    formula, derivative_formula, second_derivative_formula: as a person writes them.
    default_alpha: None if the function takes no alpha.
    kink, second_kink: what the first and the second derivative are where there is none; empty if there
    always is one.
    trace, trace_derivative, trace_second_derivative: the formulas over `nncore.lanes`, of (x) or (x, alpha).
    """

    name: str
    code: int
    formula: str
    derivative_formula: str
    trace: Formula
    trace_derivative: Formula
    second_derivative_formula: str
    trace_second_derivative: Formula
    default_alpha: float | None = None
    kink: str = ""
    second_kink: str = ""

    @property
    def takes_alpha(self) -> bool:
        """Whether the function has a parameter."""
        return self.default_alpha is not None

    @cached_property
    def function(self) -> Ufunc:
        """The ufunc."""
        doc = f"{self.name}(x) = {self.formula}"
        return self._ufunc(self.trace, self.name, doc, self.kink)

    @cached_property
    def derivative(self) -> Ufunc:
        """The ufunc of the derivative."""
        doc = f"The derivative of {self.name}: {self.derivative_formula}"
        return self._ufunc(self.trace_derivative, f"{self.name}_grad", doc, self.kink)

    @cached_property
    def second_derivative(self) -> Ufunc:
        """The ufunc of the second derivative."""
        doc = f"The second derivative of {self.name}: {self.second_derivative_formula}"
        return self._ufunc(self.trace_second_derivative, f"{self.name}_grad2", doc, self.second_kink)

    def _ufunc(self, trace: Formula, name: str, doc: str, kink: str) -> Ufunc:
        from nncore.ufuncs import Ufunc

        return Ufunc(trace, name, self._described(doc, kink), self.default_alpha)

    def _described(self, doc: str, kink: str) -> str:
        alpha = f"\n\nalpha is {self.default_alpha:g} unless given." if self.default_alpha is not None else ""
        kink = f"\n\nDerivative where there is none: {kink}." if kink else ""
        return f"{doc}.{alpha}{kink}\n\nNaN passes through; infinities give the limit."


_F = formulas
_TABLE = [
    Activation("identity", 0, "x", "1", _F.identity, _F.identity_grad, "0", _F.no_grad2),
    Activation(
        "step",
        1,
        "0 for x ≤ 0, else 1",
        "0",
        _F.step,
        _F.step_grad,
        "0",
        _F.no_grad2,
        kink="0 at 0, where the function jumps",
        second_kink="0 at 0",
    ),
    Activation(
        "relu",
        2,
        "max(0, x)",
        "1 for x > 0, else 0",
        _F.relu,
        _F.relu_grad,
        "0",
        _F.no_grad2,
        kink="0 at 0",
        second_kink="0 at 0",
    ),
    Activation(
        "leaky_relu",
        3,
        "x for x > 0, else αx",
        "1 for x > 0, else α",
        _F.prelu,
        _F.prelu_grad,
        "0",
        _F.no_grad2_with_alpha,
        default_alpha=0.01,
        kink="α at 0",
        second_kink="0 at 0",
    ),
    Activation(
        "prelu",
        4,
        "x for x > 0, else αx",
        "1 for x > 0, else α",
        _F.prelu,
        _F.prelu_grad,
        "0",
        _F.no_grad2_with_alpha,
        default_alpha=0.25,
        kink="α at 0",
        second_kink="0 at 0",
    ),
    Activation(
        "relu6",
        5,
        "min(max(0, x), 6)",
        "1 for 0 < x < 6, else 0",
        _F.relu6,
        _F.relu6_grad,
        "0",
        _F.no_grad2,
        kink="0 at 0 and 6",
        second_kink="0 at 0 and 6",
    ),
    Activation(
        "sigmoid",
        6,
        "σ(x) = 1 / (1 + e⁻ˣ)",
        "σ(x)(1 − σ(x))",
        _F.sigmoid,
        _F.sigmoid_grad,
        "σ(x)(1 − σ(x))(1 − 2σ(x))",
        _F.sigmoid_grad2,
    ),
    Activation(
        "tanh",
        7,
        "(eˣ − e⁻ˣ) / (eˣ + e⁻ˣ)",
        "1 − tanh²(x)",
        _F.tanh,
        _F.tanh_grad,
        "−2 tanh(x)(1 − tanh²(x))",
        _F.tanh_grad2,
    ),
    Activation(
        "swish",
        8,
        "x σ(x)",
        "σ(x) + x σ(x)(1 − σ(x))",
        _F.swish,
        _F.swish_grad,
        "σ(x)(1 − σ(x))(2 + x − 2x σ(x))",
        _F.swish_grad2,
    ),
    Activation(
        "elu",
        9,
        "x for x ≥ 0, else α(eˣ − 1)",
        "1 for x ≥ 0, else αeˣ",
        _F.elu,
        _F.elu_grad,
        "0 for x ≥ 0, else αeˣ",
        _F.elu_grad2,
        default_alpha=1.0,
        kink="1 at 0",
        second_kink="0 at 0",
    ),
    Activation(
        "selu",
        10,
        "λx for x ≥ 0, else λα(eˣ − 1), λ = 1.0507, α = 1.6733",
        "λ for x ≥ 0, else λαeˣ",
        _F.selu,
        _F.selu_grad,
        "0 for x ≥ 0, else λαeˣ",
        _F.selu_grad2,
        kink="λ at 0",
        second_kink="0 at 0",
    ),
    Activation(
        "celu",
        11,
        "x for x ≥ 0, else α(e^(x/α) − 1)",
        "1 for x ≥ 0, else e^(x/α)",
        _F.celu,
        _F.celu_grad,
        "0 for x ≥ 0, else e^(x/α)/α",
        _F.celu_grad2,
        second_kink="0 at 0",
        default_alpha=1.0,
    ),
    Activation(
        "gelu",
        12,
        "x Φ(x) = x (1 + erf(x/√2)) / 2",
        "Φ(x) + x φ(x), φ(x) = e^(−x²/2) / √(2π)",
        _F.gelu,
        _F.gelu_grad,
        "φ(x)(2 − x²)",
        _F.gelu_grad2,
    ),
    Activation(
        "gelu_tanh",
        13,
        "x (1 + tanh u) / 2, u = √(2/π)(x + 0.044715 x³)",
        "(1 + tanh u) / 2 + x (1 − tanh² u) u′ / 2, u′ = √(2/π)(1 + 0.134145 x²)",
        _F.gelu_tanh,
        _F.gelu_tanh_grad,
        "σ′(w)(2w′ + xw″ − x w′² tanh(w/2)), w = 2u",
        _F.gelu_tanh_grad2,
    ),
    Activation(
        "softplus",
        14,
        "ln(1 + eˣ)",
        "σ(x)",
        _F.softplus,
        _F.softplus_grad,
        "σ(x)(1 − σ(x))",
        _F.softplus_grad2,
    ),
    Activation(
        "softsign",
        15,
        "x / (1 + |x|)",
        "1 / (1 + |x|)²",
        _F.softsign,
        _F.softsign_grad,
        "−2 sign(x) / (1 + |x|)³",
        _F.softsign_grad2,
        second_kink="0 at 0",
    ),
    Activation(
        "mish",
        16,
        "x tanh(ln(1 + eˣ))",
        "tanh s + x σ(x)(1 − tanh² s), s = ln(1 + eˣ)",
        _F.mish,
        _F.mish_grad,
        "(1 − tanh² s) σ(x)(2 + x(1 − σ(x) − 2σ(x) tanh s)), s = ln(1 + eˣ)",
        _F.mish_grad2,
    ),
    Activation(
        "hard_sigmoid",
        17,
        "x/6 + 1/2, clipped to [0, 1]",
        "1/6 for −3 < x < 3, else 0",
        _F.hard_sigmoid,
        _F.hard_sigmoid_grad,
        "0",
        _F.no_grad2,
        kink="0 at −3 and 3",
        second_kink="0 at −3 and 3",
    ),
    Activation(
        "hard_swish",
        18,
        "x times (x/6 + 1/2, clipped to [0, 1])",
        "0 for x ≤ −3, x/3 + 1/2, 1 for x ≥ 3",
        _F.hard_swish,
        _F.hard_swish_grad,
        "1/3 for −3 < x < 3, else 0",
        _F.hard_swish_grad2,
        kink="0 at −3, 1 at 3",
        second_kink="0 at −3 and 3",
    ),
    Activation(
        "hard_tanh",
        19,
        "x, clipped to [−1, 1]",
        "1 for −1 < x < 1, else 0",
        _F.hard_tanh,
        _F.hard_tanh_grad,
        "0",
        _F.no_grad2,
        kink="0 at −1 and 1",
        second_kink="0 at −1 and 1",
    ),
    Activation(
        "thresholded_relu",
        20,
        "x for x > α, else 0",
        "1 for x > α, else 0",
        _F.thresholded_relu,
        _F.thresholded_relu_grad,
        "0",
        _F.no_grad2_with_alpha,
        default_alpha=1.0,
        kink="0 at α, where the function jumps",
        second_kink="0 at α",
    ),
]

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({a.name: a for a in _TABLE})
