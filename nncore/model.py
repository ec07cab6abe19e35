"""
Weights, biases and activation names -> Mlp: a checked, immutable multi-layer perceptron.

A model computes and answers in its own dtype, that of its weights (float32 or float64); inputs of any
other real dtype are converted first.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from nncore.activations import ACTIVATIONS
from nncore.arrays import (
    FloatArray,
    FloatDtype,
    as_dtype,
    first_non_finite,
    model_array,
    model_dtype,
    real_array,
)
from nncore.differentiable import Differentiable
from nncore.errors import DtypeError, ModelError, NncoreError, ShapeError

if TYPE_CHECKING:
    from nncore.segments import Evaluating

# Activations of whole rows rather than of elements; only a last layer of weights may have them.
SOFTMAX = "softmax"
LOG_SOFTMAX = "log_softmax"
ROW_ACTIVATIONS = (SOFTMAX, LOG_SOFTMAX)


@dataclass(frozen=True, init=False, eq=False)
class Layer:
    """
    One dense layer: y = activation(x @ weights + bias).

    weights: (n_in, n_out).  bias: (n_out,), zeros if not given.  Both are held as read-only copies in
    the dtype of the weights.
    activation: a name in ACTIVATIONS, or "softmax" or "log_softmax" for the last layer of a model.
    alpha: the activation's parameter: a float, one number an output (n_out,), or None for the
    activation's own default. It is rounded to the layer's dtype when used.

    Raises ShapeError, DtypeError or ModelError, naming the argument that does not fit.
    """

    weights: FloatArray
    bias: FloatArray
    activation: str
    alpha: float | FloatArray | None

    def __init__(
        self,
        weights: npt.ArrayLike,
        bias: npt.ArrayLike | None = None,
        activation: str = "identity",
        alpha: npt.ArrayLike | None = None,
    ) -> None:
        checked_weights = model_array(weights, "weights")
        if checked_weights.ndim != 2 or 0 in checked_weights.shape:
            raise ShapeError(
                f"weights has shape {checked_weights.shape}; expected (n_in, n_out), each at least 1"
            )
        _require_finite(checked_weights, "weights")
        n_out = checked_weights.shape[1]
        if bias is None:
            bias = np.zeros(n_out, checked_weights.dtype)
        hold = functools.partial(object.__setattr__, self)
        hold("weights", checked_weights)
        hold("bias", _per_output(bias, "bias", n_out, checked_weights.dtype))
        hold("activation", _known_activation(activation, ROW_ACTIVATIONS))
        hold("alpha", _checked_alpha(alpha, activation, n_out, checked_weights.dtype))

    @property
    def n_in(self) -> int:
        """Inputs of the layer."""
        return int(self.weights.shape[0])

    @property
    def n_out(self) -> int:
        """Outputs of the layer."""
        return int(self.weights.shape[1])

    @property
    def dtype(self) -> FloatDtype:
        """Element type of the weights: float32 or float64."""
        return self.weights.dtype

    @property
    def parameter_count(self) -> int:
        """Weights, biases and learned alphas: prelu's, and any that are given one an output."""
        return self.weights.size + self.bias.size + _learned_alphas(self.activation, self.alpha)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer's arrays occupy."""
        alpha_nbytes = self.alpha.nbytes if isinstance(self.alpha, np.ndarray) else 0
        return self.weights.nbytes + self.bias.nbytes + alpha_nbytes

    def astype(self, dtype: npt.DTypeLike) -> Layer:
        """The layer in *dtype*, "float32" or "float64", each number rounded once."""
        wanted = model_dtype(dtype)
        alpha = as_dtype(self.alpha, wanted) if isinstance(self.alpha, np.ndarray) else self.alpha
        return Layer(as_dtype(self.weights, wanted), as_dtype(self.bias, wanted), self.activation, alpha)

    def __repr__(self) -> str:
        alpha = ""
        if isinstance(self.alpha, np.ndarray):
            alpha = f", alpha=<{self.alpha.size} values>"
        elif self.alpha is not None:
            alpha = f", alpha={self.alpha:g}"
        return f"<Layer {self.n_in} -> {self.n_out} {self.activation}{alpha}, {self.dtype}>"

    def __reduce__(self) -> tuple[type[Layer], tuple[Any, ...]]:
        # Through the constructor: an array that is unpickled is writeable.
        return Layer, (self.weights, self.bias, self.activation, self.alpha)


@dataclass(frozen=True, init=False, eq=False)
class LayerNorm:
    """
    A layer normalization: y = activation((x - mean(x)) / sqrt(variance(x) + epsilon) * gain + bias).

    Mean and variance are those of the row; the variance is divided by n.
    gain, bias: (n,), zeros for a bias that is not given; held as read-only copies in the dtype of the gain.
    epsilon: a positive number.
    activation, alpha: as for Layer, but for the activations of whole rows.

    Raises ShapeError, DtypeError or ModelError, naming the argument that does not fit.
    """

    gain: FloatArray
    bias: FloatArray
    epsilon: float
    activation: str
    alpha: float | FloatArray | None

    def __init__(
        self,
        gain: npt.ArrayLike,
        bias: npt.ArrayLike | None = None,
        epsilon: float = 1e-5,
        activation: str = "identity",
        alpha: npt.ArrayLike | None = None,
    ) -> None:
        checked_gain = model_array(gain, "gain")
        if checked_gain.ndim != 1 or checked_gain.size == 0:
            raise ShapeError(f"gain has shape {checked_gain.shape}; expected (n,), n at least 1")
        _require_finite(checked_gain, "gain")
        n, dtype = checked_gain.size, checked_gain.dtype
        if bias is None:
            bias = np.zeros(n, dtype)
        hold = functools.partial(object.__setattr__, self)
        hold("gain", checked_gain)
        hold("bias", _per_output(bias, "bias", n, dtype, "gain"))
        hold("epsilon", _checked_epsilon(epsilon))
        hold("activation", _known_activation(activation, ()))
        hold("alpha", _checked_alpha(alpha, activation, n, dtype, "gain"))

    @property
    def n_in(self) -> int:
        """Inputs of the layer."""
        return int(self.gain.size)

    @property
    def n_out(self) -> int:
        """Outputs of the layer: as many."""
        return int(self.gain.size)

    @property
    def dtype(self) -> FloatDtype:
        """Element type of the gain: float32 or float64."""
        return self.gain.dtype

    @property
    def parameter_count(self) -> int:
        """Gains, biases and learned alphas."""
        return self.gain.size + self.bias.size + _learned_alphas(self.activation, self.alpha)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer's arrays occupy."""
        alpha_nbytes = self.alpha.nbytes if isinstance(self.alpha, np.ndarray) else 0
        return self.gain.nbytes + self.bias.nbytes + alpha_nbytes

    def astype(self, dtype: npt.DTypeLike) -> LayerNorm:
        """The layer in *dtype*, "float32" or "float64", each array rounded once; epsilon stays."""
        wanted = model_dtype(dtype)
        alpha = as_dtype(self.alpha, wanted) if isinstance(self.alpha, np.ndarray) else self.alpha
        gain, bias = as_dtype(self.gain, wanted), as_dtype(self.bias, wanted)
        return LayerNorm(gain, bias, self.epsilon, self.activation, alpha)

    def __repr__(self) -> str:
        return f"<LayerNorm {self.n_in} {self.activation}, epsilon={self.epsilon:g}, {self.dtype}>"

    def __reduce__(self) -> tuple[type[LayerNorm], tuple[Any, ...]]:
        return LayerNorm, (self.gain, self.bias, self.epsilon, self.activation, self.alpha)


AnyLayer: TypeAlias = Layer | LayerNorm


class LayerTrace(NamedTuple):
    """What one layer computed."""

    pre_activation: FloatArray
    """
    x @ weights + bias, or the normalized x: (rows, n_out), or (n_out,) for a single row.
    """
    activation: FloatArray
    """activation(pre_activation), in the same shape: the next layer's x."""


class Mlp(Differentiable):
    """
    A multi-layer perceptron.

    layers: Layer and LayerNorm, from input to output; each takes as many inputs as the one before gives,
    all of one dtype.
    labels: names of the classes, by index: one an output; two for a model with a single output.
    feature_names: names of the inputs, by index.
    name: how the model is called in messages and by a server.
    input_shape: the shape of one input before it was flattened to a row, (28, 28) say; to be told, not used.

    Immutable, and safe to be called by many threads at once. Derivatives: see `Differentiable`.
    Raises ShapeError, DtypeError or ModelError, naming the layer or label that does not fit.
    """

    layers: tuple[AnyLayer, ...]
    labels: tuple[str, ...] | None
    feature_names: tuple[str, ...] | None
    name: str
    n_in: int
    n_out: int
    dtype: FloatDtype
    class_labels: tuple[str, ...]
    """The labels; if there are none, the indices of the classes in decimal."""
    input_shape: tuple[int, ...] | None

    def __init__(
        self,
        layers: Iterable[AnyLayer],
        labels: Sequence[str] | None = None,
        feature_names: Sequence[str] | None = None,
        name: str = "mlp",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        hold = functools.partial(object.__setattr__, self)
        hold("layers", _chained(tuple(layers)))
        hold("n_in", self.layers[0].n_in)
        hold("n_out", self.layers[-1].n_out)
        hold("dtype", self.layers[0].dtype)
        hold("labels", _class_names(labels, self.n_out))
        hold("class_labels", self.labels or tuple(map(str, range(max(2, self.n_out)))))
        hold("feature_names", _names(feature_names, "feature_names", self.n_in, "inputs"))
        hold("name", _model_name(name))
        hold("input_shape", _checked_input_shape(input_shape, self.n_in))

    def __setattr__(self, attribute: str, value: object) -> None:
        raise AttributeError(f"{attribute} cannot be set: an Mlp is immutable; build a new one")

    @property
    def parameter_count(self) -> int:
        """Weights, biases and learned alphas of all layers."""
        return sum(layer.parameter_count for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes that the layers' arrays occupy."""
        return sum(layer.nbytes for layer in self.layers)

    def astype(self, dtype: npt.DTypeLike) -> Mlp:
        """The model in *dtype*, "float32" or "float64", each number rounded once."""
        layers = [layer.astype(dtype) for layer in self.layers]
        return Mlp(layers, self.labels, self.feature_names, self.name, self.input_shape)

    def forward(self, x: npt.ArrayLike, out: FloatArray | None = None, threads: int = 1) -> FloatArray:
        """
        Evaluate the model on the rows of *x*.

        x: (rows, n_in) real numbers, or (n_in,) for a single row; rows may be 0.
        out: where to write; (rows, n_out) or (n_out,), own dtype, C-contiguous, no memory shared with x.
        threads: share the work among up to so many threads; see `threads_for`. No bit depends on it.
        Returns (rows, n_out) or (n_out,) in the model's dtype: *out* if it was given.
        Raises ShapeError or DtypeError, saying what was expected.
        """
        if threads == 1:
            answer = self._evaluator.evaluate_at_once(x, out)
            if answer is not None:
                return answer
        inputs = self._checked_rows(x, self.n_in, "inputs")
        result = self._destination(inputs, out, "inputs")
        self._evaluator.evaluate(inputs.reshape(-1, self.n_in), result.reshape(-1, self.n_out), threads)
        return result

    __call__ = forward

    def threads_for(self, rows: int) -> int:
        """
        How many threads pay for a batch of *rows* rows, on the cores that this process may use.

        1 where waking a thread (about 100 us) costs more than it saves.
        """
        return self._evaluator.threads_for(rows)

    def trace(self, x: npt.ArrayLike) -> tuple[LayerTrace, ...]:
        """
        Every layer's pre-activation and activation on the rows of *x*, from input to output.

        The last activation has the bits that forward() answers. Costs two forward passes.
        """
        traces = []
        inputs = self._checked_rows(x, self.n_in, "inputs")
        for layer in self.layers:
            linear: AnyLayer
            if isinstance(layer, LayerNorm):
                linear = LayerNorm(layer.gain, layer.bias, layer.epsilon)
            else:
                linear = Layer(layer.weights, layer.bias)
            traces.append(LayerTrace(Mlp([linear]).forward(inputs), Mlp([layer]).forward(inputs)))
            inputs = traces[-1].activation
        return tuple(traces)

    def predict_proba(self, x: npt.ArrayLike) -> FloatArray:
        """Probabilities for the rows of *x*: probabilities_from(forward(x))."""
        return self.probabilities_from(self.forward(x))

    def probabilities_from(self, outputs: npt.ArrayLike, out: FloatArray | None = None) -> FloatArray:
        """
        The model's *outputs*, (rows, n_out) or (n_out,), as probabilities of the same shape.

        Outputs of a last layer with softmax or sigmoid are probabilities already and are passed on as they
        are; a single output is a logit and goes through sigmoid; several go through softmax, row by row.
        out: where to write; may be *outputs* itself.
        """
        from nncore import classification

        checked = self._checked_rows(outputs, self.n_out, "outputs")
        if out is not None and out is not checked:
            out = self._destination(checked, out, "outputs")
        return classification.probabilities(self.layers[-1].activation, checked, out)

    def top_labels_from(self, outputs: npt.ArrayLike, k: int = 1) -> tuple[npt.NDArray[np.int32], FloatArray]:
        """
        The *k* most probable classes of each row of the model's *outputs*.

        outputs: (rows, n_out) or (n_out,).  k: in [1, number of classes].
        Returns the classes' indices (rows, k) int32 and their probabilities (rows, k) in the model's dtype,
        or (k,) each for a single row; by descending probability, ties by lower index, NaN last. A model
        with a single output p has the two classes [1 - p, p].
        Raises ArgumentError if k is out of range.
        """
        from nncore import classification

        return classification.top_classes(self.probabilities_from(outputs), k)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to *path*, as nncore.load reads it; a file of that name is replaced atomically."""
        from nncore import model_file

        model_file.save(self, path)

    def __repr__(self) -> str:
        shape = "-".join(str(n) for n in (self.n_in, *(layer.n_out for layer in self.layers)))
        activations = ", ".join(layer.activation for layer in self.layers)
        return f"<Mlp '{self.name}' {shape} ({activations}), {self.dtype}, {self.parameter_count} parameters>"

    def __reduce__(self) -> tuple[type[Mlp], tuple[Any, ...]]:
        return Mlp, (self.layers, self.labels, self.feature_names, self.name, self.input_shape)

    @functools.cached_property
    def _evaluator(self) -> Evaluating:
        # Imported when first needed: it brings in Numba, which describing a model does not need.
        from nncore import segments

        return segments.evaluator_of(self.layers)

    def _checked_rows(self, values: npt.ArrayLike, width: int, what: str) -> FloatArray:
        """*values* as (rows, width) or (width,) in the model's dtype, C-contiguous."""
        array = real_array(values, what)
        if array.ndim not in (1, 2) or array.shape[-1] != width:
            raise ShapeError(
                f"{what} has shape {array.shape}; model '{self.name}' expects (rows, {width}) or ({width},)"
            )
        return as_dtype(array, self.dtype)

    def _destination(self, source: FloatArray, out: FloatArray | None, source_name: str) -> FloatArray:
        """*out*, checked against *source*, or a new array."""
        shape = (*source.shape[:-1], self.n_out)
        if out is None:
            return np.empty(shape, self.dtype)
        if not isinstance(out, np.ndarray) or out.dtype != self.dtype:
            kind = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
            raise DtypeError(f"out is {kind}; model '{self.name}' writes a {self.dtype} array")
        if out.shape != shape:
            raise ShapeError(f"out has shape {out.shape}; expected {shape}")
        if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
            raise ShapeError("out must be C-contiguous, aligned and writeable")
        if np.may_share_memory(source, out):  # exact: both are contiguous
            raise ShapeError(f"out shares memory with {source_name}")
        return out


@contextlib.contextmanager
def naming_layer(index: int) -> Iterator[None]:
    """Prefix every error of nncore inside the block with the layer it is about."""
    try:
        yield
    except NncoreError as error:
        raise type(error)(f"layer {index}: {error}") from error


def _require_finite(array: FloatArray, what: str) -> None:
    culprit = first_non_finite(array)
    if culprit:
        raise ModelError(f"{what}{culprit}; every number of a model must be finite")


def _learned_alphas(activation: str, alpha: float | FloatArray | None) -> int:
    if isinstance(alpha, np.ndarray):
        return alpha.size
    return 1 if activation == "prelu" else 0


def _checked_epsilon(epsilon: Any) -> float:
    is_number = isinstance(epsilon, int | float | np.number) and not isinstance(epsilon, bool)
    if not is_number or not 0.0 < float(epsilon) < math.inf:
        raise ModelError(f"epsilon is {epsilon!r}; expected a positive number")
    return float(epsilon)


def _checked_input_shape(shape: Sequence[int] | None, n_in: int) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes = tuple(shape)
    if not sizes or any(type(size) is not int or size < 1 for size in sizes) or math.prod(sizes) != n_in:
        raise ModelError(
            f"input_shape is {sizes}; expected sizes whose product is the number of inputs, {n_in}"
        )
    return sizes


def _per_output(
    values: npt.ArrayLike, what: str, n_out: int, dtype: FloatDtype, beside: str = "weights"
) -> FloatArray:
    """*values* as a finite (n_out,) array in *dtype*, which the argument *beside* has."""
    given_dtype = getattr(values, "dtype", None)
    array = model_array(values, what)
    # Lists and integers adapt to the weights; a float array of another type is more likely a mistake.
    if isinstance(given_dtype, np.dtype) and given_dtype.kind == "f" and array.dtype != dtype:
        raise DtypeError(f"{what} is {given_dtype} but {beside} is {dtype}; expected the same dtype")
    if array.shape != (n_out,):
        raise ShapeError(f"{what} has shape {array.shape}; expected {(n_out,)}, one an output")
    array = as_dtype(array, dtype)
    array.flags.writeable = False
    _require_finite(array, what)
    return array


def _known_activation(name: str, also: Sequence[str]) -> str:
    if isinstance(name, str) and (name in ACTIVATIONS or name in also):
        return name
    raise ModelError(f"unknown activation {name!r}; known are {', '.join([*ACTIVATIONS, *also])}")


def _checked_alpha(
    alpha: npt.ArrayLike | None, activation: str, n_out: int, dtype: FloatDtype, beside: str = "weights"
) -> float | FloatArray | None:
    default = None if activation in ROW_ACTIVATIONS else ACTIVATIONS[activation].default_alpha
    if alpha is None:
        return default
    if default is None:
        raise ModelError(f"activation {activation} takes no alpha")
    array = real_array(alpha, "alpha")
    if array.ndim > 0:
        return _per_output(alpha, "alpha", n_out, dtype, beside)
    value = float(array)
    if not np.isfinite(as_dtype(array, dtype)):
        raise ModelError(f"alpha is {value}; expected a number that is finite in {dtype}")
    return value


def _chained(layers: tuple[AnyLayer, ...]) -> tuple[AnyLayer, ...]:
    """*layers*, each of which takes what the one before gives."""
    if not layers:
        raise ModelError("a model needs at least one layer")
    for index, layer in enumerate(layers):
        if not isinstance(layer, Layer | LayerNorm):
            raise ModelError(f"layer {index} is a {type(layer).__name__}; expected a Layer or LayerNorm")
        if layer.dtype != layers[0].dtype:
            raise DtypeError(f"layer {index} is {layer.dtype} but layer 0 is {layers[0].dtype}")
        if layer.activation in ROW_ACTIVATIONS and index + 1 < len(layers):
            raise ModelError(
                f"layer {index} has activation {layer.activation}, which only the last layer may have"
            )
        given = layers[index - 1].n_out if index else layer.n_in
        if layer.n_in != given:
            raise ShapeError(f"layer {index} takes {layer.n_in} inputs but layer {index - 1} gives {given}")
    return layers


def _class_names(labels: Sequence[str] | None, n_out: int) -> tuple[str, ...] | None:
    whose = "classes of a single output" if n_out == 1 else "outputs"
    names = _names(labels, "labels", max(2, n_out), whose)
    first_at: dict[str, int] = {}
    for index, label in enumerate(names or ()):
        if first_at.setdefault(label, index) != index:
            raise ModelError(f"labels[{index}] repeats labels[{first_at[label]}]: {label!r}")
    return names


def _names(values: Sequence[str] | None, what: str, count: int, of_what: str) -> tuple[str, ...] | None:
    if values is None:
        return None
    if isinstance(values, str):
        raise ModelError(f"{what} is one string; expected a sequence of strings")
    names = tuple(values)
    if len(names) != count:
        raise ModelError(f"{what} has {len(names)} entries; the model has {count} {of_what}")
    return tuple(_text(name, f"{what}[{index}]") for index, name in enumerate(names))


def _model_name(name: str) -> str:
    name = _text(name, "name")
    if not name or not name.isprintable():
        raise ModelError(f"name is {name!r}; expected printable text")
    return name


def _text(value: object, what: str) -> str:
    """*value* as a plain str (np.str_ is one, too) that UTF-8 can carry."""
    if not isinstance(value, str):
        raise ModelError(f"{what} is {value!r}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ModelError(f"{what} is {value!r}, which is not valid Unicode") from None
    return str(value)
