"""grpc.reflection by way of the seam: every name that is listed can be described."""

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2 as pb
from support.calls import FakeCall

from nnserver.api.health import SERVICE as HEALTH
from nnserver.api.inference import SERVICE as INFERENCE
from nnserver.api.reflection import SERVICES, ReflectionApi
from nnserver.errors import InvalidArgument, Status

V1, V1ALPHA = SERVICES


@pytest.fixture
def api():
    return ReflectionApi([INFERENCE, HEALTH], descriptor_pool.Default())


@pytest.fixture(params=SERVICES)
def stream(api, request):
    call = FakeCall()
    return call, api.methods()[f"/{request.param}/ServerReflectionInfo"].start(call)


def ask(api, **question):
    return api.answer(pb.ServerReflectionRequest(**question))


def pool_of(response):
    """What a client builds from an answer: fails if a file or one of its imports is missing."""
    pool = descriptor_pool.DescriptorPool()
    waiting = [
        descriptor_pb2.FileDescriptorProto.FromString(data)
        for data in response.file_descriptor_response.file_descriptor_proto
    ]
    assert waiting
    added: set[str] = set()
    while waiting:
        ready = [file for file in waiting if added.issuperset(file.dependency)]
        assert ready, f"missing imports of {[file.name for file in waiting]}"
        for file in ready:
            pool.AddSerializedFile(file.SerializeToString())
            added.add(file.name)
            waiting.remove(file)
    return pool


def test_all_services_are_listed(api):
    """The two services and both versions of reflection, sorted."""
    response = ask(api, list_services="*")
    names = [service.name for service in response.list_services_response.service]
    assert names == sorted([INFERENCE, HEALTH, V1, V1ALPHA])


def test_every_listed_service_can_be_described(api):
    """As grpcurl does: list the services, then ask for each one's file and build it with its imports."""
    for service in ask(api, list_services="*").list_services_response.service:
        pool = pool_of(ask(api, file_containing_symbol=service.name))
        assert pool.FindServiceByName(service.name).methods


@pytest.mark.parametrize(
    "symbol",
    [
        INFERENCE,
        f"{INFERENCE}.Predict",
        "nnproto.v1.PredictRequest",
        "nnproto.v1.DataType",
        "nnproto.v1.Tensor.data",
    ],
)
def test_services_methods_messages_enums_and_fields_are_symbols(api, symbol):
    """The file of each kind of symbol is found by the symbol's full name."""
    pool = pool_of(ask(api, file_containing_symbol=symbol))
    assert pool.FindFileByName("nnproto/v1/inference.proto").package == "nnproto.v1"


def test_a_file_is_found_by_its_name(api):
    """The name of a .proto file gives that file."""
    pool = pool_of(ask(api, file_by_filename="nnproto/v1/inference.proto"))
    assert pool.FindMessageTypeByName("nnproto.v1.PredictRequest").fields_by_name["inputs"].number == 6


@pytest.mark.parametrize(
    "question",
    [
        {"file_containing_symbol": "nnproto.v1.Nothing"},
        {"file_containing_symbol": ""},
        {"file_containing_symbol": "."},
        {"file_containing_symbol": "nnproto..v1\x00"},
        {"file_by_filename": "/etc/passwd"},
        {"file_by_filename": ""},
        {"file_containing_extension": {"containing_type": "nnproto.v1.Tensor", "extension_number": 100}},
        {"all_extension_numbers_of_type": "nnproto.v1.Tensor"},
        {},
    ],
    ids=str,
)
def test_what_there_is_not_is_not_found(api, question):
    """NOT_FOUND inside the answer, which repeats host and question, so that the stream lives on."""
    response = ask(api, host="here", **question)
    assert response.error_response.error_code == Status.NOT_FOUND
    assert response.error_response.error_message == "not found"
    assert response.valid_host == "here"
    assert response.original_request == pb.ServerReflectionRequest(host="here", **question)


def test_questions_are_answered_in_turn(stream):
    """Each question is answered and the next one asked for, one at a time; the end is the client's."""
    call, listener = stream
    for number, name in enumerate([INFERENCE, "nothing", HEALTH]):
        assert call.demand == number + 1
        listener.on_message(pb.ServerReflectionRequest(file_containing_symbol=name).SerializeToString())
    answers = [pb.ServerReflectionResponse.FromString(reply) for reply in call.replies]
    assert [answer.WhichOneof("message_response") for answer in answers] == [
        "file_descriptor_response", "error_response", "file_descriptor_response",
    ]  # fmt: skip
    assert not call.has_ended
    listener.on_half_close()
    assert call.is_finished


def test_bytes_that_are_no_question_end_the_stream(stream):
    """Undecodable bytes have no question to repeat: INVALID_ARGUMENT for the call."""
    call, listener = stream
    listener.on_message(b"\xff")
    assert isinstance(call.error, InvalidArgument)


def test_a_drain_ends_the_stream(stream):
    """An idle reflection stream ends with OK when the server drains."""
    call, listener = stream
    listener.on_drain()
    assert call.is_finished
