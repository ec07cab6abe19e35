"""Templates: a message that is recognised says what parsing it says, and no other is recognised."""

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import Server, echoed, request_for, rows_of

from nnproto.v1 import inference_pb2 as pb
from nnserver.api import wire
from nnserver.api.forms import Form, Templates
from nnserver.api.inference import InferenceLimits
from nnserver.errors import InvalidArgument
from nnserver.repository import Repository


@pytest.fixture(scope="module")
def model():
    return echoed(3)


def templates_of(model):
    return Templates(Repository([model]))


def learned(templates, model, request, generation=1):
    """Learn *request*'s form; return it."""
    message = request.SerializeToString()
    form = Form(
        "predict", model, len(request.inputs.data) // 12, len(request.inputs.data), lambda y, notes: []
    )
    templates.learn(message, form, generation)
    return form


def request_of(rows, request_id="", **fields):
    return request_for(np.asarray(rows, "f4").reshape(-1, 3), id=request_id, **fields)


requests = st.builds(
    lambda seed, rows, **fields: request_of(np.random.default_rng(seed).standard_normal((rows, 3)), **fields),
    seed=st.integers(0, 1000),
    rows=st.integers(0, 500),
    request_id=st.text(max_size=3) | st.text(min_size=120, max_size=140),
    model=st.sampled_from(["iris", "other"]),
    version=st.sampled_from(["", "1"]),
    output=st.sampled_from([0, 1, 2, 3]),
    top_k=st.sampled_from([0, 1, 300]),
)


@given(st.lists(requests, min_size=1, max_size=6), requests)
def test_what_is_recognised_is_what_parsing_finds(seen, request):
    """Rows, id, model, version, kind and shape are those of the message, whatever was learned before."""
    model = echoed(3)
    templates = templates_of(model)
    forms = {id(learned(templates, model, earlier)): earlier for earlier in seen}
    known = templates.find(request.SerializeToString())
    if known is None:
        return
    form, rows, note = known
    like = forms[id(form)]
    for field in ("model", "version", "output", "top_k"):
        assert getattr(like, field) == getattr(request, field)
    assert list(like.inputs.shape) == list(request.inputs.shape)
    assert bytes(rows) == request.inputs.data
    assert pb.PredictResponse.FromString(note) == pb.PredictResponse(id=request.id)


@given(requests, st.integers(0, 1000))
def test_the_same_with_other_rows_and_another_id_is_recognised(request, seed):
    """One look at a request is enough for all that differ from it in rows and id."""
    model = echoed(3)
    templates = templates_of(model)
    form = learned(templates, model, request)
    other = pb.PredictRequest()
    other.CopyFrom(request)
    other.inputs.data = np.random.default_rng(seed).bytes(len(request.inputs.data))
    if request.id.isascii():
        other.id = "x" * len(request.id)
    known = templates.find(other.SerializeToString())
    if request.inputs.data and request.id.isascii():
        assert known is not None
    if known is not None:
        assert known[0] is form
        assert bytes(known[1]) == other.inputs.data


@given(requests, st.data())
def test_a_message_with_one_byte_changed_is_recognised_only_if_it_says_the_same(request, data):
    """Wherever the byte lies: a template that matches is right about model, kind, shape and rows."""
    model = echoed(3)
    templates = templates_of(model)
    learned(templates, model, request)
    message = bytearray(request.SerializeToString())
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] = data.draw(st.integers(0, 255))
    known = templates.find(bytes(message))
    if known is not None:
        parsed = pb.PredictRequest.FromString(bytes(message))
        rows = parsed.inputs.data
        assert bytes(known[1]) == rows
        assert known[2] == pb.PredictResponse(id=parsed.id).SerializeToString()
        parsed.inputs.data, parsed.id = request.inputs.data, request.id
        assert parsed == request


def test_an_id_that_is_not_ascii_is_left_to_the_parser(model):
    """Whether bytes are UTF-8 is protobuf's to say."""
    templates = templates_of(model)
    learned(templates, model, request_of([1, 2, 3], "ab"))
    assert templates.find(request_of([1, 2, 3], "é").SerializeToString()) is None


@pytest.mark.parametrize(
    "message",
    [
        b"\x1a\x01a" + request_of([1, 2, 3], "b").SerializeToString(),
        request_of([1, 2, 3]).SerializeToString() + b"\x1a\x01a",
        request_of([9, 9, 9]).SerializeToString() + request_of([1, 2, 3]).SerializeToString(),
        b"\xbb\x3e\xbc\x3e" + request_of([1, 2, 3]).SerializeToString(),
    ],
    ids=["two ids", "the id last", "two tensors", "an unknown group"],
)
def test_unusual_messages_are_not_learned(model, message):
    """They are answered all the same, by way of the parser."""
    templates = templates_of(model)
    assert pb.PredictRequest.FromString(message).inputs.data
    templates.learn(message, Form("predict", model, 1, 12, lambda y, notes: []), 1)
    assert templates.find(message) is None


@given(st.text(max_size=20))
def test_an_id_may_come_last(request_id):
    """Whatever its bytes would be if they were a tensor: fields in any order mean the same."""
    server = Server(echoed(3))
    message = request_of([1, 2, 3]).SerializeToString() + pb.PredictRequest(id=request_id).SerializeToString()
    for _ in range(2):
        answer = server.predict(pb.PredictRequest.FromString(message))
        call = server.start("Predict", message)
        assert call.error is None
        server.engine.run()
        assert pb.PredictResponse.FromString(call.replies[0]) == answer


def test_a_number_in_the_place_of_an_id_is_no_id():
    """Protobuf keeps a field of another wire type apart, so it is not sent back as the id."""
    server = Server(echoed(3))
    message = b"\x1d1234" + request_of([1, 2, 3]).SerializeToString()
    answers = []
    for _ in range(2):
        call = server.start("Predict", message)
        server.engine.run()
        answers += call.replies
    assert answers[0] == answers[1]


@pytest.mark.parametrize("is_before", [True, False], ids=["before the id", "after it"])
def test_what_is_remembered_of_a_request_is_little(model, is_before):
    """A megabyte of a field that nobody knows is answered, and not kept."""
    templates = templates_of(model)
    padding, of_id = b"\x9a\x06" + wire.varint(1 << 20) + bytes(1 << 20), b"\x1a\x01a"
    head = padding + of_id if is_before else of_id + padding
    message = head + request_of([1, 2, 3]).SerializeToString()
    assert pb.PredictRequest.FromString(message).inputs.data
    templates.learn(message, Form("predict", model, 1, 12, lambda y, notes: []), 1)
    assert templates.find(message) is None


def test_a_change_of_the_repository_makes_templates_forget():
    """A form holds a model: once another may have its name, none is recognised, and none is kept."""
    repository = Repository([echoed(3)])
    templates = Templates(repository)
    request = request_of([1, 2, 3])
    message = request.SerializeToString()
    learned(templates, repository.get("iris"), request, repository.generation)
    assert templates.find(message) is not None
    gone = weakref.ref(repository.get("iris"))
    repository.put([echoed(3)])
    assert templates.find(message) is None
    gc.collect()
    assert gone() is None


def test_what_was_looked_up_before_a_change_is_not_learned_after_it():
    """A request that was parsed while its model was replaced leaves no template of the old model."""
    repository = Repository([echoed(3)])
    templates = Templates(repository)
    model, generation = repository.get("iris"), repository.generation
    repository.put([echoed(3)])
    request = request_of([1, 2, 3])
    learned(templates, model, request, generation)
    assert templates.find(request.SerializeToString()) is None


@settings(max_examples=30)
@given(st.lists(requests, min_size=1, max_size=8))
def test_answers_do_not_depend_on_what_was_seen_before(sequence):
    """A server that has seen other requests answers, or refuses, as one that has seen none."""
    server = Server(echoed(3, labels=["a", "b", "c"]))
    for request in sequence:
        fresh = Server(echoed(3, labels=["a", "b", "c"]))
        answers = []
        for one in (server, fresh):
            try:
                answers.append(one.predict(request))
            except Exception as error:
                answers.append((type(error), str(error)))
        assert answers[0] == answers[1]


def test_a_recognised_request_is_looked_through_for_nan():
    """reject_nonfinite holds for the second request of a form as for the first."""
    server = Server(echoed(3), limits=InferenceLimits(reject_nonfinite=True))
    assert rows_of(server.predict(request_of([1, 2, 3]))).tolist() == [[1, 2, 3]]
    with pytest.raises(InvalidArgument, match="nan at row 0, column 1"):
        server.predict(request_of([1, np.nan, 3]))
    assert rows_of(server.predict(request_of([4, 5, 6]))).tolist() == [[4, 5, 6]]


@given(requests)
def test_fields_lie_where_protobuf_has_put_them(request):
    """Each field's bytes, cut out, are a message with that field alone."""
    message = request.SerializeToString()
    found = list(wire.fields(message, 0, len(message)))
    assert [field.number for field in found] == [field.number for field, _ in request.ListFields()]
    for field, (descriptor, value) in zip(found, request.ListFields(), strict=True):
        alone = pb.PredictRequest.FromString(message[field.start : field.end])
        assert [entry.name for entry, _ in alone.ListFields()] == [descriptor.name]
        assert getattr(alone, descriptor.name) == value


@given(st.integers(0, 2**63 - 1))
def test_varints_are_those_of_protobuf(value):
    """As protobuf writes a positive int64."""
    assert pb.Tensor(shape=[value]).SerializeToString().endswith(wire.varint(value))
