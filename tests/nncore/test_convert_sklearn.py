"""from_sklearn: the converted model answers what the estimator answers."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits, make_multilabel_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    PolynomialFeatures,
    RobustScaler,
    StandardScaler,
)
from sklearn.tree import DecisionTreeClassifier

import nncore
from nncore import ConversionError, DtypeError

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 5)) * [1, 10, 0.1, 3, 1] + [0, 5, -1, 2, 0]
TARGET = X @ [1, 0.1, 5, -1, 0.5]
SCALERS = [
    StandardScaler(),
    StandardScaler(with_mean=False),
    StandardScaler(with_std=False),
    MinMaxScaler((-1, 2)),
    MaxAbsScaler(),
    RobustScaler(),
    RobustScaler(with_centering=False),
    RobustScaler(with_scaling=False),
    RobustScaler(unit_variance=True, quantile_range=(10, 80)),
]


def fitted(estimator, x, y):
    """*estimator*, trained for a few steps: enough for weights that differ, too few to converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(x, y)


def classifier(**options):
    return MLPClassifier(**{"hidden_layer_sizes": (7, 4), "max_iter": 5, "random_state": 0} | options)


def regressor(**options):
    return MLPRegressor(**{"hidden_layer_sizes": (7, 4), "max_iter": 5, "random_state": 0} | options)


# float64 differs from scikit-learn's by the order of its sums only; float32 by its rounding, 6e-8 a step.
TOLERANCES = pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])


@TOLERANCES
@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
def test_classifier_with_several_classes(activation, dtype, tolerance):
    """predict_proba and labels are the estimator's; forward gives logits."""
    y = np.digitize(TARGET, np.quantile(TARGET, [0.3, 0.7]))
    names = np.array(["low", "mid", "high"])[y]
    estimator = fitted(classifier(activation=activation), X, names)
    mlp = nncore.from_sklearn(estimator, dtype, name="levels")
    assert (mlp.name, mlp.dtype, mlp.labels) == ("levels", np.dtype(dtype), ("high", "low", "mid"))
    assert mlp.layers[-1].activation == "identity"
    np.testing.assert_allclose(mlp.predict_proba(X), estimator.predict_proba(X), rtol=0, atol=tolerance)
    top, scores = mlp.top_labels_from(mlp.forward(X))
    assert [mlp.class_labels[i] for i in top[:, 0]] == estimator.predict(X).tolist()
    np.testing.assert_allclose(scores[:, 0], estimator.predict_proba(X).max(axis=1), rtol=0, atol=tolerance)


@TOLERANCES
def test_classifier_with_two_classes(dtype, tolerance):
    """A binary classifier becomes one logit, whose sigmoid is the second class's probability."""
    estimator = fitted(classifier(), X, TARGET > 0)
    mlp = nncore.from_sklearn(estimator, dtype)
    assert (mlp.n_out, mlp.labels, mlp.layers[-1].activation) == (1, ("False", "True"), "identity")
    expected = estimator.predict_proba(X)
    np.testing.assert_allclose(mlp.predict_proba(X)[:, 0], expected[:, 1], rtol=0, atol=tolerance)
    top, _ = mlp.top_labels_from(mlp.forward(X))
    assert [mlp.class_labels[i] == "True" for i in top[:, 0]] == estimator.predict(X).tolist()


@TOLERANCES
def test_multilabel_classifier(dtype, tolerance):
    """A multilabel classifier answers one probability a label."""
    x, y = make_multilabel_classification(n_samples=60, n_features=5, n_classes=4, random_state=0)
    estimator = fitted(classifier(), x, y)
    mlp = nncore.from_sklearn(estimator, dtype)
    assert (mlp.layers[-1].activation, mlp.labels) == ("sigmoid", ("0", "1", "2", "3"))
    np.testing.assert_allclose(mlp.forward(x), estimator.predict_proba(x), rtol=0, atol=tolerance)
    np.testing.assert_array_equal(mlp.predict_proba(x), mlp.forward(x))


@TOLERANCES
@pytest.mark.parametrize("y", [TARGET, np.stack([TARGET, X[:, 0]], axis=1)], ids=["one", "two"])
def test_regressor(y, dtype, tolerance):
    """A regressor's outputs are its predictions, one column an output; it has no labels."""
    estimator = fitted(regressor(), X, y)
    mlp = nncore.from_sklearn(estimator, dtype)
    assert mlp.labels is None
    np.testing.assert_allclose(np.squeeze(mlp.forward(X)), estimator.predict(X), rtol=0, atol=10 * tolerance)


@TOLERANCES
@pytest.mark.parametrize("scaler", SCALERS, ids=repr)
def test_scaler_is_folded_into_the_first_layer(scaler, dtype, tolerance):
    """A scaler before the perceptron costs no layer, and the model takes unscaled rows."""
    pipeline = fitted(make_pipeline(scaler, regressor()), X, TARGET)
    mlp = nncore.from_sklearn(pipeline, dtype)
    assert [layer.n_out for layer in mlp.layers] == [7, 4, 1]
    np.testing.assert_allclose(mlp.forward(X)[:, 0], pipeline.predict(X), rtol=0, atol=10 * tolerance)


def test_scalers_are_folded_in_their_order():
    """Several scalers, nested pipelines and steps that pass through are all folded."""
    steps = [StandardScaler(), "passthrough", MinMaxScaler(), make_pipeline(RobustScaler(), regressor())]
    pipeline = fitted(make_pipeline(*steps), X, TARGET)
    mlp = nncore.from_sklearn(pipeline, "float64")
    np.testing.assert_allclose(mlp.forward(X)[:, 0], pipeline.predict(X), rtol=0, atol=1e-12)


def test_constant_feature_is_folded():
    """A feature without spread, which scalers leave unscaled, does no harm."""
    x = X.copy()
    x[:, 2] = 4
    pipeline = fitted(make_pipeline(StandardScaler(), regressor()), x, TARGET)
    np.testing.assert_allclose(
        nncore.from_sklearn(pipeline, "float64").forward(x)[:, 0], pipeline.predict(x), rtol=0, atol=1e-12
    )


def test_feature_names_are_kept():
    """Column names seen by the outermost step become feature names."""
    pipeline = fitted(make_pipeline(StandardScaler(), regressor()), X, TARGET)
    assert nncore.from_sklearn(pipeline).feature_names is None
    # What fitting on a data frame of pandas or polars sets, neither of which is needed here.
    pipeline[0].feature_names_in_ = np.array(["a", "b", "c", "d", "e"], dtype=object)
    assert nncore.from_sklearn(pipeline).feature_names == ("a", "b", "c", "d", "e")


def test_labels_are_the_classes_as_text():
    """Integer classes become decimal labels."""
    digits = load_digits()
    estimator = fitted(classifier(max_iter=1), digits.data[:200], digits.target[:200])
    assert nncore.from_sklearn(estimator).labels == tuple("0123456789")


def one_class():
    return fitted(classifier(), X, np.zeros(len(X)))


def other_output():
    """A regressor for counts (loss "poisson"), whose last activation is exp."""
    estimator = fitted(regressor(), X, TARGET)
    estimator.out_activation_ = "exp"
    return estimator


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classifier(), "MLPClassifier is not fitted; call fit first"),
        (
            lambda: make_pipeline(StandardScaler(), regressor()),
            "StandardScaler is not fitted",
        ),
        (
            lambda: LogisticRegression(),
            "LogisticRegression is not fitted; call fit first",
        ),
        (
            lambda: DecisionTreeClassifier(),
            "DecisionTreeClassifier cannot be converted; supported are",
        ),
        (lambda: make_pipeline(StandardScaler()), "StandardScaler cannot be converted; supported are"),
        (lambda: "model.pkl", "str cannot be converted"),
        (
            lambda: fitted(make_pipeline(PolynomialFeatures(), regressor()), X, TARGET),
            "PolynomialFeatures before the model cannot be converted; supported are",
        ),
        (
            lambda: fitted(make_pipeline(MinMaxScaler(clip=True), regressor()), X, TARGET),
            r"MinMaxScaler\(clip=True\) cannot be folded in; use clip=False",
        ),
        (other_output, "MLPRegressor has activation 'exp'; supported are identity, logistic, tanh, relu"),
        (one_class, "MLPClassifier was fitted with one class"),
    ],
)
def test_what_cannot_be_converted(make, message):
    """Other estimators, and ones that are not fitted, are refused by type, with what is supported."""
    with pytest.raises(ConversionError, match=message):
        nncore.from_sklearn(make())


def test_weights_beyond_float32_are_refused():
    """A weight that float32 cannot hold is an error that names the layer, not an infinity."""
    estimator = fitted(regressor(), X, TARGET)
    estimator.coefs_[1][2, 3] = 1e300
    with pytest.raises(nncore.ModelError, match=r"layer 1: weights\[2, 3\] is inf"):
        nncore.from_sklearn(estimator)
    layer = nncore.from_sklearn(estimator, "float64").layers[1]
    assert isinstance(layer, nncore.Layer)
    assert layer.weights[2, 3] == 1e300


def test_dtype_must_be_one_that_models_have():
    """Only float32 and float64 are offered."""
    with pytest.raises(DtypeError, match="dtype is 'float16'; expected float32 or float64"):
        nncore.from_sklearn(fitted(regressor(), X, TARGET), "float16")


def test_without_scikit_learn_the_message_says_what_to_install():
    """Where scikit-learn is missing, the error is one line with the command."""
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import nncore\n"
        "try: nncore.from_sklearn(object())\n"
        "except nncore.ConversionError as error: print(error)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer == "scikit-learn is not installed: pip install 'nnserve[sklearn]'\n"
