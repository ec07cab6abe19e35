"""Bytes that no client would send: every one is answered, or refused with a status of its own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.calls import FakeCall
from support.oip import OipServer, request_for
from support.serving import echoed

from nnproto.oip import inference_pb2 as pb
from nnserver.api.oip import SERVICE
from nnserver.api.oip_infer import locate
from nnserver.errors import ServerError, Status

X = [[1.0, 2.0, 3.0]]


def seeds():
    """Requests with every kind of field."""
    full = request_for(X, id="seed", raw=False, outputs=["labels", "outputs"])
    full.outputs[1].parameters["classification"].int64_param = 2
    full.parameters["priority"].int64_param = 1
    full.parameters["mine"].double_param = 0.5
    return [
        request_for(X, id="seed").SerializeToString(),
        request_for(X, datatype="INT64", outputs=["probabilities"]).SerializeToString(),
        request_for(X, datatype="BF16", model_version="1").SerializeToString(),
        full.SerializeToString(),
    ]


@st.composite
def mutated(draw):
    """A request with a few bytes changed, cut, doubled or put in."""
    data = bytearray(draw(st.sampled_from(seeds())))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["change", "cut", "double", "insert", "truncate"]))
        size = draw(st.integers(1, 8))
        if kind == "change":
            data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "cut":
            del data[at : at + size]
        elif kind == "double":
            data[at:at] = data[at : at + 4 * size]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=size))
        else:
            del data[at:]
    return bytes(data)


def ask(server, message):
    """Answer *message* on a call of its own; return how the call ended."""
    call = server.start("ModelInfer", message)
    while server.engine.jobs:
        server.engine.run()
    assert call.has_ended
    return call


@given(st.one_of(mutated(), st.binary(max_size=60)))
@settings(max_examples=300)
def test_every_message_is_answered_or_refused_for_a_reason(message):
    """Never INTERNAL, and the next request is answered; what is answered once is answered so again."""
    server = OipServer(echoed(3))
    first, second = ask(server, message), ask(server, message)
    for call in (first, second):
        if call.error is not None:
            assert isinstance(call.error, ServerError)
            assert call.error.status not in (Status.INTERNAL, Status.UNKNOWN)
            assert len(str(call.error)) < 1000
    # The second may have been recognised, where the first was parsed.
    assert (first.error is None) == (second.error is None)
    assert [pb.ModelInferResponse.FromString(m) for m in first.replies] == [
        pb.ModelInferResponse.FromString(m) for m in second.replies
    ]
    assert ask(server, seeds()[0]).is_finished


@given(st.lists(st.one_of(mutated(), st.sampled_from(seeds())), max_size=6))
@settings(max_examples=100)
def test_a_stream_answers_each_message_whatever_it_is(messages):
    server = OipServer(echoed(3))
    call, stream = FakeCall(), None
    stream = server.methods[f"/{SERVICE}/ModelStreamInfer"].start(call)
    for message in messages:
        stream.on_message(message)
    stream.on_half_close()
    while server.engine.jobs:
        server.engine.run()
    assert call.is_finished
    assert len(call.replies) == len(messages)
    for reply in call.replies:
        pb.ModelStreamInferResponse.FromString(reply)


@pytest.mark.parametrize("name", ["ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady"])
@given(message=st.binary(max_size=40))
@settings(max_examples=50)
def test_other_methods_take_any_bytes(name, message):
    server = OipServer(echoed(3))
    call = server.start(name, message)
    assert call.has_ended
    assert call.error is None or call.error.status in (Status.INVALID_ARGUMENT, Status.NOT_FOUND)


@given(mutated())
def test_rows_are_located_only_where_a_parser_finds_them(message):
    """What is taken for rows is the one raw content, and what is taken for the id is the id."""
    try:
        request = pb.ModelInferRequest.FromString(message)
    except Exception:
        return  # Only what was parsed is ever learned.
    location = locate(message)
    if location is None or len(request.raw_input_contents) != 1:
        return
    of_id, rows = location
    assert message[rows.content : rows.end] == request.raw_input_contents[0]
    assert rows.end == len(message)
    if request.id:
        assert of_id is not None
        assert message[of_id.content : of_id.end].decode() == request.id
