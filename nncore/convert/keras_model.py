"""
Keras model, .keras or .h5 file -> Mlp: Sequential and functional chains of layers.

A file is read with h5py and without Keras: its architecture is JSON, its weights are arrays, and no code of
it is run. Lambda layers and custom objects, which stand for code, are refused. So is whatever in an HDF5 file
leads out of it: external links, external storage, virtual datasets.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nncore.convert import archives, lowering
from nncore.convert import expressions as ex
from nncore.convert import flow as fl
from nncore.convert.expressions import Expression
from nncore.convert.flow import ROWS, Flow, input_flow
from nncore.errors import ConversionError
from nncore.model import Mlp

Numbers = npt.NDArray[Any]
Config: TypeAlias = Mapping[str, Any]
# The variables of a layer, by its name, in their order.
WeightsOf: TypeAlias = Callable[[str], list[Numbers]]

_MAX_LAYERS = 10_000
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
        config, weights, version = _read_keras(path) if _is_zip(path) else _read_h5(path)
        name = name or path.stem
    else:
        config, weights, version = _of_live_model(model)
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
    sizes = tuple(size for size in reader.input.shape if size is not ROWS)
    return Mlp(layers, labels, feature_names, name, sizes if len(sizes) > 1 else None)


# Files


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _h5py() -> Any:
    try:
        import h5py
    except ModuleNotFoundError:
        raise ConversionError("h5py is not installed: pip install 'nnserve[keras]'") from None
    return h5py


@contextmanager
def _opened(source: Any, name: str) -> Iterator[Any]:
    """An HDF5 file, whatever goes wrong in it a ConversionError."""
    h5py = _h5py()
    try:
        with h5py.File(source, "r") as file:
            yield file
    except ConversionError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{name} is not an HDF5 file that is understood: {error}") from None


def _read_keras(path: Path) -> tuple[Config, WeightsOf, str]:
    """A .keras file: a zip archive of config.json, metadata.json and model.weights.h5."""
    with archives.opened(path) as archive:
        config = _parsed(archive.read("config.json"), "config.json")
        metadata = _parsed(archive.read("metadata.json"), "metadata.json")
        content = archive.read("model.weights.h5", archives.MAX_NUMBER_BYTES)
    by_name: dict[str, list[list[Numbers]]] = {}
    by_path: dict[str, list[Numbers]] = {}
    with _opened(io.BytesIO(content), "model.weights.h5") as file:
        for group_path, group in _groups(file):
            if group_path.endswith("/vars") or group_path == "vars":
                arrays = [_array(group, str(index)) for index in range(len(group))]
                by_path[group_path] = arrays
                layer_name = group.attrs.get("name")
                if isinstance(layer_name, str | bytes):
                    by_name.setdefault(_text(layer_name), []).append(arrays)
    if not by_name:  # older versions did not say whose a group is: they are named by class, in order
        for layer_name, group_name in _group_names(config).items():
            by_name[layer_name] = [by_path.get(f"layers/{group_name}/vars", [])]

    def weights_of(layer_name: str) -> list[Numbers]:
        found = by_name.get(layer_name, [])
        if len(found) > 1:
            raise ConversionError(f"there are {len(found)} layers of this name")
        return found[0] if found else []

    return config, weights_of, str(metadata.get("keras_version", "3"))


def _group_names(config: Config) -> dict[str, str]:
    """Layer names -> names of their groups: the class in snake case, numbered from the second on."""
    counts: dict[str, int] = {}
    names = {}
    for layer in config["config"]["layers"]:
        snake = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", str(layer["class_name"]))
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", snake).lower()
        count = counts.get(snake, 0)
        counts[snake] = count + 1
        names[str(layer["config"]["name"])] = f"{snake}_{count}" if count else snake
    return names


def _read_h5(path: Path) -> tuple[Config, WeightsOf, str]:
    """A whole model in an .h5 file: its description an attribute, its weights in groups by layer."""
    by_name: dict[str, dict[str, list[Numbers]]] = {}  # layer -> group -> arrays
    with _opened(path, path.name) as file:
        description = file.attrs.get("model_config")
        if not isinstance(description, str | bytes):
            raise ConversionError(f"{path.name} has no model_config; weights alone are not a model")
        config = _parsed(description, "model_config")
        version = _text(file.attrs.get("keras_version", "2"))
        for group_path, group in _groups(file):
            if "weight_names" not in group.attrs or group_path.count("/") != 1:
                continue
            group_name = group_path.rsplit("/", 1)[1]
            for weight_name in map(_text, group.attrs["weight_names"]):
                # A model in the model has one group for all its layers: "outer/dense/kernel".
                layer_name = ("/" + weight_name).split("/")[-2] or group_name
                arrays = by_name.setdefault(layer_name, {}).setdefault(group_name, [])
                arrays.append(_array(group, weight_name))

    def weights_of(layer_name: str) -> list[Numbers]:
        found = by_name.get(layer_name, {})
        if len(found) > 1:
            raise ConversionError(f"there are {len(found)} layers of this name")
        return next(iter(found.values()), [])

    return config, weights_of, version


def _groups(file: Any) -> Iterator[tuple[str, Any]]:
    """All groups of *file* with their paths, by hard links only, none twice."""
    h5py = _h5py()
    waiting, seen = [("", file)], 0
    while waiting:
        path, group = waiting.pop()
        for name in group:
            link = group.get(name, getlink=True)
            inner = f"{path}/{name}" if path else name
            if not isinstance(link, h5py.HardLink):
                raise ConversionError(f"the file has a link at {inner!r}; links are not followed")
            if group.get(name, getclass=True) is h5py.Group:
                seen += 1
                if seen > _MAX_LAYERS or inner.count("/") > 2 * _MAX_DEPTH:
                    raise ConversionError("the file has too many groups")
                waiting.append((inner, group[name]))
        yield path, group


def _array(group: Any, name: str) -> Numbers:
    """The dataset *name* of *group*: plain numbers that lie in the file itself."""
    h5py = _h5py()
    place = group
    for part in name.split("/"):
        if not isinstance(place, h5py.Group) or part not in place or part in ("", ".", ".."):
            raise ConversionError(f"the file lacks the weights {name!r}")
        if not isinstance(place.get(part, getlink=True), h5py.HardLink):
            raise ConversionError(f"the weights {name!r} are a link; links are not followed")
        place = place[part]
    if not isinstance(place, h5py.Dataset) or place.dtype.kind not in "fiub":
        raise ConversionError(f"the weights {name!r} are no numbers")
    if place.external or place.is_virtual:
        raise ConversionError(f"the weights {name!r} lie in another file")
    if place.nbytes > (64 << 20) and place.nbytes > 100 * place.id.get_storage_size():
        raise ConversionError(f"the weights {name!r} unpack to {place.nbytes:,} bytes")
    array: Numbers = place[()] if place.shape else np.asarray(place[()])
    return array


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _parsed(text: str | bytes, what: str) -> Config:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{what} is no JSON object")
    return value


def _of_live_model(model: Any) -> tuple[Config, WeightsOf, str]:
    if not hasattr(model, "to_json") or not hasattr(model, "layers"):
        raise ConversionError(f"{type(model).__name__} is no Keras model, and no path of one")
    try:
        config = _parsed(model.to_json(), "the model's description")
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ConversionError(f"the model does not describe itself: {error}") from None
    by_name: dict[str, list[Any]] = {}
    waiting = list(model.layers)
    while waiting:
        layer = waiting.pop()
        by_name.setdefault(layer.name, []).append(layer)
        waiting += getattr(layer, "layers", [])

    def weights_of(layer_name: str) -> list[Numbers]:
        found = by_name.get(layer_name, [])
        if len(found) != 1:
            raise ConversionError(f"there are {len(found)} layers of this name")
        return [np.asarray(array) for array in found[0].get_weights()]

    import keras

    return config, weights_of, str(keras.__version__)


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
