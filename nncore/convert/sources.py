"""
A file -> what kind of model it is, the Mlp, and the source that can be asked the same questions.

The kind is known by the name's ending, or else by how the file begins. A source answers by the library that
its format comes from, where that is installed, and never by running code of the file; but a pickle of
scikit-learn is code, and is read only where the name says so, with a warning.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.convert.verification import Rows, Source
from nncore.errors import ConversionError
from nncore.model import Mlp

# Kind -> as messages call it.
KINDS = {
    "onnx": "ONNX",
    "pt2": "PyTorch program",
    "keras": "Keras",
    "tflite": "TFLite",
    "weights": "weights with a description",
    "sklearn": "pickled scikit-learn estimator",
}
_ENDINGS = {
    **{".onnx": "onnx", ".pt2": "pt2", ".keras": "keras", ".h5": "keras", ".hdf5": "keras"},
    **dict.fromkeys((".npz", ".safetensors", ".pt", ".pth"), "weights"),
    **dict.fromkeys((".pkl", ".pickle", ".joblib"), "sklearn"),
    ".tflite": "tflite",
}


@dataclass(frozen=True)
class Options:
    """What the user says about a source; None for what the source says itself."""

    dtype: str | None = None
    name: str | None = None
    labels: tuple[str, ...] | None = None
    feature_names: tuple[str, ...] | None = None
    output: str | None = None
    description: Path | None = None


@dataclass(frozen=True)
class Converted:
    """
    A converted model.

    open_source: opens what it can be checked against; None if there is nothing, and then *why* says why.
    """

    mlp: Mlp
    open_source: Callable[[], Source] | None
    why: str = ""


def kind_of(path: Path) -> str:
    """The kind of the model in *path*. Raises ConversionError if it is none of `KINDS`."""
    ending = path.suffix.lower()
    with open(path, "rb") as stream:
        start = stream.read(16)
    if start.startswith(b"PK\x03\x04") and ending not in (".npz", ".keras", ".joblib"):
        return _kind_of_archive(path)
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras"
    if start[4:8] == b"TFL3":
        return "tflite"
    if start[:1] == b"\x08" and start[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"B"):
        return "onnx"  # a protobuf message whose first field is a small number
    raise ConversionError(f"{path.name} is of no kind that is known; supported are {', '.join(_ENDINGS)}")


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError) as error:
        raise ConversionError(f"{path.name} is a damaged archive: {error}") from None
    if "config.json" in names and "model.weights.h5" in names:
        return "keras"
    if any(name.endswith("models/model.json") for name in names) or path.suffix == ".pt2":
        return "pt2"
    if any(name.endswith(("data.pkl", ".npy")) for name in names):
        return "weights"
    raise ConversionError(f"{path.name} is an archive of no kind that is known")


def convert(path: Path, kind: str, options: Options) -> Converted:
    """The model in *path*. Raises ConversionError or another of nncore's errors, or OSError."""
    if options.output is not None and kind != "onnx":
        raise ConversionError(f"an output can be named for ONNX only; {path.name} is {KINDS[kind]}")
    if options.description is not None and kind != "weights":
        raise ConversionError(f"a description belongs to bare weights; {path.name} is {KINDS[kind]}")
    converted = _CONVERTERS[kind](path, options)
    if options.labels is None and options.feature_names is None:
        return converted
    mlp = converted.mlp
    labels = options.labels or mlp.labels
    features = options.feature_names or mlp.feature_names
    return replace(converted, mlp=Mlp(mlp.layers, labels, features, mlp.name, mlp.input_shape))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ONNX


def _onnx(path: Path, options: Options) -> Converted:
    from nncore.convert import onnx_graph

    conversion = onnx_graph.convert(path, options.output, options.dtype, name=options.name)

    def open_source() -> Source:
        if _is_installed("onnxruntime"):
            name, run = f"onnxruntime {version('onnxruntime')}", _onnxruntime_session(path).run
        else:
            from onnx.reference import ReferenceEvaluator

            graph = onnx_graph.self_contained(conversion, path.parent)
            name, run = f"onnx's reference {version('onnx')}", ReferenceEvaluator(graph).run

        def answers(x: Rows) -> npt.NDArray[Any]:
            parts = []
            for batch in onnx_graph.batches(conversion, x):
                answer = run([conversion.output_name], {conversion.input_name: batch})[0]
                if isinstance(answer, list):  # a ZipMap's: dictionaries by class
                    answer = [list(row.values()) for row in answer]
                parts.append(np.asarray(answer, np.float64).reshape(conversion.batch or len(batch), -1))
            return np.concatenate(parts)[: len(x)]

        # float16 has 11 bits: what it computes differs from what its weights say.
        return Source(name, answers, tolerance=2e-2 if conversion.input_dtype is np.float16 else None)

    return Converted(conversion.mlp, open_source)


def _onnxruntime_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# PyTorch


def _pt2(path: Path, options: Options) -> Converted:
    from nncore.convert import torch_pt2

    mlp = torch_pt2.from_pt2(path, dtype=options.dtype, name=options.name)
    if not _is_installed("torch"):
        return Converted(mlp, None, "torch is not installed")

    def open_source() -> Source:
        from nncore.convert import torch_program

        return Source(f"torch {version('torch')}", torch_program.runner(path))

    return Converted(mlp, open_source)


# Keras


def _keras(path: Path, options: Options) -> Converted:
    from nncore.convert import keras_model

    mlp = keras_model.from_keras(path, dtype=options.dtype, name=options.name)
    backend = _keras_backend()
    if backend is None:
        return Converted(mlp, None, "keras with a backend is not installed")

    def open_source() -> Source:
        os.environ.setdefault("KERAS_BACKEND", backend)
        import keras

        # By now the file is known to hold neither Lambda layers nor custom objects, which safe mode refuses.
        model = keras.saving.load_model(path, compile=False, safe_mode=True)

        def answers(x: Rows) -> npt.NDArray[Any]:
            shape = [len(x), *(mlp.input_shape or (mlp.n_in,))]
            return np.asarray(model.predict(x.reshape(shape), verbose=0))

        return Source(f"keras {version('keras')} on {keras.backend.backend()}", answers)

    return Converted(mlp, open_source)


def _keras_backend() -> str | None:
    if not _is_installed("keras"):
        return None
    chosen = os.environ.get("KERAS_BACKEND")
    backends = [chosen] if chosen else ["tensorflow", "jax", "torch"]
    return next((name for name in backends if name and _is_installed(name)), None)


# TFLite


def _tflite(path: Path, options: Options) -> Converted:
    from nncore.convert import tflite_model

    mlp = tflite_model.from_tflite(path, dtype=options.dtype or "float32", name=options.name)

    def open_source() -> Source:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path))
        interpreter.allocate_tensors()
        entry, out = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

        def answers(x: Rows) -> npt.NDArray[Any]:
            rows = []
            for row in x.astype(np.float32):  # one by one, as the batch may be fixed at 1
                interpreter.set_tensor(entry["index"], row.reshape(entry["shape"]))
                interpreter.invoke()
                rows.append(interpreter.get_tensor(out["index"]).reshape(-1).copy())
            return np.stack(rows)

        return Source(f"LiteRT {version('ai-edge-litert')}", answers)

    return Converted(mlp, open_source)


# Weights


def _weights(path: Path, options: Options) -> Converted:
    from nncore.convert import plain_weights

    if plain_weights.is_model_file(path):
        raise ConversionError(f"{path.name} is a model file already")
    description = options.description or path.with_suffix(".json")
    if not description.is_file():
        raise ConversionError(
            f"{path.name} holds arrays, and needs a description of its layers: {description.name} beside it,"
            " or --description FILE"
        )
    mlp = plain_weights.from_weights(path, description, dtype=options.dtype, name=options.name)
    return Converted(mlp, None, "weights alone answer nothing")


# scikit-learn


def _sklearn(path: Path, options: Options) -> Converted:
    from nncore.convert import sklearn_estimator

    estimator = _unpickled(path)
    mlp = sklearn_estimator.from_sklearn(estimator, options.dtype or "float32", options.name or path.stem)

    def open_source() -> Source:
        def answers(x: Rows) -> npt.NDArray[Any]:
            return sklearn_estimator.expected_of(estimator, x)[1]

        compares, _ = sklearn_estimator.expected_of(estimator, np.zeros((1, mlp.n_in)))
        return Source(f"scikit-learn {version('scikit-learn')}", answers, compares)

    return Converted(mlp, open_source)


def _unpickled(path: Path) -> Any:
    """The object in *path*, by joblib if that is there: it reads plain pickles, too."""
    try:
        if _is_installed("joblib"):
            import joblib

            return joblib.load(path)
        with open(path, "rb") as stream:
            return pickle.load(stream)
    except OSError:
        raise
    except Exception as error:  # a pickle raises whatever its code raises
        raise ConversionError(f"{path.name} cannot be unpickled: {type(error).__name__}: {error}") from None


_CONVERTERS: Mapping[str, Callable[[Path, Options], Converted]] = {
    "onnx": _onnx,
    "pt2": _pt2,
    "keras": _keras,
    "tflite": _tflite,
    "weights": _weights,
    "sklearn": _sklearn,
}
