"""from_sklearn: linear models, and what may stand before a model, answer what the estimators answer."""

import warnings

import numpy as np
import pytest
from sklearn import linear_model, svm
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import SelectKBest, VarianceThreshold, f_regression
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, Normalizer, StandardScaler

import nncore
from nncore import ConversionError
from nncore.convert.sklearn_estimator import expected_of

RNG = np.random.default_rng(0)
X = RNG.standard_normal((90, 5)) * [1, 10, 0.1, 3, 1] + [0, 5, -1, 2, 0]
TARGET = X @ [1, 0.1, 5, -1, 0.5]
TWO = np.where(np.median(TARGET) < TARGET, "yes", "no")
THREE = np.array(["low", "mid", "high"])[np.digitize(TARGET, np.quantile(TARGET, [0.3, 0.7]))]

CLASSIFIERS = [
    linear_model.LogisticRegression(),
    linear_model.LogisticRegression(solver="saga", max_iter=50),
    linear_model.RidgeClassifier(),
    linear_model.RidgeClassifierCV(),
    linear_model.SGDClassifier(random_state=0),
    linear_model.SGDClassifier(loss="log_loss", random_state=0),
    linear_model.SGDClassifier(loss="modified_huber", random_state=0),
    linear_model.Perceptron(random_state=0),
    svm.LinearSVC(random_state=0),
    LinearDiscriminantAnalysis(),
]
REGRESSORS = [
    linear_model.LinearRegression(),
    linear_model.Ridge(),
    linear_model.RidgeCV(),
    linear_model.Lasso(alpha=0.01),
    linear_model.ElasticNet(alpha=0.01),
    linear_model.SGDRegressor(random_state=0),
    linear_model.BayesianRidge(),
    linear_model.HuberRegressor(max_iter=500),
    linear_model.LinearRegression(fit_intercept=False),
    svm.LinearSVR(random_state=0),
    svm.SVR(kernel="linear"),
    svm.NuSVR(kernel="linear"),
]


def fitted(estimator, x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(x, y)


def assert_answers_alike(mlp, estimator, x):
    """
    The model's outputs or probabilities are the estimator's.

    float64 differs by the order of sums; scores reach 1e3 here, so 1e-9 is a few roundings.
    """
    kind, expected = expected_of(estimator, x)
    answer = mlp.predict_proba(x) if kind == "probabilities" else mlp.forward(x)
    np.testing.assert_allclose(answer, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("y", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=repr)
def test_linear_classifier(estimator, y):
    """One layer, with the estimator's labels, predictions and scores or probabilities."""
    pipeline = fitted(make_pipeline(StandardScaler(), estimator), X, y)
    mlp = nncore.from_sklearn(pipeline, "float64")
    n_out = 1 if y is TWO else 3
    assert [layer.n_out for layer in mlp.layers] == [n_out]
    assert mlp.labels == tuple(sorted(set(y)))
    assert_answers_alike(mlp, pipeline, X)
    top, _ = mlp.top_labels_from(mlp.forward(X))
    assert [mlp.class_labels[i] for i in top[:, 0]] == pipeline.predict(X).tolist()


@pytest.mark.parametrize("estimator", [svm.SVC(kernel="linear"), svm.NuSVC(kernel="linear")], ids=repr)
def test_linear_support_vector_classifier(estimator):
    """With two classes it is one layer, as LinearSVC is."""
    test_linear_classifier(estimator, TWO)


@pytest.mark.parametrize("estimator", REGRESSORS, ids=repr)
def test_linear_regressor(estimator):
    """One layer without labels."""
    pipeline = fitted(make_pipeline(StandardScaler(), estimator), X, TARGET)
    mlp = nncore.from_sklearn(pipeline, "float64")
    assert [layer.n_out for layer in mlp.layers] == [1]
    assert mlp.labels is None
    assert_answers_alike(mlp, pipeline, X)


@pytest.mark.parametrize("estimator", [linear_model.LinearRegression(), linear_model.MultiTaskLasso()])
def test_several_targets(estimator):
    """A regressor of two targets has two outputs."""
    estimator.fit(X, np.stack([TARGET, X[:, 0]], axis=1))
    mlp = nncore.from_sklearn(estimator, "float64")
    assert mlp.n_out == 2
    assert_answers_alike(mlp, estimator, X)


def test_sparse_coefficients():
    """What sparsify() leaves is made dense again."""
    estimator = fitted(linear_model.SGDClassifier(penalty="l1", random_state=0), X, THREE)
    expected = expected_of(estimator, X)[1]
    np.testing.assert_allclose(
        nncore.from_sklearn(estimator.sparsify(), "float64").forward(X), expected, rtol=1e-9, atol=1e-9
    )


BEFORE = [
    PCA(3),
    PCA(2, whiten=True),
    TruncatedSVD(3),
    SelectKBest(f_regression, k=2),
    VarianceThreshold(0.5),
    FunctionTransformer(),
    make_pipeline(StandardScaler(), PCA(4), MinMaxScaler()),
    ColumnTransformer([("s", StandardScaler(), [3, 0]), ("m", MinMaxScaler(), slice(1, 3))]),
    ColumnTransformer([("s", StandardScaler(), [1])], remainder="passthrough"),
    ColumnTransformer([("p", PCA(2), [0, 1, 2]), ("d", "drop", [3]), ("s", "passthrough", [4, 4])]),
    ColumnTransformer([("q", Pipeline([("s", StandardScaler()), ("p", PCA(1))]), [0, 2])], remainder="drop"),
]


@pytest.mark.parametrize("before", BEFORE, ids=lambda step: repr(step)[:40])
@pytest.mark.parametrize(
    "estimator", [linear_model.Ridge(), MLPRegressor((4,), max_iter=3, random_state=0)], ids=["ridge", "mlp"]
)
def test_what_may_stand_before_a_model(before, estimator):
    """Decompositions, choices of features and column transformers are folded or become a layer."""
    if not isinstance(estimator, linear_model.Ridge):
        estimator = MLPRegressor(hidden_layer_sizes=(4,), max_iter=3, random_state=0)
    pipeline = fitted(make_pipeline(before, estimator), X, TARGET)
    mlp = nncore.from_sklearn(pipeline, "float64")
    assert mlp.n_in == 5
    assert_answers_alike(mlp, pipeline, X)


def test_linear_steps_are_multiplied_where_that_saves_weights():
    """PCA before a linear model is one layer."""
    pipeline = fitted(make_pipeline(PCA(3), linear_model.Ridge()), X, TARGET)
    assert len(nncore.from_sklearn(pipeline).layers) == 1


def test_columns_by_name():
    """A ColumnTransformer fitted on a data frame knows its columns by name."""
    transformer = ColumnTransformer([("s", StandardScaler(), [3, 0]), ("m", MinMaxScaler(), [1])])
    pipeline = fitted(make_pipeline(transformer, linear_model.Ridge()), X, TARGET)
    expected = nncore.from_sklearn(pipeline).forward(X)
    transformer.feature_names_in_ = np.array(list("abcde"), dtype=object)
    names = [("s", transformer.transformers_[0][1], ["d", "a"]), ("m", transformer.transformers_[1][1], "b")]
    transformer.transformers_ = names
    mlp = nncore.from_sklearn(pipeline)
    np.testing.assert_array_equal(mlp.forward(X), expected)
    assert mlp.feature_names == tuple("abcde")


class MyRidge(linear_model.Ridge):
    """A class of a user's own, which may predict anything."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MyRidge().fit(X, TARGET), "MyRidge cannot be converted"),
        (
            lambda: linear_model.PoissonRegressor().fit(X, np.abs(TARGET)),
            "PoissonRegressor cannot be converted",
        ),
        (lambda: svm.SVC(kernel="linear").fit(X, THREE), "SVC votes between pairs of its 3 classes"),
        (lambda: svm.SVC().fit(X, TWO), "SVC has kernel='rbf'"),
        (lambda: svm.SVR(kernel="poly").fit(X, TARGET), "SVR has kernel='poly'"),
        (
            lambda: make_pipeline(Normalizer(), linear_model.Ridge()).fit(X, TARGET),
            "Normalizer before the model cannot be converted",
        ),
        (
            lambda: make_pipeline(FunctionTransformer(np.log1p), linear_model.Ridge()).fit(np.abs(X), TARGET),
            "FunctionTransformer before the model",
        ),
    ],
)
def test_what_cannot_be_converted(make, message):
    """Links, kernels, subclasses and nonlinear steps are refused by name."""
    with pytest.raises(ConversionError, match=message):
        nncore.from_sklearn(make())
