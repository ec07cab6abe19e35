"""
Keras model, .keras or .h5 file -> Mlp: Sequential and functional chains of layers.

A file's architecture is JSON, its weights are arrays (`nncore.convert.keras_files`), and no code of it is
run. Lambda layers and custom objects, which stand for code, are refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.convert import expressions as ex
from nncore.convert import flow as fl
from nncore.convert import lowering
from nncore.convert.expressions import Expression
from nncore.convert.flow import ROWS, Flow, input_flow
from nncore.convert.keras_files import Config, Numbers, WeightsOf, read_file, read_model
from nncore.errors import ConversionError
from nncore.model import Mlp

_MAX_DEPTH = 16


def from_keras(
    model: Any,
    *,
    dtype: npt.DTypeLike | None = None,
    labels: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Mlp:
    """
    The model in *model*: a Keras 3 model, or the path of a .keras or .h5 file.

    dtype: "float32" or "float64"; by default float64 if any weights are, else float32.
    name: by default the file's without its suffix, or the model's own.

    Raises ConversionError, naming the layer and what is wrong with it; OSError from the disk.
    """
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        config, weights, version = read_file(path)
        name = name or path.stem
    else:
        config, weights, version = read_model(model)
        name = name or str(getattr(model, "name", "mlp"))
    reader = _Reader(weights, version)
    try:
        output = reader.model(config, None)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConversionError(f"the model's description is not understood ({what})") from None
    assert reader.input is not None
    natural = "float64" if reader.has_double else "float32"
    layers = lowering.layers_of(output.expression, natural if dtype is None else dtype)
    return Mlp(layers, labels, feature_names, name, fl.kept_shape(reader.input))


# The description


class _Reader:
    """
    Walks a model's description.

    input: the model's own, once it is known.  has_double: whether any weights are float64.
    """

    def __init__(self, weights_of: WeightsOf, version: str) -> None:
        self._weights_of = weights_of
        self._is_keras_2 = version.startswith(("1", "2"))
        self._depth = 0
        self.input: Flow | None = None
        self.has_double = False

    def model(self, config: Config, x: Flow | None) -> Flow:
        """The output of a Sequential or functional model for x; None for its own input."""
        kind = config.get("class_name")
        if kind not in ("Sequential", "Functional", "Model"):
            raise ConversionError(f"the model is a {kind}; expected a Sequential or a functional model")
        _require_keras(config)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ConversionError("models are nested too deeply")
        inner = config["config"]
        try:
            return self._sequential(inner, x) if kind == "Sequential" else self._functional(inner, x)
        finally:
            self._depth -= 1

    def _sequential(self, config: Config | Sequence[Any], x: Flow | None) -> Flow:
        layers = config if isinstance(config, list) else config["layers"]  # type: ignore[call-overload]
        for layer in layers:
            x = self._layer(layer, x)
        if x is None:
            raise ConversionError("the model has no layers")
        return x

    def _functional(self, config: Config, x: Flow | None) -> Flow:
        inputs, outputs = _names(config["input_layers"]), _names(config["output_layers"])
        if len(inputs) != 1 or len(outputs) != 1:
            raise ConversionError(
                f"the model has {len(inputs)} inputs and {len(outputs)} outputs; expected one each"
            )
        layers = {layer["config"]["name"]: layer for layer in config["layers"]}
        way: list[str] = []  # from the output back to the input
        at = outputs[0]
        while at != inputs[0]:
            if at not in layers or len(way) > len(layers):
                raise ConversionError(f"layer {at!r} is fed by no layer of the model")
            way.append(at)
            sources = list(_sources(layers[at]["inbound_nodes"]))
            if len(sources) != 1:
                kind = layers[at]["class_name"]
                raise ConversionError(
                    f"layer {at!r} ({kind}): has {len(sources)} inputs or uses; a model is a chain of layers"
                )
            at = sources[0]
        for name in [*way, inputs[0]][::-1]:
            x = self._layer(layers[name], x)
        assert x is not None
        return x

    def _layer(self, layer: Config, x: Flow | None) -> Flow:
        kind, config = str(layer["class_name"]), layer["config"]
        if kind in ("Sequential", "Functional", "Model"):
            return self.model(layer, x)
        where = f"layer {config.get('name', '?')!r} ({kind})"
        try:
            _require_keras(layer)
            if x is None or kind == "InputLayer":
                shape = _input_shape(config, layer)
                x = self._started(shape) if x is None else x
            if kind == "InputLayer":
                return x
            if kind not in _LAYERS:
                raise ConversionError("the layer is not supported")
            weights = [np.asarray(array) for array in self._weights_of(config["name"])]
            self.has_double |= any(array.dtype == np.float64 for array in weights)
            with np.errstate(all="ignore"):
                y = _LAYERS[kind](x, config, weights)
                if kind in ("Dense", "Activation"):
                    y = self._activated(y, config.get("activation"))
        except ConversionError as error:
            raise ConversionError(f"{where}: {error}") from None
        except (ValueError, OverflowError) as error:
            raise ConversionError(f"{where}: is not understood: {error}") from None
        if not y.expression.origin:
            y.expression.origin = where
        return y

    def _started(self, shape: Sequence[int | None]) -> Flow:
        self.input = input_flow(shape, "the model's input")
        return self.input

    def _activated(self, x: Flow, activation: Any) -> Flow:
        """x after an activation: a name, the description of a function, or that of a layer."""
        if isinstance(activation, Mapping):
            _require_keras(activation)
            if activation.get("class_name") in _LAYERS:
                return _LAYERS[activation["class_name"]](x, activation["config"], [])
            activation = activation.get("config")
            if isinstance(activation, Mapping):
                activation = activation.get("name")
        if activation is None:
            return x
        if activation == "hard_sigmoid" and self._is_keras_2:
            return fl.elementwise(x, ex.hard_sigmoid(x.expression, 0.2, 0.5))
        if activation in ("softmax", "log_softmax"):
            return _softmax(x, -1, activation == "log_softmax")
        if not isinstance(activation, str) or activation not in _FUNCTIONS:
            raise ConversionError(f"activation {activation!r} is not supported")
        return fl.elementwise(x, _FUNCTIONS[activation](x.expression))


def _require_keras(entry: Config) -> None:
    """Raise for what stands for code of a user's own."""
    kind = entry.get("class_name")
    if kind in ("Lambda", "__lambda__"):
        raise ConversionError("a Lambda holds code, and no code of a model is run")
    module = entry.get("module")
    is_own = module is None or str(module).split(".")[0] in ("keras", "builtins", "tensorflow", "tf_keras")
    registered = entry.get("registered_name")
    if not is_own or (isinstance(registered, str) and ">" in registered):
        raise ConversionError(f"{registered or kind} is a custom object, and no code of a model is run")


def _names(entries: Any) -> list[str]:
    """Layer names in ["a", 0, 0] or [["a", 0, 0], ...]."""
    if entries and isinstance(entries[0], str):
        return [entries[0]]
    return [str(entry[0]) for entry in entries]


def _sources(inbound: Any) -> Iterator[str]:
    """The names of the layers that feed one, of Keras 3's description or Keras 2's."""
    for node in inbound:
        if isinstance(node, Mapping):
            waiting = [node.get("args", []), node.get("kwargs", {})]
            while waiting:
                value = waiting.pop()
                if isinstance(value, Mapping) and value.get("class_name") == "__keras_tensor__":
                    yield str(value["config"]["keras_history"][0])
                elif isinstance(value, Mapping):
                    waiting += value.values()
                elif isinstance(value, list):
                    waiting += value
        else:
            yield from (str(source[0]) for source in node)


def _input_shape(config: Config, layer: Config) -> list[int | None]:
    shape = config.get("batch_shape") or config.get("batch_input_shape")
    if shape is None and "build_config" in layer:
        shape = (layer["build_config"] or {}).get("input_shape")
    if not isinstance(shape, list):
        raise ConversionError("the model does not say its input's shape; build it before it is saved")
    return [None, *shape[1:]]


# Layers: (flow, configuration, weights) -> flow


def _dense(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    expected = 2 if config.get("use_bias", True) else 1
    if len(weights) != expected or config.get("quantization_config"):
        raise ConversionError(f"has {len(weights)} arrays of weights; expected {expected}")
    y = fl.times_matrix(x, weights[0])
    return _plus(y, weights[1]) if expected == 2 else y


def _plus(x: Flow, constant: Any) -> Flow:
    x, shift = fl.with_constant(x, np.asarray(constant))
    return fl.elementwise(x, ex.scale(x.expression, 1.0, shift))


def _times(x: Flow, constant: Any) -> Flow:
    x, factor = fl.with_constant(x, np.asarray(constant))
    return fl.elementwise(x, ex.scale(x.expression, factor))


def _along(x: Flow, axis: Any, statistics: Numbers) -> Numbers:
    """Statistics of an axis, in a shape that broadcasts against x."""
    axes = axis if isinstance(axis, list) else [axis]
    if len(axes) != 1 or not isinstance(axes[0], int):
        raise ConversionError(f"works on axes {axis}")
    shape = [1] * len(x.shape)
    shape[axes[0]] = -1
    return np.asarray(statistics, np.float64).reshape(shape)


def _gain_and_shift(
    config: Config, weights: list[Numbers]
) -> tuple[Numbers | None, Numbers | None, list[Numbers]]:
    """The learned gain and shift, None for none, and the weights after them."""
    rest = list(weights)
    wanted = int(bool(config.get("scale", True))) + int(bool(config.get("center", True)))
    if len(rest) < wanted:
        raise ConversionError(f"has {len(rest)} arrays of weights")
    gain = rest.pop(0) if config.get("scale", True) else None
    shift = rest.pop(0) if config.get("center", True) else None
    return gain, shift, rest


def _batch_normalization(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    gain, shift, rest = _gain_and_shift(config, weights)
    if len(rest) != 2:
        raise ConversionError(f"has {len(weights)} arrays of weights")
    mean, variance = (np.asarray(array, np.float64) for array in rest)
    factor = (1.0 if gain is None else gain.astype(np.float64)) / np.sqrt(variance + float(config["epsilon"]))
    offset = (0.0 if shift is None else shift.astype(np.float64)) - mean * factor
    axis = config.get("axis", -1)
    return _plus(_times(x, _along(x, axis, factor)), _along(x, axis, offset))


def _layer_normalization(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    if config.get("rms_scaling"):
        raise ConversionError("scales by the root mean square")
    axis = config.get("axis", -1)
    axes = axis if isinstance(axis, list) else [axis]
    if len(axes) != 1:
        raise ConversionError(f"normalizes axes {axis}")
    fl.whole_row_axis(x, int(axes[0]))
    gain, shift, _ = _gain_and_shift(config, weights)
    y = fl.elementwise(x, ex.standardized(x.expression, float(config["epsilon"])))
    y = y if gain is None else _times(y, _along(x, axes[0], gain))
    return y if shift is None else _plus(y, _along(x, axes[0], shift))


def _normalization(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    given = [config.get("mean"), config.get("variance")]
    mean, variance = (given if given[0] is not None else weights[:2]) or (None, None)
    if mean is None or variance is None:
        raise ConversionError("has no mean and variance; call adapt first")
    axis = config.get("axis", -1)
    mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
    if axis is not None and mean.size > 1:
        mean, variance = _along(x, axis, mean.reshape(-1)), _along(x, axis, variance.reshape(-1))
    else:
        mean, variance = mean.reshape(-1), variance.reshape(-1)
    deviation = np.maximum(np.sqrt(variance), 1e-7)
    if config.get("invert"):
        return _plus(_times(x, deviation), mean)
    return _plus(_times(x, 1.0 / deviation), -mean / deviation)


def _rescaling(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    return _plus(_times(x, np.asarray(config["scale"])), np.asarray(config.get("offset", 0.0)))


def _relu(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    slope = float(config.get("negative_slope") or 0.0)
    threshold = float(config.get("threshold") or 0.0)
    most = config.get("max_value")
    if slope:
        if most is not None or threshold:
            raise ConversionError("has a slope and bounds")
        return fl.elementwise(x, ex.activated(x.expression, "leaky_relu", slope))
    if threshold:
        return fl.elementwise(x, ex.thresholded_relu(x.expression, threshold))
    return fl.elementwise(x, ex.clip(x.expression, 0.0, None if most is None else float(most)))


def _leaky_relu(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    slope = float(config.get("negative_slope", config.get("alpha", 0.3)))
    return fl.elementwise(x, ex.activated(x.expression, "leaky_relu", slope))


def _prelu(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    if len(weights) != 1:
        raise ConversionError(f"has {len(weights)} arrays of weights; expected 1")
    x, slope = fl.with_constant(x, weights[0])
    return fl.elementwise(x, ex.activated(x.expression, "prelu", slope))


def _elu(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    return fl.elementwise(x, ex.activated(x.expression, "elu", float(config.get("alpha", 1.0))))


def _softmax_layer(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    axis = config.get("axis", -1)
    if not isinstance(axis, int):
        raise ConversionError(f"works on axes {axis}")
    return _softmax(x, axis)


def _softmax(x: Flow, axis: int, log: bool = False) -> Flow:
    fl.whole_row_axis(x, axis)
    return fl.elementwise(x, ex.softmax(x.expression, log))


def _flatten(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    if config.get("data_format") == "channels_first" and len(x.shape) > 2:
        x = fl.transposed(x, [0, *range(2, len(x.shape)), 1])
    return fl.flattened(x)


def _reshape(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    return fl.reshaped(x, [ROWS, *map(int, config["target_shape"])], zero_copies=False)


def _permute(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    return fl.transposed(x, [0, *map(int, config["dims"])])


def _unchanged(x: Flow, config: Config, weights: list[Numbers]) -> Flow:
    return x


_LAYERS: dict[str, Callable[[Flow, Config, list[Numbers]], Flow]] = {
    "Dense": _dense,
    "Activation": _unchanged,  # the activation itself is the reader's part
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "PReLU": _prelu,
    "ELU": _elu,
    "Softmax": _softmax_layer,
    "BatchNormalization": _batch_normalization,
    "LayerNormalization": _layer_normalization,
    "Normalization": _normalization,
    "Rescaling": _rescaling,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": _permute,
    **dict.fromkeys(
        (
            *("Dropout", "AlphaDropout", "GaussianDropout", "GaussianNoise", "SpatialDropout1D"),
            *("ActivityRegularization", "Identity"),
        ),
        _unchanged,
    ),
}

_FUNCTIONS: dict[str, Callable[[Expression], Expression]] = {
    "linear": lambda x: x,
    **{name: ex.ELEMENTWISE[name] for name in ("relu", "relu6", "sigmoid", "tanh", "softplus", "softsign")},
    "mish": ex.ELEMENTWISE["mish"],
    "silu": lambda x: ex.activated(x, "swish"),
    "swish": lambda x: ex.activated(x, "swish"),
    "gelu": lambda x: ex.activated(x, "gelu"),
    "elu": lambda x: ex.activated(x, "elu", 1.0),
    "selu": lambda x: ex.activated(x, "selu"),
    "celu": lambda x: ex.activated(x, "celu", 1.0),
    "leaky_relu": lambda x: ex.activated(x, "leaky_relu", 0.2),
    "hard_sigmoid": lambda x: ex.activated(x, "hard_sigmoid"),
    "hard_silu": lambda x: ex.activated(x, "hard_swish"),
    "hard_swish": lambda x: ex.activated(x, "hard_swish"),
    "hard_tanh": lambda x: ex.activated(x, "hard_tanh"),
    "log_sigmoid": lambda x: ex.scale(ex.activated(ex.scale(x, -1.0), "softplus"), -1.0),
}
