"""nnproto.v1.Inference by way of the seam: answers, errors, and streams that keep their order."""

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from support.calls import FakeCall
from support.models import random_mlp
from support.serving import Server, echo_mlp, echoed, request_for, rows_of, served

import nncore
from nnproto.v1 import inference_pb2 as pb
from nnserver.api.inference import InferenceLimits
from nnserver.batcher import QueueLimits
from nnserver.errors import (
    Cancelled,
    Draining,
    Expired,
    InvalidArgument,
    MessageTooLarge,
    NotFound,
    QueueFull,
    ServerError,
    Status,
    status_and_text,
)

NAN, INF = float("nan"), float("inf")
OUTPUTS, PROBABILITIES, LABELS = (
    pb.OUTPUT_KIND_OUTPUTS,
    pb.OUTPUT_KIND_PROBABILITIES,
    pb.OUTPUT_KIND_LABELS,
)
RNG = np.random.default_rng(1)


def failure_of(server, request):
    with pytest.raises(ServerError) as caught:
        server.predict(request)
    assert not server.engine.jobs, "a request that was refused was queued"
    return type(caught.value), str(caught.value)


def labels_of(response):
    return [[(top.label, top.index, top.score) for top in row.top] for row in response.labels]


def errors_of(call):
    return [(r.error.code, r.error.message) for r in responses(call) if r.HasField("error")]


def responses(call):
    return [pb.PredictResponse.FromString(reply) for reply in call.replies]


def ids(call):
    return [response.id for response in responses(call)]


# Outputs and probabilities


@pytest.mark.parametrize("model_dtype", ["float32", "float64"])
@pytest.mark.parametrize("request_dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [pb.OUTPUT_KIND_UNSPECIFIED, OUTPUTS])
def test_outputs_are_the_models_in_its_own_dtype(model_dtype, request_dtype, kind):
    """Whatever the request's dtype, the answer is forward(rows converted), in the model's dtype."""
    mlp = random_mlp(3, (4, 5, 2), dtype=model_dtype)
    x = RNG.standard_normal((3, 4)).astype(request_dtype)
    response = Server(served(mlp)).predict(request_for(x, output=kind, id="a"))
    assert (response.model, response.version, response.id) == ("iris", "1", "a")
    assert not response.HasField("error")
    assert not response.labels
    got, expected = rows_of(response), mlp.forward(x)
    assert got.dtype == expected.dtype == model_dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("last", ["identity", "softmax", "sigmoid"])
@pytest.mark.parametrize("n", [1, 3])
def test_probabilities_are_the_models(last, n):
    """Softmax, sigmoid for a single logit, and passed on where the outputs are probabilities already."""
    mlp = random_mlp(4, (2, n), activation=last, last=last)
    x = RNG.standard_normal((5, 2)).astype(np.float32)
    server = Server(served(mlp))
    got = rows_of(server.predict(request_for(x, output=PROBABILITIES)))
    np.testing.assert_array_equal(got, mlp.predict_proba(x))
    if last != "identity":
        np.testing.assert_array_equal(got, rows_of(server.predict(request_for(x))))


@pytest.mark.parametrize("kind", [OUTPUTS, PROBABILITIES])
def test_a_row_is_answered_as_a_row_and_no_rows_as_none(kind):
    """(n_in,) -> (n_out,); (1, n_in) -> (1, n_out); (0, n_in) -> (0, n_out)."""
    server = Server(served(random_mlp(5, (2, 3))))
    for shape, answer_shape in (((2,), (3,)), ((1, 2), (1, 3)), ((0, 2), (0, 3))):
        assert rows_of(server.predict(request_for(np.ones(shape), output=kind))).shape == answer_shape


def test_nan_and_infinite_inputs_are_answered():
    """By default no value is refused: what the model makes of it is the answer."""
    x = np.array([[NAN, 1], [INF, -INF]], np.float32)
    np.testing.assert_array_equal(rows_of(Server(echoed(2)).predict(request_for(x))), x)


def test_versions():
    """The version may be left out or be the one there is."""
    server = Server(echoed(1))
    assert server.predict(request_for([[1]], version="1")).version == "1"
    assert failure_of(server, request_for([[1]], version="2")) == (
        NotFound,
        "model 'iris' has no version '2'; it has version '1'",
    )


# Labels


@pytest.mark.parametrize(
    ("outputs", "k", "expected"),
    [
        ([1, 3, 2], 0, [1]),
        ([1, 3, 2], 1, [1]),
        ([1, 3, 2], 3, [1, 2, 0]),
        ([2, 2, 2], 3, [0, 1, 2]),
        ([1, 2, 2], 2, [1, 2]),
        ([0.0, -0.0, 0.0], 3, [0, 1, 2]),
    ],
)
def test_labels_by_descending_probability_ties_by_lower_index(outputs, k, expected):
    """top_k classes, the most probable first; 0 asks for one; of equal ones the lower index comes first."""
    server = Server(echoed(3, labels=("a", "b", "c")))
    (row,) = labels_of(server.predict(request_for([outputs], output=LABELS, top_k=k)))
    assert [index for _, index, _ in row] == expected
    assert [label for label, _, _ in row] == ["abc"[index] for index in expected]
    scores = [score for _, _, score in row]
    assert scores == sorted(scores, reverse=True)


def test_label_scores_are_the_probabilities():
    """A score is the class's probability; each row has its own entry, in order."""
    x = RNG.standard_normal((4, 3)).astype(np.float32)
    server = Server(echoed(3))
    probabilities = rows_of(server.predict(request_for(x, output=PROBABILITIES)))
    rows = labels_of(server.predict(request_for(x, output=LABELS, top_k=3)))
    assert len(rows) == 4
    for row, expected in zip(rows, probabilities, strict=True):
        assert {index: score for _, index, score in row} == dict(enumerate(expected.tolist()))


def test_nan_comes_last():
    """A class whose probability is NaN comes after all others; here the outputs are probabilities."""
    server = Server(echoed(4, last="sigmoid"))
    (row,) = labels_of(server.predict(request_for([[NAN, 0.1, NAN, 0.9]], output=LABELS, top_k=4)))
    assert [index for _, index, _ in row] == [3, 1, 0, 2]
    assert np.isnan([row[2][2], row[3][2]]).all()


def test_labels_without_names_are_decimal_indices():
    """A model without labels answers with the class's index as its name."""
    (row,) = labels_of(Server(echoed(11)).predict(request_for([[0] * 10 + [1]], output=LABELS)))
    assert [(label, index) for label, index, _ in row] == [("10", 10)]


def test_a_single_output_has_two_classes():
    """One logit p stands for the classes [1 - p, p]."""
    server = Server(echoed(1, labels=("no", "yes")))
    rows = labels_of(server.predict(request_for([[3.0], [-3.0]], output=LABELS, top_k=2)))
    assert [[label for label, _, _ in row] for row in rows] == [["yes", "no"], ["no", "yes"]]
    for row in rows:
        assert sum(score for _, _, score in row) == pytest.approx(1, abs=1e-6)  # both rounded to float32


def test_labels_of_a_row_and_of_no_rows():
    """A single row has one entry; no rows have none."""
    server = Server(echoed(2))
    assert len(labels_of(server.predict(request_for([1, 2], output=LABELS)))) == 1
    assert labels_of(server.predict(request_for(np.ones((0, 2)), output=LABELS))) == []


# Errors


EXPECTED_KIND = "expected OUTPUT_KIND_OUTPUTS, OUTPUT_KIND_PROBABILITIES or OUTPUT_KIND_LABELS"
TOP_K_UNUSED = "top_k is 1; it must be 0 unless output is OUTPUT_KIND_LABELS"


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"model": "rose"}, NotFound, "unknown model 'rose'; this server has 'iris', 'tulip'"),
        ({"model": ""}, NotFound, "no model was named; this server has 'iris', 'tulip'"),
        (
            {"model": "a\nb\x1b[31m"},
            NotFound,
            r"unknown model 'a\nb\x1b[31m'; this server has 'iris', 'tulip'",
        ),
        ({"model": "x" * 200}, NotFound, f"unknown model '{'x' * 77}...'; this server has 'iris', 'tulip'"),
        ({"top_k": 1}, InvalidArgument, TOP_K_UNUSED),
        ({"top_k": 1, "output": PROBABILITIES}, InvalidArgument, TOP_K_UNUSED),
        ({"top_k": 4, "output": LABELS}, InvalidArgument, "top_k is 4; model 'iris' has 3 classes"),
        (
            {"top_k": 2**32 - 1, "output": LABELS},
            InvalidArgument,
            "top_k is 4294967295; model 'iris' has 3 classes",
        ),
        ({"output": 4}, InvalidArgument, f"output is 4; {EXPECTED_KIND}"),
        ({"output": -1}, InvalidArgument, f"output is -1; {EXPECTED_KIND}"),
        (
            {"inputs": pb.Tensor(shape=(2, 3), dtype=pb.DATA_TYPE_FLOAT32, data=bytes(20))},
            InvalidArgument,
            "inputs has 20 bytes of data; shape (2, 3) of float32 takes 24",
        ),
        (
            {"inputs": pb.Tensor(shape=(2, 2), dtype=pb.DATA_TYPE_FLOAT32, data=bytes(16))},
            InvalidArgument,
            "inputs has shape (2, 2); model 'iris' expects (rows, 3)",
        ),
        (
            {"inputs": pb.Tensor(shape=(2, 3), data=bytes(24))},
            InvalidArgument,
            "inputs has dtype DATA_TYPE_UNSPECIFIED; expected DATA_TYPE_FLOAT32 or DATA_TYPE_FLOAT64",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named_with_what_was_expected(change, kind, text):
    """Unary: the status and the exact text. Stream: the same in the error of the response, beside its id."""
    server = Server(echoed(3), echoed(1, "tulip"))
    request = request_for(np.ones((1, 3)), id="abc")
    for name, value in change.items():
        if isinstance(value, pb.Tensor):
            request.inputs.CopyFrom(value)
        else:
            setattr(request, name, value)
    assert failure_of(server, request) == (kind, text)
    call, listener = server.open()
    listener.on_message(request.SerializeToString())
    assert responses(call) == [
        pb.PredictResponse(id="abc", error=pb.Error(code=int(kind.status), message=text))
    ]
    assert not call.has_ended


def test_names_of_many_models_are_cut_short():
    """Trailers have no room for 500 names of 128 characters: at most 20 are listed."""
    server = Server(*(echoed(1, f"{number:03}{'x' * 125}") for number in range(500)))
    kind, text = failure_of(server, request_for([[1]], model="rose"))
    assert kind is NotFound
    assert text.startswith("unknown model 'rose'; this server has '000xxx")
    assert text.endswith("xxx' and 480 more")
    assert len(text) < 4096


def test_bytes_that_are_no_request_are_refused():
    """The text has the message's name and size; a stream lives on."""
    server = Server(echoed(1))
    text = "the message's 1 bytes are not a nnproto.v1.PredictRequest"
    call = server.start("Predict", b"\xff")
    assert (type(call.error), str(call.error)) == (InvalidArgument, text)
    call, listener = server.open()
    listener.on_message(b"\xff")
    assert errors_of(call) == [(Status.INVALID_ARGUMENT, text)]
    assert not call.has_ended


@pytest.mark.parametrize(
    ("method", "message"), [("ListModels", "ListModelsRequest"), ("GetModel", "GetModelRequest")]
)
def test_bytes_that_are_no_question_are_refused(method, message):
    """As for predictions."""
    call = Server(echoed(1)).start(method, b"\xff")
    assert str(call.error) == f"the message's 1 bytes are not a nnproto.v1.{message}"
    assert isinstance(call.error, InvalidArgument)


def test_non_finite_inputs_can_be_refused():
    """With reject_nonfinite, the first NaN or infinity is named by row and column, and finite rows pass."""
    server = Server(echoed(2), limits=InferenceLimits(reject_nonfinite=True))
    assert failure_of(server, request_for([[1, 2], [3, NAN], [INF, 0]])) == (
        InvalidArgument,
        "inputs has nan at row 1, column 1; this server takes finite values only (reject_nonfinite)",
    )
    assert failure_of(server, request_for([-INF, 0]))[1].startswith("inputs has -inf at row 0, column 0;")
    assert rows_of(server.predict(request_for([[1, 2]]))).tolist() == [[1, 2]]


def test_a_value_beyond_float32_counts_as_infinite():
    """1e300 is finite in the request and infinite in a float32 model: it is refused, too."""
    server = Server(echoed(1), limits=InferenceLimits(reject_nonfinite=True))
    assert failure_of(server, request_for(np.array([[1e300]])))[1].startswith("inputs has inf at row 0")


def test_an_expired_request_is_not_computed():
    """A deadline that has passed is DEADLINE_EXCEEDED, and nothing is queued."""
    server = Server(echoed(1))
    call = server.start("Predict", request_for([[1]]).SerializeToString(), FakeCall(deadline=0.0))
    assert isinstance(call.error, Expired)
    assert not server.engine.jobs


def test_a_request_whose_caller_has_gone_is_not_computed():
    """A call that was cancelled before its message was looked at queues nothing."""
    server = Server(echoed(1))
    call = FakeCall()
    call.has_gone = True
    server.start("Predict", request_for([[1]]).SerializeToString(), call)
    assert isinstance(call.error, Cancelled)
    assert not server.engine.jobs


def test_a_full_queue_is_the_requests_error():
    """QueueFull goes to the caller at once; nothing of it is queued."""
    server = Server(served(echo_mlp(1), limits=QueueLimits(max_requests=0)))
    kind, text = failure_of(server, request_for([[1]]))
    assert kind is QueueFull
    assert text.startswith("the queue of model 'iris' is full (0 requests, max_queue_requests)")


def test_a_fault_of_the_kernel_is_told_in_generic_words():
    """What went wrong inside goes to the log; the client gets INTERNAL and no detail."""
    server = Server(echoed(1))
    call = server.start("Predict", request_for([[1]]).SerializeToString())
    server.engine.fail(RuntimeError("/secret/path"))
    assert isinstance(call.error, RuntimeError)
    assert status_and_text(call.error) == (
        Status.INTERNAL,
        "internal error; the server's log has the details",
    )
    call, listener = server.open()
    listener.on_message(request_for([[1]], id="a").SerializeToString())
    server.engine.fail(RuntimeError("/secret/path"))
    assert errors_of(call) == [(Status.INTERNAL, "internal error; the server's log has the details")]
    assert ids(call) == ["a"]


# Sizes


def test_a_message_over_the_limit_names_the_setting():
    """The error has the size, the limit and the flag; on a stream it has the request's id, too."""
    server = Server(echoed(1), limits=InferenceLimits(max_message_bytes=1024))
    request = request_for(np.ones((300, 1)), id="large")
    size = request.ByteSize()
    text = (
        f"the message has {size} bytes; this server takes 1024 (max_message_bytes, --max-message-bytes); "
        "send fewer rows a message"
    )
    assert failure_of(server, request) == (MessageTooLarge, text)
    call, listener = server.open()
    listener.on_message(request.SerializeToString())
    assert errors_of(call) == [(Status.RESOURCE_EXHAUSTED, text)]
    assert ids(call) == ["large"]


@pytest.mark.parametrize("field", [b"\x9a\x06", b"\x1a"], ids=["a field that nobody knows", "an id"])
def test_ballast_is_refused(field):
    """100 KB beside a row would be held as long as the row waits, and no queue counts them."""
    server = Server(echoed(2))
    ballast = field + b"\xa0\x8d\x06" + b"x" * 100_000
    call = server.start("Predict", ballast + request_for([[1, 2]]).SerializeToString())
    assert isinstance(call.error, InvalidArgument)
    assert str(call.error).endswith(
        "bytes for 2 numbers; expected at most 10 a number, and 65536 for names, id and parameters"
    )
    assert rows_of(server.predict(request_for(np.zeros((10_000, 2))))).shape == (10_000, 2)


def test_an_answer_over_the_limit_is_refused_before_it_is_computed():
    """A small request can ask for a large answer; the error has its size and the setting."""
    mlp = random_mlp(1, (1, 100))
    server = Server(served(mlp), limits=InferenceLimits(max_message_bytes=4096))
    kind, text = failure_of(server, request_for(np.ones((20, 1))))
    assert kind is MessageTooLarge
    assert text.startswith("the answer to 20 rows would have about 8")
    assert text.endswith(
        " bytes; this server sends 4096 (max_message_bytes, --max-message-bytes); send fewer rows a message"
    )
    assert rows_of(server.predict(request_for(np.ones((9, 1))))).shape == (9, 100)


@given(
    rows=st.integers(0, 60),
    n=st.integers(1, 6),
    kind=st.sampled_from([OUTPUTS, PROBABILITIES, LABELS]),
    top_k=st.integers(0, 2),
    name_length=st.integers(0, 200),
    id_length=st.integers(0, 350),
    letter=st.sampled_from("a\u00e9\U0001f339"),
)
def test_no_answer_is_larger_than_the_limit(rows, n, kind, top_k, name_length, id_length, letter):
    """Whatever the length and alphabet of labels and id: an answer that is sent fits."""
    labels = [f"{index}{letter * name_length}" for index in range(max(2, n))]
    mlp = nncore.Mlp([nncore.Layer(np.ones((1, n), np.float32))], labels=labels)
    server = Server(served(mlp), limits=InferenceLimits(max_message_bytes=1500))
    request = request_for(np.zeros((rows, 1), np.float32), output=kind, id=letter * id_length)
    request.top_k = top_k if kind == LABELS else 0
    try:
        response = server.predict(request)
    except MessageTooLarge:
        return
    assert response.ByteSize() <= 1500


@pytest.mark.parametrize("kind", [OUTPUTS, LABELS])
def test_answers_up_to_the_limit_are_sent(kind):
    """The estimate is close: an answer of 90 % of the limit is not refused."""
    labels = tuple(f"class {index:03}" for index in range(10))
    mlp = random_mlp(1, (1, 10), labels=labels)
    server = Server(served(mlp), limits=InferenceLimits(max_message_bytes=100_000))
    row_bytes = 40 if kind == OUTPUTS else 24
    request = request_for(np.zeros((90_000 // row_bytes, 1), np.float32), output=kind)
    assert 85_000 < server.predict(request).ByteSize() <= 100_000


# Descriptions


def test_models_are_listed_by_name():
    """ListModels has every model, sorted by name; GetModel has the same description of one."""
    server = Server(echoed(1, "tulip"), echoed(2, "iris"))
    (reply,) = server.start("ListModels", b"").replies
    models = pb.ListModelsResponse.FromString(reply).models
    assert [model.name for model in models] == ["iris", "tulip"]
    for model in models:
        (reply,) = server.start("GetModel", pb.GetModelRequest(name=model.name).SerializeToString()).replies
        assert pb.Model.FromString(reply) == model


def test_a_description_has_all_there_is_to_know():
    """Layers with activation and alpha, shapes, dtype, labels, feature names, parameters."""
    layers = [
        nncore.Layer(np.ones((2, 3)), activation="leaky_relu"),
        nncore.Layer(np.ones((3, 3)), activation="prelu", alpha=[0.5, 0.25, 2]),
        nncore.Layer(np.ones((3, 2)), activation="softmax"),
    ]
    mlp = nncore.Mlp(layers, labels=("no", "yes"), feature_names=("x", "y"))
    (reply,) = (
        Server(served(mlp)).start("GetModel", pb.GetModelRequest(name="iris").SerializeToString()).replies
    )
    assert pb.Model.FromString(reply) == pb.Model(
        name="iris",
        version="1",
        dtype=pb.DATA_TYPE_FLOAT64,
        inputs=pb.TensorSpec(shape=(-1, 2), dtype=pb.DATA_TYPE_FLOAT64),
        outputs=pb.TensorSpec(shape=(-1, 2), dtype=pb.DATA_TYPE_FLOAT64),
        layers=[
            pb.Layer(n_in=2, n_out=3, activation="leaky_relu", alpha=[0.01]),
            pb.Layer(n_in=3, n_out=3, activation="prelu", alpha=[0.5, 0.25, 2]),
            pb.Layer(n_in=3, n_out=2, activation="softmax"),
        ],
        labels=("no", "yes"),
        feature_names=("x", "y"),
        parameter_count=6 + 3 + 9 + 3 + 3 + 6 + 2,
    )


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ({}, "no model was named; this server has 'iris'"),
        ({"name": "rose"}, "unknown model 'rose'; this server has 'iris'"),
        ({"name": "iris", "version": "0"}, "model 'iris' has no version '0'; it has version '1'"),
    ],
)
def test_an_unknown_model_has_no_description(question, text):
    """NOT_FOUND, naming what there is."""
    call = Server(echoed(1)).start("GetModel", pb.GetModelRequest(**question).SerializeToString())
    assert (type(call.error), str(call.error)) == (NotFound, text)


# Streams


def send(listener, request_id, x=((1.0,),), **fields):
    listener.on_message(request_for(x, id=request_id, **fields).SerializeToString())


@given(st.permutations([0, 1, 3, 4, 6, 7]))
def test_answers_come_in_the_order_of_requests_whatever_finishes_first(order):
    """Two models, two bad requests, and jobs that finish in any order: ids and values stay in order."""
    server = Server(echoed(1, "iris"), echoed(1, "tulip"))
    call, listener = server.open()
    for number in range(8):
        model = ("iris", "tulip")[number % 2] if number not in (2, 5) else "rose"
        send(listener, str(number), [[number]], model=model)
    waiting = sorted(order)
    for number in order:
        server.engine.run(waiting.index(number))
        waiting.remove(number)
    listener.on_half_close()
    assert ids(call) == [str(number) for number in range(8)]
    for number, response in enumerate(responses(call)):
        if number in (2, 5):
            assert response.error.code == Status.NOT_FOUND
        else:
            assert rows_of(response).tolist() == [[number]]
    assert call.is_finished


def test_an_answer_waits_only_for_those_before_it():
    """An answer is sent as soon as all before it are known, not at the end."""
    server = Server(echoed(1))
    call, listener = server.open()
    for name in "abc":
        send(listener, name)
    server.engine.run(1)
    assert ids(call) == []
    server.engine.run(0)
    assert ids(call) == ["a", "b"]
    server.engine.run(0)
    assert ids(call) == ["a", "b", "c"]


def test_demand_is_the_window_and_one_more_for_each_answer():
    """At most stream_window requests are taken and not yet answered."""
    server = Server(echoed(1), limits=InferenceLimits(stream_window=3))
    call, listener = server.open()
    assert call.demand == 3
    for name in "abc":
        send(listener, name)
    server.engine.run(2)
    assert call.demand == 3  # c is known but not sent: a is missing
    server.engine.run(0)
    assert call.demand == 4
    server.engine.run(0)
    assert call.demand == 6


def test_no_messages_are_no_answers():
    """A client that half-closes at once gets OK."""
    call, listener = Server(echoed(1)).open()
    listener.on_half_close()
    assert call.is_finished
    assert call.replies == []


def test_half_closing_waits_for_what_was_received():
    """The stream ends with OK after the last answer, not before."""
    server = Server(echoed(1))
    call, listener = server.open()
    send(listener, "a")
    send(listener, "b")
    listener.on_half_close()
    server.engine.run()
    assert not call.has_ended
    server.engine.run()
    assert ids(call) == ["a", "b"]
    assert call.is_finished


def test_a_bad_last_message_ends_with_ok_too():
    """Errors are the messages'; the stream's own status is OK."""
    server = Server(echoed(1))
    call, listener = server.open()
    send(listener, "a", model="rose")
    listener.on_half_close()
    assert errors_of(call) == [(Status.NOT_FOUND, "unknown model 'rose'; this server has 'iris'")]
    assert call.is_finished


def test_a_drain_ends_an_idle_stream():
    """Nothing is waiting: UNAVAILABLE at once, so that the client goes elsewhere."""
    call, listener = Server(echoed(1)).open()
    listener.on_drain()
    assert isinstance(call.error, Draining)
    assert str(call.error) == "the server is draining; send the unanswered requests to another"


def test_a_drain_answers_what_was_received_and_takes_no_more():
    """Requests before the drain are answered; one that arrives after it is not; then UNAVAILABLE."""
    server = Server(echoed(1))
    call, listener = server.open()
    send(listener, "a")
    listener.on_drain()
    send(listener, "late")
    assert len(server.engine.jobs) == 1
    assert not call.has_ended
    server.engine.run()
    assert ids(call) == ["a"]
    assert isinstance(call.error, Draining)


def test_a_half_closed_stream_drains_to_ok():
    """A client that has sent all it wanted gets OK even from a server that drains."""
    server = Server(echoed(1))
    call, listener = server.open()
    send(listener, "a")
    listener.on_half_close()
    listener.on_drain()
    server.engine.run()
    assert ids(call) == ["a"]
    assert call.is_finished


def test_a_cancelled_stream_costs_nothing_more():
    """After on_cancel the waiting jobs know that nobody waits for them."""
    server = Server(echoed(1))
    call, listener = server.open()
    send(listener, "a")
    call.has_gone = True
    listener.on_cancel()
    ((_, job),) = server.engine.jobs
    assert job.caller.is_cancelled()


# Anything at all


def answers_or_server_errors(server, message):
    """Neither a unary call nor a stream raises on *message*, or calls it the server's own fault."""
    call = server.start("Predict", message)
    stream, listener = server.open()
    listener.on_message(message)
    while server.engine.jobs:
        server.engine.run()
    listener.on_half_close()
    assert call.has_ended
    if call.error is not None:
        assert isinstance(call.error, ServerError)
        assert call.error.status != Status.INTERNAL
    assert stream.is_finished
    (response,) = responses(stream)
    assert response.HasField("error") == (call.error is not None)
    if call.error is not None:
        assert (response.error.code, response.error.message) == (call.error.status, str(call.error))
        assert len(response.error.message) < 1000


FUZZED: Any = Server(echoed(3), echoed(2, "tulip", labels=("a", "b"), dtype="float64"))


@given(st.binary(max_size=200))
def test_any_bytes_are_answered_or_refused(message):
    """Random bytes never raise and are never INTERNAL; unary and stream agree."""
    answers_or_server_errors(FUZZED, message)


@given(
    base=st.builds(
        pb.PredictRequest,
        model=st.sampled_from(["iris", "tulip", "", "rose"]) | st.text(max_size=5),
        version=st.sampled_from(["", "1", "2"]),
        id=st.text(max_size=5),
        output=st.integers(-(2**31), 2**31 - 1) | st.integers(0, 3),
        top_k=st.integers(0, 2**32 - 1) | st.integers(0, 3),
        inputs=st.builds(
            pb.Tensor,
            shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4), max_size=3),
            dtype=st.integers(-(2**31), 2**31 - 1) | st.integers(1, 2),
            data=st.binary(max_size=48) | st.integers(0, 6).map(lambda n: bytes(8 * n)),
        ),
    )
)
def test_any_request_is_answered_or_refused(base):
    """No combination of fields raises or is INTERNAL."""
    answers_or_server_errors(FUZZED, base.SerializeToString())


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 120)
)
def test_a_request_with_damaged_bytes_is_answered_or_refused(damage, cut):
    """A valid request with bytes changed and the end cut off never raises and is never INTERNAL."""
    message = bytearray(
        request_for(np.ones((4, 3)), id="abc", version="1", output=LABELS).SerializeToString()
    )
    for position, value in damage:
        message[position % len(message)] = value
    message = message[: len(message) - cut] if cut < 60 else message
    answers_or_server_errors(FUZZED, bytes(message))


@given(st.binary(max_size=60))
def test_any_bytes_can_be_asked_of_the_catalogue(message):
    """ListModels and GetModel answer or refuse any bytes."""
    for name in ("ListModels", "GetModel"):
        call = FUZZED.start(name, message)
        assert call.is_finished or isinstance(call.error, InvalidArgument | NotFound)


def test_the_test_has_bytes_that_are_no_message():
    """What these tests send as undecodable is that."""
    with pytest.raises(DecodeError):
        pb.PredictRequest.FromString(b"\xff")
