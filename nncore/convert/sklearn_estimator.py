"""
Fitted scikit-learn estimator -> Mlp that answers the same.

    classifiers with logits        the logits (last activation identity): MLPClassifier, LogisticRegression,
                                   LinearDiscriminantAnalysis; SGDClassifier(loss="log_loss") of two classes
    one against the rest           a probability for each class (last activation sigmoid), not brought to a
                                   sum of 1: SGDClassifier(loss="log_loss") of several classes
    multilabel MLPClassifier       one probability a label (last activation sigmoid)
    classifiers with scores only   decision_function: LinearSVC, RidgeClassifier, SGDClassifier, Perceptron,
                                   SVC(kernel="linear") of two classes
    regressors                     their predictions: MLPRegressor, LinearRegression, Ridge, LinearSVR,
                                   SVR(kernel="linear"), ...
    Pipeline of scalers before     the scalers are folded into the first layer, in float64

Two classes are one output, the second class's. So Mlp.predict_proba is the estimator's predict_proba, with
one column in place of two if there are two classes; where an estimator has none, the most probable label is
the one that it predicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.arrays import model_dtype
from nncore.convert import expressions as ex
from nncore.convert import lowering
from nncore.convert.expressions import Expression
from nncore.errors import ConversionError
from nncore.model import Mlp

Numbers = npt.NDArray[np.float64]

_ACTIVATIONS = {"identity": "identity", "logistic": "sigmoid", "tanh": "tanh", "relu": "relu"}

# Module of scikit-learn -> its classes whose decision function or prediction is x @ coef_.T + intercept_.
_CLASSIFIERS = {
    "linear_model": (
        *("LogisticRegression", "LogisticRegressionCV", "RidgeClassifier", "RidgeClassifierCV"),
        *("SGDClassifier", "Perceptron", "PassiveAggressiveClassifier"),
    ),
    "svm": ("LinearSVC", "SVC", "NuSVC"),
    "discriminant_analysis": ("LinearDiscriminantAnalysis",),
}
_REGRESSORS = {
    "linear_model": (
        *("LinearRegression", "Ridge", "RidgeCV", "Lasso", "LassoCV", "ElasticNet", "ElasticNetCV"),
        *("Lars", "LarsCV", "LassoLars", "LassoLarsCV", "LassoLarsIC", "OrthogonalMatchingPursuit"),
        *("BayesianRidge", "ARDRegression", "HuberRegressor", "TheilSenRegressor", "QuantileRegressor"),
        *("SGDRegressor", "PassiveAggressiveRegressor", "MultiTaskLasso", "MultiTaskElasticNet"),
    ),
    "svm": ("LinearSVR", "SVR", "NuSVR"),
}
_SCALERS = ("StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler")
_LOGIT_CLASSIFIERS = ("LogisticRegression", "LogisticRegressionCV", "LinearDiscriminantAnalysis")

_SUPPORTED = (
    "supported are MLPClassifier, MLPRegressor, linear classifiers and regressors, and a Pipeline of scalers"
    " (StandardScaler, MinMaxScaler, MaxAbsScaler, RobustScaler), PCA, feature selection or a"
    " ColumnTransformer of them before one"
)


def from_sklearn(estimator: Any, dtype: npt.DTypeLike = "float32", name: str = "mlp") -> Mlp:
    """
    The model that *estimator* has learned, in *dtype* ("float32" or "float64").

    Labels are the classes as text; feature names are those the estimator was fitted with. Scalers of
    features that are large beside their spread (timestamps, say) cost float32 its digits: use float64.

    Raises ConversionError for an estimator that is not fitted or not of the supported kinds.
    """
    wanted = model_dtype(dtype)
    *transformers, predictor = steps = _steps(estimator)
    _require_fitted(steps)
    _require_linear(predictor)
    n_in = int(getattr(steps[0], "n_features_in_", 0))
    if n_in < 1:
        raise ConversionError(f"{_type_name(steps[0])} does not say how many features it was fitted with")
    x: Expression = ex.Input(n_in)
    for transformer in transformers:
        x = _transformed(x, transformer)
    layers = lowering.layers_of(_predicted(x, predictor), wanted)
    features = getattr(steps[0], "feature_names_in_", None)
    return Mlp(layers, _labels(predictor), None if features is None else [*map(str, features)], name)


def expected_of(estimator: Any, x: npt.NDArray[Any]) -> tuple[str, npt.NDArray[Any]]:
    """
    What `from_sklearn(estimator)` should answer for the rows of *x*, by scikit-learn itself.

    Returns "outputs" or "probabilities", and those, (rows, n_out).
    """
    predictor = _steps(estimator)[-1]
    kind = "outputs"
    if _is_kind(predictor, _REGRESSORS) or not hasattr(predictor, "classes_"):
        answer = estimator.predict(x)
    elif _is_mlp(predictor) or type(predictor).__name__ in _LOGIT_CLASSIFIERS:
        kind, answer = "probabilities", estimator.predict_proba(x)
        if not _is_multilabel(predictor) and len(predictor.classes_) == 2:
            answer = answer[:, 1]
    else:
        answer = estimator.decision_function(x)
        if _last_activation(predictor) == "sigmoid":
            answer = 1 / (1 + np.exp(-answer))
    return kind, np.asarray(answer, np.float64).reshape(len(x), -1)


def _steps(estimator: Any) -> list[Any]:
    """The parts of *estimator*: transformers, then what predicts."""
    try:
        from sklearn.pipeline import Pipeline
    except ModuleNotFoundError:
        raise ConversionError("scikit-learn is not installed: pip install 'nnserve[sklearn]'") from None

    steps = list(_flattened(estimator, Pipeline))
    if not steps:
        raise ConversionError(f"the Pipeline has no steps; {_SUPPORTED}")
    predictor = steps[-1]
    if not (_is_mlp(predictor) or _is_kind(predictor, _CLASSIFIERS) or _is_kind(predictor, _REGRESSORS)):
        raise ConversionError(f"{_type_name(predictor)} cannot be converted; {_SUPPORTED}")
    return steps


def _flattened(step: Any, pipeline: Any) -> Iterator[Any]:
    """The steps of pipelines in pipelines, without those that pass their input through."""
    if isinstance(step, pipeline):
        for _, inner in step.steps:
            yield from _flattened(inner, pipeline)
    elif step is not None and not (isinstance(step, str) and step == "passthrough"):
        yield step


def _require_fitted(steps: Sequence[Any]) -> None:
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    for step in steps:
        try:
            check_is_fitted(step)
        except NotFittedError:
            raise ConversionError(f"{_type_name(step)} is not fitted; call fit first") from None


def _require_linear(predictor: Any) -> None:
    """Raise for a support vector machine that is more than one layer."""
    kernel = getattr(predictor, "kernel", "linear")
    if kernel != "linear":
        raise ConversionError(
            f"{_type_name(predictor)} has kernel={kernel!r}; a linear one can be converted only"
        )
    classes = len(getattr(predictor, "classes_", ()))
    if type(predictor).__name__ in ("SVC", "NuSVC") and classes > 2:
        raise ConversionError(
            f"{_type_name(predictor)} votes between pairs of its {classes} classes, which is no layer of a"
            " perceptron; LinearSVC can be converted"
        )


def _is_kind(estimator: Any, names: dict[str, tuple[str, ...]]) -> bool:
    """Whether *estimator* is of a class in *names* itself, not of a class derived from one."""
    module = type(estimator).__module__.split(".")
    return module[0] == "sklearn" and type(estimator).__name__ in names.get(module[1], ())


def _is_mlp(estimator: Any) -> bool:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    return isinstance(estimator, MLPClassifier | MLPRegressor)


# What comes before the predictor


def _transformed(x: Expression, step: Any) -> Expression:
    """x after the fitted transformer *step*."""
    from sklearn import preprocessing
    from sklearn.compose import ColumnTransformer
    from sklearn.decomposition import PCA, TruncatedSVD
    from sklearn.feature_selection import SelectorMixin

    kind = type(step)
    if kind.__name__ in _SCALERS and kind is getattr(preprocessing, kind.__name__):
        return ex.scale(x, *_factor_and_shift(step))
    if kind is PCA:
        scale = np.sqrt(step.explained_variance_) if step.whiten else np.ones(len(step.components_))
        return _linear(x, step.components_ / scale[:, np.newaxis], -(step.components_ @ step.mean_) / scale)
    if kind is TruncatedSVD:
        return _linear(x, step.components_, 0.0)
    if isinstance(step, SelectorMixin):
        return ex.columns(x, step.get_support(indices=True))
    if kind is preprocessing.FunctionTransformer and step.func is None:
        return x
    if kind is ColumnTransformer:
        return _column_transformed(x, step)
    raise ConversionError(f"{_type_name(step)} before the model cannot be converted; {_SUPPORTED}")


def _factor_and_shift(scaler: Any) -> tuple[Numbers, Numbers]:
    """What the fitted *scaler* does to each feature: x * factor + shift."""
    from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, StandardScaler

    if getattr(scaler, "clip", False):
        raise ConversionError(f"{_type_name(scaler)}(clip=True) cannot be folded in; use clip=False")
    zeros, ones = np.zeros(scaler.n_features_in_), np.ones(scaler.n_features_in_)
    if isinstance(scaler, MinMaxScaler):
        return scaler.scale_.astype(np.float64), scaler.min_.astype(np.float64)
    if isinstance(scaler, MaxAbsScaler):
        return 1 / scaler.scale_.astype(np.float64), zeros
    if isinstance(scaler, StandardScaler):
        center = scaler.mean_ if scaler.with_mean else zeros
        scale = scaler.scale_ if scaler.with_std else ones
    else:
        center = scaler.center_ if scaler.with_centering else zeros
        scale = scaler.scale_ if scaler.with_scaling else ones
    factor = 1 / scale.astype(np.float64)
    return factor, -center.astype(np.float64) * factor


def _column_transformed(x: Expression, transformer: Any) -> Expression:
    """x after a ColumnTransformer: its parts side by side, each of some columns."""
    from sklearn.pipeline import Pipeline

    parts = []
    names = [*getattr(transformer, "feature_names_in_", [])]
    for _, step, wanted in transformer.transformers_:
        if isinstance(step, str) and step == "drop":
            continue
        indices = _column_indices(wanted, names, x.n)
        if not indices:
            continue
        part = ex.columns(x, indices)
        for each in _flattened(step, Pipeline):
            part = _transformed(part, each)
        parts.append(part)
    if not parts:
        raise ConversionError("ColumnTransformer leaves no columns")
    return ex.concatenated(parts)


def _column_indices(wanted: Any, names: Sequence[Any], n: int) -> list[int]:
    """Columns as a ColumnTransformer has them (indices, names, a slice, a mask) -> indices."""
    if isinstance(wanted, slice):
        ends = [names.index(end) if isinstance(end, str) else end for end in (wanted.start, wanted.stop)]
        stop = ends[1] + 1 if isinstance(wanted.stop, str) else ends[1]
        return list(range(n))[ends[0] : stop : wanted.step]
    if isinstance(wanted, str | int | np.integer):
        wanted = [wanted]
    chosen = list(wanted)
    if chosen and all(isinstance(column, bool | np.bool_) for column in chosen):
        return [index for index, column in enumerate(chosen) if column]
    return [names.index(column) if isinstance(column, str) else int(column) for column in chosen]


def _linear(x: Expression, coefficients: Any, intercept: Any) -> Expression:
    """
    x @ coefficients.T + intercept.

    After another linear step the two are multiplied, unless that gives more weights than both have.
    """
    weights = np.atleast_2d(np.asarray(coefficients, np.float64)).T
    if isinstance(x, ex.Dense):
        n_in, n, n_out = x.x.n, x.n, weights.shape[1]
        if n_in * n_out <= n_in * n + n * n_out:
            bias = x.bias @ weights + intercept
            return ex.dense(x.x, x.weights.astype(np.float64) @ weights, bias)
    return ex.dense(x, weights, np.asarray(intercept, np.float64))


# What predicts


def _predicted(x: Expression, predictor: Any) -> Expression:
    """The outputs of *predictor* for its input x."""
    if _is_mlp(predictor):
        hidden = [_activation(predictor, predictor.activation)] * (len(predictor.coefs_) - 1)
        for weights, bias, activation in zip(
            predictor.coefs_, predictor.intercepts_, [*hidden, _last_activation(predictor)], strict=True
        ):
            x = ex.activated(_linear(x, weights.T, bias.astype(np.float64)), activation)
        return x
    scores = _linear(x, _linear_weights(predictor), predictor.intercept_)
    return ex.activated(scores, _last_activation(predictor))


def _linear_weights(predictor: Any) -> Numbers:
    """The coefficients of a linear model: (outputs, n_in)."""
    coefficients = predictor.coef_ if isinstance(predictor.coef_, np.ndarray) else predictor.coef_.toarray()
    return np.atleast_2d(coefficients.astype(np.float64))


def _last_activation(predictor: Any) -> str:
    """identity where the estimator's own last activation makes probabilities of logits, else its own."""
    if _is_mlp(predictor):
        is_binary_classifier = predictor.n_outputs_ == 1 and hasattr(predictor, "classes_")
        own = predictor.out_activation_
        if own == "softmax" or (own == "logistic" and is_binary_classifier):
            return "identity"
        return _activation(predictor, own)
    is_several = len(getattr(predictor, "classes_", ())) > 2
    is_against_rest = getattr(predictor, "loss", None) == "log_loss"
    if type(predictor).__name__ in _LOGIT_CLASSIFIERS:
        is_against_rest = getattr(predictor, "multi_class", None) == "ovr" or (
            getattr(predictor, "solver", "") == "liblinear"
        )
    return "sigmoid" if is_several and is_against_rest else "identity"


def _activation(mlp: Any, name: str) -> str:
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ConversionError(f"{_type_name(mlp)} has activation {name!r}; supported are {known}")
    return _ACTIVATIONS[name]


def _is_multilabel(predictor: Any) -> bool:
    return _is_mlp(predictor) and hasattr(predictor, "classes_") and _last_activation(predictor) == "sigmoid"


def _labels(predictor: Any) -> list[str] | None:
    classes = getattr(predictor, "classes_", None)
    if classes is None or not (_is_mlp(predictor) or _is_kind(predictor, _CLASSIFIERS)):
        return None
    if len(classes) < 2:
        raise ConversionError(
            f"{_type_name(predictor)} was fitted with one class, {classes[0]}; nothing to decide"
        )
    outputs = predictor.n_outputs_ if _is_mlp(predictor) else len(_linear_weights(predictor))
    if max(2, outputs) != len(classes):
        raise ConversionError(f"{_type_name(predictor)} has {outputs} outputs for {len(classes)} classes")
    return [str(label) for label in classes]


def _type_name(estimator: Any) -> str:
    return type(estimator).__name__
