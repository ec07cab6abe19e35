"""
Arrays by name and a small description -> Mlp: .npz, .safetensors and PyTorch's state dicts.

The description is JSON (or a mapping), and names every array that counts:

    {
      "weights_layout": "in_out" or "out_in" (PyTorch's),
      "layers": [
        {"scale": {"factor": ..., "shift": ...}},
        {"weights": "0.weight", "bias": "0.bias", "activation": "relu"},
        {"batch_norm": {"mean": ..., "variance": ..., "gain": ..., "bias": ..., "epsilon": 1e-5}},
        {"layer_norm": {"gain": ..., "bias": ..., "epsilon": 1e-5}, "activation": "gelu"},
        {"weights": "3.weight", "activation": "softmax"}
      ],
      "labels": [...], "feature_names": [...], "input_shape": [...], "name": ..., "ignore": [...]
    }

Where an array is meant, a name, a number or a list of numbers may stand; "alpha" belongs to an activation.
Arrays that the description names nowhere are an error, lest a bias be forgotten; "ignore" lists exceptions.
Nothing is unpickled but what torch.load(weights_only=True) allows.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.activations import ACTIVATIONS
from nncore.convert import archives, lowering
from nncore.convert import expressions as ex
from nncore.convert.expressions import Expression
from nncore.errors import ConversionError
from nncore.model import LOG_SOFTMAX, SOFTMAX, Mlp

Numbers = npt.NDArray[Any]

_FIELDS = {"layers", "weights_layout", "labels", "feature_names", "input_shape", "name", "ignore"}
_KINDS: dict[str, set[str]] = {
    "weights": {"weights", "bias", "activation", "alpha"},
    "batch_norm": {"batch_norm", "activation", "alpha"},
    "layer_norm": {"layer_norm", "activation", "alpha"},
    "scale": {"scale", "activation", "alpha"},
}
_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "I8": "i1"}


def from_weights(
    source: str | os.PathLike[str] | Mapping[str, npt.ArrayLike],
    description: str | os.PathLike[str] | Mapping[str, Any],
    *,
    dtype: npt.DTypeLike | None = None,
    name: str | None = None,
) -> Mlp:
    """
    The model whose arrays are in *source* and whose layers are in *description*.

    source: the path of a .npz, .safetensors, .pt or .pth file, or arrays by name.
    description: the path of a JSON file, or what such a file holds; see the module's docstring.
    dtype: "float32" or "float64"; by default float64 if any array that counts is, else float32.
    name: by default the description's, or the file's without its suffix.

    Raises ConversionError, naming the layer and array; OSError from the disk.
    """
    said = description if isinstance(description, Mapping) else _read_description(Path(description))
    if isinstance(source, Mapping):
        arrays = {key: np.asarray(value) for key, value in source.items()}
        natural_name = "mlp"
    else:
        arrays = read_arrays(Path(source))
        natural_name = Path(source).stem
    return _Reader(arrays, said).model(dtype, name or said.get("name") or natural_name)


def _read_description(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size > archives.MAX_TEXT_BYTES:
        raise ConversionError(f"{path.name} is too large for a description")
    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(said, dict):
        raise ConversionError(f"{path.name} is no JSON object")
    return said


# Files


def read_arrays(path: Path) -> dict[str, Numbers]:
    """The arrays in *path*, by name; narrow floats as float32."""
    with open(path, "rb") as stream:
        start = stream.read(16)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not start.startswith(b"PK"):
        raise ConversionError(f"{path.name} is no .npz, .safetensors or PyTorch archive")
    with archives.opened(path) as archive:
        names = archive.names()
        if any(name.endswith("data.pkl") for name in names):
            return _read_state_dict(path)
        return {name.removesuffix(".npy"): _npy(archive, name) for name in names}


def _npy(archive: archives.Archive, name: str) -> Numbers:
    """A member of a .npz archive; objects, which would be pickles, are refused."""
    content = archive.read(name, archives.MAX_NUMBER_BYTES)
    stream = io.BytesIO(content)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        shape, is_fortran, dtype = readers[version](stream)
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise ConversionError(f"array {name!r} is no .npy file: {error}") from None
    if dtype.kind not in "fiub":
        raise ConversionError(f"array {name!r} has dtype {dtype}; expected numbers")
    rest = content[stream.tell() :]
    if len(rest) != math.prod(shape) * dtype.itemsize:
        raise ConversionError(f"array {name!r} has {len(rest)} bytes; its shape {shape} needs another number")
    return _widened(np.frombuffer(rest, dtype).reshape(shape, order="F" if is_fortran else "C"))


def is_model_file(path: Path) -> bool:
    """Whether *path* is a safetensors file that `nncore.load` is for."""
    from nncore.model_file import FORMAT

    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(length, archives.MAX_TEXT_BYTES)) if path.suffix == ".safetensors" else b""
    return f'"format":"{FORMAT}"'.encode() in header.replace(b" ", b"")


def _read_safetensors(path: Path) -> dict[str, Numbers]:
    import safetensors

    try:
        entries: Any = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ConversionError(f"{path.name} is not valid safetensors: {error}") from None
    arrays = {}
    for name, entry in entries:
        kind, shape, data = entry["dtype"], entry["shape"], entry["data"]
        if kind == "BF16":
            array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif kind in _SAFETENSORS:
            array = np.frombuffer(data, _SAFETENSORS[kind])
        else:
            raise ConversionError(f"array {name!r} has dtype {kind}, which is not supported")
        arrays[name] = _widened(array.reshape(shape))
    return arrays


def _read_state_dict(path: Path) -> dict[str, Numbers]:
    try:
        import torch
    except ModuleNotFoundError:
        raise ConversionError("torch is not installed: pip install 'nnserve[torch]'") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of unpickling, of zip files, of torch's own, which advises to unpickle all the same
        raise ConversionError(
            f"{path.name} is damaged or holds more than tensors, and nothing else is unpickled; save"
            " module.state_dict(), or the module by torch.export.save"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ConversionError(f"{path.name} is no state dict: tensors by name")
    arrays = {}
    for name, tensor in content.items():
        if tensor.is_quantized or tensor.is_complex() or tensor.is_sparse:
            raise ConversionError(f"array {name!r} is {tensor.dtype}, which is not supported")
        is_narrow = tensor.dtype in (torch.float16, torch.bfloat16)
        arrays[str(name)] = (tensor.float() if is_narrow else tensor).detach().numpy()
    return arrays


def _widened(array: Numbers) -> Numbers:
    return array.astype(np.float32) if array.dtype.kind == "f" and array.dtype.itemsize < 4 else array


# The description


class _Reader:
    """Puts layers together. used: the names of arrays that have been asked for."""

    def __init__(self, arrays: Mapping[str, Numbers], said: Mapping[str, Any]) -> None:
        self._arrays = arrays
        self._said = said
        self._used: set[str] = set()

    def model(self, dtype: npt.DTypeLike | None, name: str) -> Mlp:
        """The model."""
        said = self._said
        unknown = sorted(map(str, said.keys() - _FIELDS))
        if unknown:
            raise ConversionError(f"the description has an unknown field {unknown[0]!r}")
        if said.get("weights_layout") not in ("in_out", "out_in"):
            raise ConversionError(
                'the description needs "weights_layout": "in_out" for weights (inputs, outputs), or "out_in"'
                " for (outputs, inputs), PyTorch's"
            )
        layers = said.get("layers")
        if not isinstance(layers, list) or not layers:
            raise ConversionError("the description has no layers")
        x: Expression | None = None
        for index, layer in enumerate(layers):
            try:
                x = self._layer(layer, x)
            except ConversionError as error:
                raise ConversionError(f"layer {index} of the description: {error}") from None
            except (ValueError, TypeError, KeyError) as error:
                raise ConversionError(
                    f"layer {index} of the description: is not understood: {error}"
                ) from None
        assert x is not None
        self._require_all_used()
        used = [self._arrays[key] for key in self._used]
        natural = "float64" if any(array.dtype == np.float64 for array in used) else "float32"
        lowered = lowering.layers_of(x, natural if dtype is None else dtype)
        return Mlp(lowered, said.get("labels"), said.get("feature_names"), name, said.get("input_shape"))

    def _layer(self, layer: Any, x: Expression | None) -> Expression:
        if not isinstance(layer, Mapping):
            raise ConversionError("is no object")
        kinds = [kind for kind in _KINDS if kind in layer]
        if len(kinds) != 1:
            raise ConversionError(f"has {kinds or 'none'} of {', '.join(_KINDS)}; expected one")
        kind = kinds[0]
        unknown = sorted(map(str, layer.keys() - _KINDS[kind]))
        if unknown:
            raise ConversionError(f"has an unknown field {unknown[0]!r}")
        x = {"weights": self._dense, "batch_norm": self._batch_norm, "layer_norm": self._layer_norm}.get(
            kind, self._scale
        )(layer, x)
        return self._activated(layer, x)

    def _dense(self, layer: Mapping[str, Any], x: Expression | None) -> Expression:
        weights = self._array(layer["weights"], "weights")
        if weights.ndim != 2:
            raise ConversionError(f"weights has shape {weights.shape}; expected two axes")
        weights = weights.T if self._said["weights_layout"] == "out_in" else weights
        bias = layer.get("bias")
        x = ex.Input(weights.shape[0]) if x is None else x
        return ex.dense(x, weights, None if bias is None else self._array(bias, "bias"))

    def _batch_norm(self, layer: Mapping[str, Any], x: Expression | None) -> Expression:
        said = _section(layer["batch_norm"], {"mean", "variance", "gain", "bias", "epsilon"})
        mean, variance = self._array(said["mean"], "mean"), self._array(said["variance"], "variance")
        gain = self._array(said.get("gain", 1.0), "gain")
        shift = self._array(said.get("bias", 0.0), "bias")
        x = ex.Input(mean.size) if x is None else x
        return ex.batch_normalized(x, mean, variance, gain, shift, float(said.get("epsilon", 1e-5)))

    def _layer_norm(self, layer: Mapping[str, Any], x: Expression | None) -> Expression:
        said = _section(layer["layer_norm"], {"gain", "bias", "epsilon"})
        gain, shift = self._array(said.get("gain", 1.0), "gain"), self._array(said.get("bias", 0.0), "bias")
        x = ex.Input(gain.size) if x is None else x
        return ex.scale(ex.standardized(x, float(said.get("epsilon", 1e-5))), gain, shift)

    def _scale(self, layer: Mapping[str, Any], x: Expression | None) -> Expression:
        said = _section(layer["scale"], {"factor", "shift"})
        factor = self._array(said.get("factor", 1.0), "factor")
        shift = self._array(said.get("shift", 0.0), "shift")
        x = ex.Input(max(factor.size, shift.size)) if x is None else x
        return ex.scale(x, factor, shift)

    def _activated(self, layer: Mapping[str, Any], x: Expression) -> Expression:
        activation, alpha = layer.get("activation", "identity"), layer.get("alpha")
        if activation in (SOFTMAX, LOG_SOFTMAX):
            return ex.softmax(x, activation == LOG_SOFTMAX)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            known = ", ".join([*ACTIVATIONS, SOFTMAX, LOG_SOFTMAX])
            raise ConversionError(f"has activation {activation!r}; known are {known}")
        return ex.activated(x, activation, None if alpha is None else self._array(alpha, "alpha"))

    def _array(self, said: Any, what: str) -> Numbers:
        """What stands for an array: its name, a number or a list."""
        if not isinstance(said, str):
            return np.asarray(said, np.float32).reshape(-1)
        if said not in self._arrays:
            known = ", ".join(map(repr, list(self._arrays)[:12]))
            raise ConversionError(f"{what} is {said!r}, which is no array of the file; it has {known}")
        self._used.add(said)
        array = self._arrays[said]
        if array.dtype.kind not in "fiub":
            raise ConversionError(f"{what} {said!r} has dtype {array.dtype}; expected numbers")
        return array if what == "weights" else array.reshape(-1)

    def _require_all_used(self) -> None:
        ignored = {*self._said.get("ignore", ())}
        rest = [
            name
            for name in self._arrays
            if name not in self._used | ignored and not name.endswith("num_batches_tracked")
        ]
        if rest:
            names = ", ".join(map(repr, rest[:8]))
            raise ConversionError(f'the description does not name {names}; add what is left out to "ignore"')


def _section(said: Any, fields: set[str]) -> Mapping[str, Any]:
    if not isinstance(said, Mapping):
        raise ConversionError("is no object")
    unknown = sorted(map(str, said.keys() - fields))
    if unknown:
        raise ConversionError(f"has an unknown field {unknown[0]!r}")
    return said
