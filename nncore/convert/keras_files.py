"""
.keras or .h5 file, or a live Keras model -> its description and the weights of its layers.

Read with h5py and without Keras. Whatever in an HDF5 file leads out of it is refused: external links,
external storage, virtual datasets; and so is what unpacks to far more than it holds.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nncore.convert import archives
from nncore.errors import ConversionError

Numbers = npt.NDArray[Any]
Config: TypeAlias = Mapping[str, Any]
# The variables of a layer, by its name, in their order.
WeightsOf: TypeAlias = Callable[[str], list[Numbers]]

_MAX_GROUPS = 10_000
_MAX_DEPTH = 32


def read_file(path: Path) -> tuple[Config, WeightsOf, str]:
    """The description in *path*, the weights by layer, and the version of Keras that wrote it."""
    return _read_keras(path) if _is_zip(path) else _read_h5(path)


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
                if seen > _MAX_GROUPS or inner.count("/") > _MAX_DEPTH:
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


def read_model(model: Any) -> tuple[Config, WeightsOf, str]:
    """The same of a live model."""
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
