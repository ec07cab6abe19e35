"""Outputs to ModelInferResponse: which tensors, raw and typed, labels and classification."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import random_mlp
from support.oip import OipServer, request_for, tensor_of
from support.serving import echoed, served

from nnproto.oip import inference_pb2 as pb
from nnserver.api.inference import InferenceLimits
from nnserver.errors import InvalidArgument, MessageTooLarge
from nnserver.model_settings import ModelSettings

LABELS = ("setosa", "versicolor", "virginica")
X = np.array([[0.1, 3.5, -1.0], [7.0, 7.0, np.nan]], np.float32)


def server_of(**of_mlp):
    """Its outputs are its inputs."""
    return OipServer(echoed(3, **of_mlp))


def error_of(server, request):
    with pytest.raises(InvalidArgument) as caught:
        server.infer(request)
    return str(caught.value)


def classified(count, output="outputs", **options):
    request = request_for(X, outputs=[output], **options)
    request.outputs[0].parameters["classification"].int64_param = count
    return request


@pytest.mark.parametrize("raw", [True, False])
def test_a_request_that_names_no_outputs_gets_those_of_the_metadata(raw):
    """All three of a model with labels, in the order of the metadata; outputs alone without labels."""
    response = server_of(labels=LABELS).infer(request_for(X, raw=raw))
    assert [output.name for output in response.outputs] == ["outputs", "probabilities", "labels"]
    assert [output.datatype for output in response.outputs] == ["FP32", "FP32", "BYTES"]
    assert [list(output.shape) for output in response.outputs] == [[2, 3], [2, 3], [2, 1]]
    assert len(response.raw_output_contents) == (3 if raw else 0)
    assert [output.name for output in server_of().infer(request_for(X, raw=raw)).outputs] == ["outputs"]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_outputs_are_the_models_own_bits(raw, dtype):
    """Raw and typed alike, in the model's dtype; an answer has the form of its request."""
    model = served(random_mlp(1, [3, 4], dtype=dtype))
    x = np.random.default_rng(0).standard_normal((5, 3))
    datatype = "FP32" if dtype == "float32" else "FP64"
    response = OipServer(model).infer(request_for(x, datatype=datatype, raw=raw))
    assert bool(response.raw_output_contents) == raw
    y = tensor_of(response)
    assert y.dtype == dtype
    assert np.array_equal(y, model.mlp.forward(x.astype(dtype)))


@pytest.mark.parametrize("raw", [True, False])
def test_several_outputs_come_in_the_order_in_which_they_were_asked_for(raw):
    server = server_of(labels=LABELS)
    response = server.infer(request_for(X[:1], outputs=["labels", "outputs", "probabilities"], raw=raw))
    assert [output.name for output in response.outputs] == ["labels", "outputs", "probabilities"]
    mlp = server.repository.get("iris").mlp
    assert tensor_of(response, "labels").tolist() == [[b"versicolor"]]
    assert np.array_equal(tensor_of(response, "outputs"), X[:1])
    assert np.array_equal(tensor_of(response, "probabilities"), mlp.probabilities_from(X[:1]))


@pytest.mark.parametrize("raw", [True, False])
def test_a_single_row_is_answered_as_one(raw):
    """(n_in,) gives (n_out,), one label (1,), k classes (k,)."""
    request = request_for(X[0], raw=raw, outputs=["outputs", "labels", "probabilities"])
    request.outputs[2].parameters["classification"].int64_param = 2
    response = server_of(labels=LABELS).infer(request)
    assert [list(output.shape) for output in response.outputs] == [[3], [1], [2]]
    assert tensor_of(response).tolist() == X[0].tolist()


@pytest.mark.parametrize("raw", [True, False])
def test_no_rows_are_answered_with_none(raw):
    request = request_for(np.zeros((0, 3)), raw=raw, outputs=["outputs", "labels", "probabilities"])
    request.outputs[2].parameters["classification"].int64_param = 2
    response = server_of(labels=LABELS).infer(request)
    assert [list(output.shape) for output in response.outputs] == [[0, 3], [0, 1], [0, 2]]
    assert all(tensor_of(response, name).size == 0 for name in ("outputs", "labels", "probabilities"))


def test_labels_are_the_most_probable_classes_in_utf8():
    """A model without labels has the indices of its classes; ties go to the lower index."""
    x = [[0, 2, 2], [0, 0, 3]]
    request = request_for(x, outputs=["labels"])
    assert tensor_of(server_of(labels=["ä", "鳶尾", ""]).infer(request), "labels").tolist() == [
        ["鳶尾".encode()],
        [b""],
    ]
    assert tensor_of(server_of().infer(request), "labels").tolist() == [[b"1"], [b"2"]]


def test_labels_of_a_binary_model_are_two():
    """A single output p has the classes [1 - p, p]."""
    server = OipServer(echoed(1, last="sigmoid", labels=["no", "yes"]))
    request = request_for([[0.25], [0.75]], outputs=["labels", "probabilities"])
    request.outputs[1].parameters["classification"].int64_param = 2
    response = server.infer(request)
    assert tensor_of(response, "labels").tolist() == [[b"no"], [b"yes"]]
    assert tensor_of(response, "probabilities").tolist() == [
        [b"0.75:0:no", b"0.25:1:yes"],
        [b"0.75:1:yes", b"0.25:0:no"],
    ]


class TestClassification:
    """`classification` answers BYTES of "value:index:label", the most probable classes first."""

    @pytest.mark.parametrize("raw", [True, False])
    def test_values_indices_and_labels(self, raw):
        response = server_of(labels=LABELS).infer(classified(2, raw=raw))
        assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [2, 2])
        assert tensor_of(response).tolist() == [
            [b"3.5:1:versicolor", b"0.1:0:setosa"],
            [b"7.0:0:setosa", b"7.0:1:versicolor"],
        ]

    def test_without_labels_there_is_none(self):
        """As Triton has it: value:index."""
        assert tensor_of(server_of().infer(classified(1))).tolist() == [[b"3.5:1"], [b"7.0:0"]]

    def test_more_classes_than_there_are_are_all(self):
        """NaN comes last, as a text."""
        texts = tensor_of(server_of().infer(classified(2**40))).tolist()
        assert [len(row) for row in texts] == [3, 3]
        assert texts[1][2] == b"nan:2"

    def test_probabilities_are_classified_as_such(self):
        server = server_of(labels=LABELS)
        texts = tensor_of(server.infer(classified(1, "probabilities")), "probabilities")
        p = server.repository.get("iris").mlp.probabilities_from(X)
        assert texts[0, 0] == f"{p[0, 1]!s}:1:versicolor".encode()

    @given(st.floats(width=32, allow_nan=False))
    def test_a_value_reads_back_as_the_same_float32(self, value):
        request = request_for([[value, 0, 0]], outputs=["outputs"])
        request.outputs[0].parameters["classification"].int64_param = 3
        texts = tensor_of(server_of().infer(request))[0]
        (text,) = (text for text in texts if text.endswith(b":0"))
        assert np.float32(text.split(b":")[0]) == np.float32(value)

    @pytest.mark.parametrize("count", [0, -1])
    def test_at_least_one_class_must_be_asked_for(self, count):
        assert error_of(server_of(), classified(count)) == (
            f"parameter 'classification' of output 'outputs' is {count}; expected at least 1"
        )

    def test_of_another_type_is_refused(self):
        request = request_for(X, outputs=["outputs"])
        request.outputs[0].parameters["classification"].string_param = "2"
        assert error_of(server_of(), request) == (
            "parameter 'classification' is string_param; expected int64_param"
        )

    def test_labels_have_none(self):
        assert error_of(server_of(labels=LABELS), classified(1, "labels")) == (
            "output 'labels' has no classification; expected that of 'outputs' or 'probabilities'"
        )

    def test_one_output_is_no_class(self):
        """A single logit cannot be ranked against the class that it does not stand for."""
        request = request_for([[1.0]], outputs=["outputs"])
        request.outputs[0].parameters["classification"].int64_param = 1
        assert error_of(OipServer(echoed(1)), request) == (
            "'outputs' of model 'iris' is one number a row, not one a class; "
            "expected classification of 'probabilities'"
        )


def test_outputs_that_there_are_not_are_refused():
    server = server_of()
    assert error_of(server, request_for(X, outputs=["output__0"])) == (
        "model 'iris' has no output 'output__0'; it has 'outputs', 'probabilities', 'labels'"
    )
    assert error_of(server, request_for(X, outputs=["labels", "labels"])) == (
        "output 'labels' is asked for twice"
    )
    request = request_for(X, outputs=["outputs"])
    request.outputs[0].parameters["shared_memory_region"].string_param = "region"
    assert error_of(server, request) == (
        "output 'outputs' is to go to shared memory; this server answers in messages only"
    )


def test_a_hundred_thousand_outputs_are_refused_at_once():
    """By their number, before they are parsed; fewer because each can be asked for once."""
    assert error_of(server_of(), request_for(X, outputs=["outputs"] * 100_000)).startswith("the message's ")
    few = request_for(X, outputs=["outputs"] * 1000)
    assert error_of(server_of(), few) == "output 'outputs' is asked for twice"


def test_config_toml_says_what_is_listed():
    """And so what a request that names no outputs is answered with."""
    model = served(random_mlp(1, [3, 2], labels=["a", "b"]))
    object.__setattr__(model, "settings", ModelSettings(outputs=("labels",)))
    response = OipServer(model).infer(request_for(X))
    assert [output.name for output in response.outputs] == ["labels"]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(
    ("outputs", "classes"), [(["outputs"], 0), (["labels"], 0), (["probabilities"], 2), (["outputs"], 2)]
)
def test_an_answer_never_exceeds_what_was_reckoned(raw, outputs, classes):
    """A limit just below the real size of an answer refuses it before it is computed."""
    x = np.full((200, 2), -1.2345678e-38, np.float32)
    model = echoed(2, labels=["a" * 130, "b"], last="identity")
    request = request_for(x, raw=raw, outputs=outputs)
    if classes:
        request.outputs[0].parameters["classification"].int64_param = classes
    response = OipServer(model).infer(request)
    size = response.ByteSize()
    assert size > request.ByteSize() or outputs == ["outputs"]
    limits = InferenceLimits(max_message_bytes=max(size, request.ByteSize()) - 1)
    with pytest.raises(MessageTooLarge, match="max_message_bytes"):
        OipServer(model, limits=limits).infer(request)


def test_ids_names_and_versions_are_told():
    response = server_of().infer(request_for(X, id="ä id", outputs=["outputs"]))
    assert (response.model_name, response.model_version, response.id) == ("iris", "1", "ä id")
    assert response.parameters == {}
    assert isinstance(response, pb.ModelInferResponse)


@given(
    st.integers(1, 3).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5, np.nan, np.inf]), min_size=n, max_size=n),
            max_size=4,
        ).map(lambda rows: np.array(rows, np.float32).reshape(-1, n))
    )
)
def test_a_label_is_the_first_of_the_top_classes(x):
    """With ties, NaN and infinities, for one column and several: as nnproto's LABELS has it."""
    n = x.shape[1]
    model = echoed(n, last="softmax" if n > 1 else "sigmoid")
    indices, _ = model.mlp.top_labels_from(x, 1)
    response = OipServer(model).infer(request_for(x, outputs=["labels"]))
    assert tensor_of(response, "labels").tolist() == [[str(index).encode()] for index in indices[:, 0]]
