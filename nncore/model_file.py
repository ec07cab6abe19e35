"""
Mlp -> model file, and model file -> Mlp.

A model file is a safetensors file, so nothing in it is ever executed:

    tensors    layers.N.weight (n_in, n_out), layers.N.bias (n_out,), and layers.N.alpha (n_out,) where a
               layer has one alpha an output; all F32 or all F64
    metadata   format          "nnserve.mlp"
               format_version  "1", or "2" for what version 1 cannot say
               architecture    JSON: {"name": ..., "labels": [...] or null, "feature_names": [...] or null,
                               "layers": [{"n_in": ..., "n_out": ..., "activation": ..., "alpha": ...}, ...]}
               alpha is a number, null (the activation takes none), or "per_output" (it is a tensor).

Version 2 adds "input_shape" ([...] or null) to the architecture, the activation log_softmax, and to each
layer a "kind": "dense", or "layer_norm", which has an "epsilon" and the tensors layers.N.gain (n,) and
layers.N.bias (n,).
A model that needs none of them is written as version 1, which older versions read.

Nothing of the file is believed before it is checked: a file that does not hold exactly this raises
ModelFileError, which names the file and what is wrong with it.
"""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from nncore.arrays import FloatArray
from nncore.errors import ModelFileError, NncoreError
from nncore.model import LOG_SOFTMAX, AnyLayer, Layer, LayerNorm, Mlp, naming_layer

FORMAT = "nnserve.mlp"
FORMAT_VERSIONS = ("1", "2")
SUFFIX = ".safetensors"
# Room for about a million labels; a foreign file cannot make us parse more than this.
MAX_HEADER_BYTES = 16 * 1024 * 1024

_LENGTH_BYTES = 8  # the header's length, little-endian, begins the file
_PER_OUTPUT = "per_output"
_DTYPES: dict[Any, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}  # little-endian, as the format says
_ARCHITECTURE_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "labels": (list, type(None)),
    "feature_names": (list, type(None)),
    "layers": (list,),
}
_LAYER_FIELDS: dict[str, tuple[type, ...]] = {
    "n_in": (int,),
    "n_out": (int,),
    "activation": (str,),
    "alpha": (int, float, str, type(None)),
}
_ARCHITECTURE_FIELDS_2 = _ARCHITECTURE_FIELDS | {"input_shape": (list, type(None))}
_DENSE, _LAYER_NORM = "dense", "layer_norm"
# Version 2: the fields of a layer by its kind.
_LAYER_FIELDS_2: dict[str, dict[str, tuple[type, ...]]] = {
    _DENSE: _LAYER_FIELDS | {"kind": (str,)},
    _LAYER_NORM: _LAYER_FIELDS | {"kind": (str,), "epsilon": (int, float)},
}


def save(mlp: Mlp, path: str | os.PathLike[str]) -> None:
    """
    Write *mlp* to *path*.

    Atomic: readers see the old file or the new one, and a crash leaves one of them.
    Raises ModelFileError if labels and feature names are too long for a header, OSError from the disk.
    """
    tensors: dict[str, FloatArray] = {}
    for index, layer in enumerate(mlp.layers):
        if isinstance(layer, LayerNorm):
            tensors[f"layers.{index}.gain"] = layer.gain
        else:
            tensors[f"layers.{index}.weight"] = layer.weights
        tensors[f"layers.{index}.bias"] = layer.bias
        if isinstance(layer.alpha, np.ndarray):
            tensors[f"layers.{index}.alpha"] = layer.alpha
    version = _version_for(mlp)
    metadata = {
        "format": FORMAT,
        "format_version": version,
        "architecture": json.dumps(_architecture(mlp, version), ensure_ascii=False, allow_nan=False),
    }
    header = _encode_header(tensors, metadata)
    if len(header) > MAX_HEADER_BYTES:
        raise ModelFileError(
            f"labels and feature names need a header of {len(header)} bytes;"
            f" a model file may have {MAX_HEADER_BYTES}"
        )
    numbers = [np.asarray(tensor, tensor.dtype.newbyteorder("<")).data for tensor in tensors.values()]
    _replace(Path(path), [len(header).to_bytes(_LENGTH_BYTES, "little"), header, *numbers])


def load(path: str | os.PathLike[str]) -> Mlp:
    """
    Read the model in *path*. The file is not needed afterwards.

    Raises ModelFileError if the file does not hold a model, OSError if it cannot be read.
    """
    path = Path(path)
    with _naming(path), open(path, "rb") as file:
        header = _read_header(file)
        architecture = _read_architecture(header)
        tensors = _read_tensors(file, header, architecture)
        return _build(architecture, tensors)


def _version_for(mlp: Mlp) -> str:
    """The oldest version that can say what *mlp* is."""
    is_old = mlp.input_shape is None and all(isinstance(layer, Layer) for layer in mlp.layers)
    return "1" if is_old and mlp.layers[-1].activation != LOG_SOFTMAX else "2"


def _architecture(mlp: Mlp, version: str) -> dict[str, Any]:
    architecture = {
        "name": mlp.name,
        "labels": mlp.labels,
        "feature_names": mlp.feature_names,
        "layers": [_described(layer, version) for layer in mlp.layers],
    }
    return architecture if version == "1" else architecture | {"input_shape": mlp.input_shape}


def _described(layer: AnyLayer, version: str) -> dict[str, Any]:
    description = {
        "n_in": layer.n_in,
        "n_out": layer.n_out,
        "activation": layer.activation,
        "alpha": _PER_OUTPUT if isinstance(layer.alpha, np.ndarray) else layer.alpha,
    }
    if version == "1":
        return description
    if isinstance(layer, LayerNorm):
        return {"kind": _LAYER_NORM, "epsilon": layer.epsilon, **description}
    return {"kind": _DENSE, **description}


def _encode_header(tensors: Mapping[str, FloatArray], metadata: Mapping[str, str]) -> bytes:
    """
    The safetensors header of *tensors*, which follow it in their order.

    Not the library's: it writes metadata in an order that changes from run to run, where the same model
    should give the same file.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype = f"F{8 * tensor.itemsize}"
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _LENGTH_BYTES)  # keeps the numbers aligned, as the format asks


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make every error of nncore inside the block a ModelFileError that names the file."""
    try:
        yield
    except NncoreError as error:
        raise ModelFileError(f"{path.name}: {error}") from error


def _read_header(file: BinaryIO) -> dict[str, Any]:
    """The safetensors header at the start of *file*, parsed; of a bounded size."""
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        raise ModelFileError(f"has {len(prefix)} bytes; its first {_LENGTH_BYTES} should give a length")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ModelFileError(
            f"is no safetensors file, or its header is too large:"
            f" {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read"
        )
    if header_bytes > file_bytes - _LENGTH_BYTES:
        raise ModelFileError(
            f"is truncated: its header needs {header_bytes} bytes, {file_bytes - _LENGTH_BYTES} follow"
        )
    return _parse_object(file.read(header_bytes), "header")


def _read_architecture(header: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture in the metadata of *header*, its fields of the right types."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ModelFileError(f"is no model file: its metadata has no format {FORMAT!r}")
    version = metadata.get("format_version")
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(repr, FORMAT_VERSIONS))
        raise ModelFileError(f"has format version {version!r}; this nncore reads {known}")
    if not isinstance(metadata.get("architecture"), str):
        raise ModelFileError("has no architecture in its metadata")
    architecture = _parse_object(metadata["architecture"], "architecture")
    fields = _ARCHITECTURE_FIELDS if version == "1" else _ARCHITECTURE_FIELDS_2
    _require_fields(architecture, fields, "architecture")
    if not architecture["layers"]:
        raise ModelFileError("has no layers in its architecture")
    for index, layer in enumerate(architecture["layers"]):
        if not isinstance(layer, dict):
            raise ModelFileError(f"layer {index} of the architecture is no object")
        _require_fields(layer, _layer_fields(layer, version, index), f"layer {index} of the architecture")
        if version == "1" and layer["activation"] == LOG_SOFTMAX:
            raise ModelFileError(f"layer {index} has activation {LOG_SOFTMAX}, which version 1 has not")
    return architecture


def _layer_fields(layer: Mapping[str, Any], version: str, index: int) -> dict[str, tuple[type, ...]]:
    if version == "1":
        return _LAYER_FIELDS
    kind = layer.get("kind")
    if not isinstance(kind, str) or kind not in _LAYER_FIELDS_2:
        raise ModelFileError(f"layer {index} of the architecture has kind {kind!r}")
    return _LAYER_FIELDS_2[kind]


def _require_fields(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], where: str) -> None:
    """*values* has exactly the fields of *kinds*, of their types."""
    for name in sorted(values.keys() ^ kinds.keys()):
        problem = "lacks" if name in kinds else "has an unexpected"
        raise ModelFileError(f"{where} {problem} field {name!r}")
    for name, kind in kinds.items():
        # bool is an int to Python, not to us.
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise ModelFileError(f"{where} has {name} = {values[name]!r}")


def _parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object in *text*: no key twice (parsers differ on which counts), no NaN or infinity."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{what} is no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _read_tensors(
    file: BinaryIO, header: Mapping[str, Any], architecture: Mapping[str, Any]
) -> dict[str, FloatArray]:
    """The arrays in *file*: exactly those of *architecture*, in its shapes, all of one dtype."""
    expected = _tensor_shapes(architecture)
    given = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name in sorted(expected.keys() ^ given.keys()):
        raise ModelFileError(f"{'lacks' if name in expected else 'has an unexpected'} tensor {name}")
    dtypes = {name: entry.get("dtype") if isinstance(entry, dict) else None for name, entry in given.items()}
    dtype = dtypes["layers.0.bias"]
    for name, entry in given.items():
        if dtypes[name] != dtype or dtype not in [*_DTYPES]:  # a list: what a file holds may not be hashable
            raise ModelFileError(f"tensor {name} has dtype {dtypes[name]}; expected all F32 or all F64")
        if entry.get("shape") != expected[name]:
            shapes = f"{entry.get('shape')}; its architecture says {expected[name]}"
            raise ModelFileError(f"tensor {name} has shape {shapes}")
    # Before anything is read: a header that promises more than the file holds costs no memory.
    file_bytes = os.fstat(file.fileno()).st_size
    given_bytes = file_bytes - file.tell()
    number_bytes = _DTYPES[dtype].itemsize * sum(map(math.prod, expected.values()))
    if given_bytes != number_bytes:
        raise ModelFileError(f"has {given_bytes} bytes of numbers; its architecture needs {number_bytes}")
    file.seek(0)
    try:
        tensors: list[tuple[str, Any]] = safetensors.deserialize(file.read(file_bytes))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ModelFileError(f"is not valid safetensors: {error}") from None
    return {name: np.frombuffer(t["data"], _DTYPES[dtype]).reshape(t["shape"]) for name, t in tensors}


def _tensor_shapes(architecture: Mapping[str, Any]) -> dict[str, list[int]]:
    """Name and shape of every tensor that *architecture* calls for."""
    shapes: dict[str, list[int]] = {}
    for index, layer in enumerate(architecture["layers"]):
        if layer.get("kind") == _LAYER_NORM:
            shapes[f"layers.{index}.gain"] = [layer["n_in"]]
        else:
            shapes[f"layers.{index}.weight"] = [layer["n_in"], layer["n_out"]]
        shapes[f"layers.{index}.bias"] = [layer["n_out"]]
        if layer["alpha"] == _PER_OUTPUT:
            shapes[f"layers.{index}.alpha"] = [layer["n_out"]]
    return shapes


def _build(architecture: Mapping[str, Any], tensors: Mapping[str, FloatArray]) -> Mlp:
    """The model of *architecture* with the numbers of *tensors*; both are checked once more by Mlp."""
    layers: list[AnyLayer] = []
    for index, layer in enumerate(architecture["layers"]):
        alpha = tensors.get(f"layers.{index}.alpha", layer["alpha"])
        bias, activation = tensors[f"layers.{index}.bias"], layer["activation"]
        with naming_layer(index):
            if layer.get("kind") == _LAYER_NORM:
                gain = tensors[f"layers.{index}.gain"]
                layers.append(LayerNorm(gain, bias, layer["epsilon"], activation, alpha))
            else:
                layers.append(Layer(tensors[f"layers.{index}.weight"], bias, activation, alpha))
        if layer["alpha"] is None and layers[-1].alpha is not None:
            raise ModelFileError(f"layer {index} lacks the alpha of its activation {layer['activation']}")
    return Mlp(
        layers,
        architecture["labels"],
        architecture["feature_names"],
        architecture["name"],
        architecture.get("input_shape"),
    )


def _replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Put *parts* at *path*, whole or not at all, and through to the disk."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.parent / f".nncore-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:  # not tempfile's: its mode 0600 would outlive the rename
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is on disk once its folder is
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
