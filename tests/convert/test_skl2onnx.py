"""from_onnx: estimators that skl2onnx exported answer what onnxruntime answers, and have their labels."""

import warnings

import numpy as np
import onnxruntime
import pytest
from skl2onnx import to_onnx
from sklearn import linear_model, svm
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, Normalizer, RobustScaler, StandardScaler

import nncore
from nncore import ConversionError

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of skl2onnx, about its own dependencies

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((90, 4)) * [1, 10, 0.1, 3] + [0, 5, -1, 2]).astype(np.float32)
TARGET = X @ np.array([1, 0.1, 5, -1], np.float32)
TWO = np.where(np.median(TARGET) < TARGET, "yes", "no")
THREE = np.digitize(TARGET, np.quantile(TARGET, [0.3, 0.7])) * 10
FOUR_WORDS = np.array(["d", "a", "c", "b"])[np.digitize(TARGET, np.quantile(TARGET, [0.2, 0.5, 0.7]))]

CLASSIFIERS = [
    MLPClassifier((5, 3), max_iter=5, random_state=0),
    MLPClassifier((5,), activation="tanh", max_iter=5, random_state=0),
    MLPClassifier((5,), activation="logistic", max_iter=5, random_state=0),
    linear_model.LogisticRegression(),
    linear_model.RidgeClassifier(),
    linear_model.SGDClassifier(random_state=0),
    linear_model.Perceptron(random_state=0),
    svm.LinearSVC(random_state=0),
]
SCALERS = [StandardScaler(), MinMaxScaler(), MaxAbsScaler(), RobustScaler(), None]


def fitted(estimator, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X, y)


def exported(estimator, tmp_path, **options):
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(estimator, X[:1], **options).SerializeToString())
    return path


def answers(path, index):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    answer = session.run(None, {session.get_inputs()[0].name: X})[index]
    return np.array([list(row.values()) for row in answer]) if isinstance(answer, list) else answer


@pytest.mark.parametrize("y", [TWO, THREE, FOUR_WORDS], ids=["two", "three", "four"])
@pytest.mark.parametrize("zipmap", [True, False], ids=["zipmap", "plain"])
@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=lambda each: type(each).__name__)
def test_classifier(estimator, zipmap, y, tmp_path):
    """Scores or probabilities are the graph's, and the labels are found, as dictionaries or as a tensor."""
    if isinstance(estimator, svm.LinearSVC):  # scores only: there is nothing to zip, and skl2onnx fails
        pipeline = fitted(estimator, y)
        path = exported(pipeline, tmp_path)
    else:
        pipeline = fitted(make_pipeline(StandardScaler(), estimator), y)
        path = exported(pipeline, tmp_path, options={"zipmap": zipmap})
    mlp = nncore.from_onnx(path)
    expected = answers(path, 1).reshape(len(X), -1)
    np.testing.assert_allclose(mlp.forward(X), expected, rtol=1e-4, atol=1e-4)
    assert mlp.labels == tuple(map(str, sorted(set(y.tolist()))))
    top, _ = mlp.top_labels_from(mlp.forward(X))
    assert [mlp.class_labels[i] for i in top[:, 0]] == [str(label) for label in answers(path, 0)]


@pytest.mark.parametrize("scaler", SCALERS, ids=repr)
@pytest.mark.parametrize(
    "estimator",
    [
        MLPRegressor(hidden_layer_sizes=(5,), max_iter=5, random_state=0),
        linear_model.LinearRegression(),
        linear_model.SGDRegressor(random_state=0),
        svm.LinearSVR(random_state=0),
    ],
    ids=lambda e: type(e).__name__,
)
def test_regressor(estimator, scaler, tmp_path):
    """Predictions after every scaler, which costs no layer."""
    if scaler is None and isinstance(estimator, linear_model.SGDRegressor):
        return  # does not converge on rows that are not scaled
    pipeline = fitted(make_pipeline(*[step for step in (scaler, estimator) if step is not None]), TARGET)
    path = exported(pipeline, tmp_path)
    mlp = nncore.from_onnx(path)
    assert len(mlp.layers) == (2 if isinstance(estimator, MLPRegressor) else 1)
    expected = answers(path, 0)
    np.testing.assert_allclose(mlp.forward(X), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: make_pipeline(Normalizer(), linear_model.Ridge()).fit(X, TARGET),
            r"\(Normalizer\): divides each row by its L2 norm",
        ),
        (
            lambda: linear_model.SGDClassifier(loss="log_loss", random_state=0).fit(X, THREE),
            r"\(ReduceSum\): the operator is not supported",
        ),
    ],
)
def test_what_is_no_perceptron(make, message, tmp_path):
    """Norms of rows, and probabilities that are brought to a sum of 1 by division."""
    with pytest.raises(ConversionError, match=message):
        nncore.from_onnx(exported(make(), tmp_path))
