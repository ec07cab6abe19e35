"""
Fitted scikit-learn estimator -> Mlp that answers the same.

    MLPClassifier, several classes    the logits of its softmax (last activation identity)
    MLPClassifier, two classes        the logit of the second class (one output, two labels)
    MLPClassifier, multilabel         one probability a label (last activation sigmoid)
    MLPRegressor                      its predictions
    Pipeline of scalers before one    the scalers are folded into the first layer, in float64

so that Mlp.predict_proba is the estimator's predict_proba, with one column in place of two if there are
two classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nncore.arrays import model_dtype
from nncore.errors import ConversionError
from nncore.model import Layer, Mlp, naming_layer

_SUPPORTED = (
    "supported are MLPClassifier, MLPRegressor, and a Pipeline of StandardScaler, MinMaxScaler,"
    " MaxAbsScaler and RobustScaler before one"
)
_ACTIVATIONS = {"identity": "identity", "logistic": "sigmoid", "tanh": "tanh", "relu": "relu"}


class _Affine(NamedTuple):
    """What a scaler does to each feature: x * factor + shift. float64, (n_in,)."""

    factor: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]


def from_sklearn(estimator: Any, dtype: npt.DTypeLike = "float32", name: str = "mlp") -> Mlp:
    """
    The model that *estimator* has learned, in *dtype* ("float32" or "float64").

    Labels are the classes as text; feature names are those the estimator was fitted with. Scalers of
    features that are large beside their spread (timestamps, say) cost float32 its digits: use float64.

    Raises ConversionError for an estimator that is not fitted or not of the supported kinds.
    """
    wanted = model_dtype(dtype)
    *scalers, mlp = steps = _steps(estimator)
    weights, biases = _folded(mlp, [_affine(scaler) for scaler in scalers])
    activations = [*[_activation(mlp, mlp.activation)] * (len(weights) - 1), _last_activation(mlp)]
    layers = []
    for index, parts in enumerate(zip(weights, biases, activations, strict=True)):
        with naming_layer(index):
            layers.append(Layer(*parts).astype(wanted))
    features = getattr(steps[0], "feature_names_in_", None)
    return Mlp(layers, _labels(mlp), None if features is None else [*map(str, features)], name)


def _steps(estimator: Any) -> list[Any]:
    """The fitted parts of *estimator*: scalers, then one multi-layer perceptron."""
    try:
        from sklearn.exceptions import NotFittedError
        from sklearn.neural_network import MLPClassifier, MLPRegressor
        from sklearn.pipeline import Pipeline
        from sklearn.utils.validation import check_is_fitted
    except ModuleNotFoundError:
        raise ConversionError("scikit-learn is not installed: pip install 'nnserve[sklearn]'") from None

    steps = [estimator]
    while isinstance(steps[-1], Pipeline):
        inner = [step for _, step in steps.pop().steps]
        steps += [step for step in inner if step is not None and step != "passthrough"]
    if not isinstance(steps[-1], MLPClassifier | MLPRegressor):
        raise ConversionError(f"{_type_name(steps[-1])} cannot be converted; {_SUPPORTED}")
    for step in steps:
        try:
            check_is_fitted(step)
        except NotFittedError:
            raise ConversionError(f"{_type_name(step)} is not fitted; call fit first") from None
    return steps


def _affine(scaler: Any) -> _Affine:
    """What the fitted *scaler* does to each feature."""
    from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler

    if getattr(scaler, "clip", False):
        raise ConversionError(f"{_type_name(scaler)}(clip=True) cannot be folded in; use clip=False")
    zeros, ones = np.zeros(scaler.n_features_in_), np.ones(scaler.n_features_in_)
    if isinstance(scaler, MinMaxScaler):
        return _Affine(scaler.scale_.astype(np.float64), scaler.min_.astype(np.float64))
    if isinstance(scaler, MaxAbsScaler):
        return _Affine(1 / scaler.scale_.astype(np.float64), zeros)
    if isinstance(scaler, StandardScaler):
        center = scaler.mean_ if scaler.with_mean else zeros
        scale = scaler.scale_ if scaler.with_std else ones
    elif isinstance(scaler, RobustScaler):
        center = scaler.center_ if scaler.with_centering else zeros
        scale = scaler.scale_ if scaler.with_scaling else ones
    else:
        raise ConversionError(f"{_type_name(scaler)} before the perceptron cannot be converted; {_SUPPORTED}")
    factor = 1 / scale.astype(np.float64)
    return _Affine(factor, -center.astype(np.float64) * factor)


def _folded(mlp: Any, scalers: list[_Affine]) -> tuple[list[Any], list[Any]]:
    """Weights and biases of *mlp* in float64, the first layer taking the features as they are."""
    weights = [w.astype(np.float64) for w in mlp.coefs_]
    biases = [b.astype(np.float64) for b in mlp.intercepts_]
    # From the innermost scaler out: (x * factor + shift) @ w + b = x @ (factor * w) + (shift @ w + b).
    for factor, shift in reversed(scalers):
        biases[0] = shift @ weights[0] + biases[0]
        weights[0] = factor[:, np.newaxis] * weights[0]
    return weights, biases


def _last_activation(mlp: Any) -> str:
    """identity where the estimator's own last activation makes probabilities of logits, else its own."""
    is_binary_classifier = mlp.n_outputs_ == 1 and hasattr(mlp, "classes_")
    if mlp.out_activation_ == "softmax" or (mlp.out_activation_ == "logistic" and is_binary_classifier):
        return "identity"
    return _activation(mlp, mlp.out_activation_)


def _activation(mlp: Any, name: str) -> str:
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ConversionError(f"{_type_name(mlp)} has activation {name!r}; supported are {known}")
    return _ACTIVATIONS[name]


def _labels(mlp: Any) -> list[str] | None:
    classes = getattr(mlp, "classes_", None)
    if classes is None:
        return None
    if len(classes) < 2:
        raise ConversionError(f"{_type_name(mlp)} was fitted with one class, {classes[0]}; nothing to decide")
    return [str(label) for label in classes]


def _type_name(estimator: Any) -> str:
    return type(estimator).__name__
