"""ModelInfer and ModelStreamInfer by way of the seam: statuses, order, deadlines, shared batches."""

import threading
import time

import numpy as np
import pytest
from support.calls import FakeCall
from support.models import random_mlp
from support.oip import OipServer, request_for, tensor_of
from support.serving import echoed, rows_of, served
from support.serving import request_for as own_request_for

from nnproto.oip import inference_pb2 as pb
from nnproto.v1 import inference_pb2 as own
from nnserver.api.inference import SERVICE as OWN_SERVICE
from nnserver.api.inference import InferenceApi, InferenceLimits
from nnserver.batcher import QueueLimits
from nnserver.errors import (
    Cancelled,
    Draining,
    Expired,
    InvalidArgument,
    KernelFault,
    MessageTooLarge,
    NotFound,
    QueueFull,
)

X = [[1.0, 2.0, 3.0]]


@pytest.fixture
def server():
    return OipServer(echoed(3))


def stream_answers(call):
    return [pb.ModelStreamInferResponse.FromString(reply) for reply in call.replies]


# One by one


def test_a_request_is_answered(server):
    response = server.infer(request_for(X, id="a"))
    assert (response.model_name, response.model_version, response.id) == ("iris", "1", "a")
    assert tensor_of(response).tolist() == X


def test_the_same_request_again_is_answered_with_its_own_rows_and_id(server):
    """Whatever is remembered of a request is not its rows, its id, or what it asks for."""
    for i in range(20):
        x = [[i, -i, 0.5]]
        response = server.infer(request_for(x, id=str(i % 3) * (i % 4), raw=i % 5 != 0))
        assert response.id == str(i % 3) * (i % 4)
        assert tensor_of(response).tolist() == x
        labels = server.infer(request_for(x, id="a", outputs=["labels"]))
        assert tensor_of(labels, "labels").tolist() == [[b"2" if i == 0 else b"0"]]


def test_bytes_that_are_no_request_are_refused(server):
    call = server.start("ModelInfer", b"\xff" * 9)
    assert isinstance(call.error, InvalidArgument)
    assert str(call.error) == "the message's 9 bytes are not a inference.ModelInferRequest"


def test_an_unknown_model_or_version_is_not_found(server):
    with pytest.raises(NotFound, match="unknown model 'rose'"):
        server.infer(request_for(X, model="rose"))
    with pytest.raises(NotFound, match="no model was named"):
        server.infer(request_for(X, model=""))
    with pytest.raises(NotFound, match="model 'iris' has no version '2'; it has version '1'"):
        server.infer(request_for(X, model_version="2"))
    assert tensor_of(server.infer(request_for(X, model_version="1"))).tolist() == X


def test_a_message_or_an_answer_that_is_too_large_names_the_setting():
    server = OipServer(echoed(3), limits=InferenceLimits(max_message_bytes=1024))
    with pytest.raises(MessageTooLarge, match="this server takes 1024 \\(max_message_bytes"):
        server.infer(request_for(X * 100))
    wide = OipServer(served(random_mlp(0, [1, 1000])), limits=InferenceLimits(max_message_bytes=1024))
    with pytest.raises(MessageTooLarge, match="the answer to 1 rows would have about 4"):
        wide.infer(request_for([[1.0]]))
    assert not wide.engine.jobs


def test_ballast_is_refused(server):
    """A parameter of 100 KB is ignored if it is not known, and too much all the same."""
    message = request_for(X)
    message.parameters["mine"].string_param = "x" * 100_000
    with pytest.raises(InvalidArgument, match="bytes for 3 numbers; expected at most 10 a number"):
        server.infer(message)
    rows = np.full((10_000, 3), 2**62)
    assert tensor_of(server.infer(request_for(rows, datatype="INT64", raw=False))).shape == (10_000, 3)


def test_non_finite_inputs_are_refused_if_so_set():
    server = OipServer(echoed(3), limits=InferenceLimits(reject_nonfinite=True))
    for _ in range(3):
        assert tensor_of(server.infer(request_for(X))).tolist() == X
        with pytest.raises(InvalidArgument, match="inputs has nan at row 1, column 2"):
            server.infer(request_for([*X, [0, 0, np.nan]]))


def test_a_full_queue_refuses_at_once():
    server = OipServer(served(random_mlp(0, [3, 1]), limits=QueueLimits(max_requests=1)))
    server.let_jobs_wait()
    waiting = server.start("ModelInfer", request_for(X).SerializeToString())
    refused = server.start("ModelInfer", request_for(X).SerializeToString())
    assert isinstance(refused.error, QueueFull)
    assert "max_queue_requests" in str(refused.error)
    server.engine.run_waiting()
    assert waiting.is_finished


def test_a_deadline_that_has_passed_costs_no_compute(server):
    call = server.start(
        "ModelInfer", request_for(X).SerializeToString(), FakeCall(deadline=time.monotonic() - 1)
    )
    assert isinstance(call.error, Expired)
    assert not server.engine.jobs


@pytest.mark.parametrize(
    ("call_s", "timeout_us", "expected_s"),
    [(None, 2_000_000, 2), (60, 2_000_000, 2), (1, 2_000_000, 1), (60, 0, 60), (None, 0, None)],
)
def test_a_timeout_is_a_deadline_unless_the_calls_is_earlier(server, call_s, timeout_us, expected_s):
    request = request_for(X)
    request.parameters["timeout"].int64_param = timeout_us
    before = time.monotonic()
    call = FakeCall(deadline=None if call_s is None else before + call_s)
    server.start("ModelInfer", request.SerializeToString(), call)
    ((_, job),) = server.engine.jobs
    if expected_s is None:
        assert job.caller.deadline is None
    else:
        assert before + expected_s <= job.caller.deadline <= time.monotonic() + expected_s
    server.engine.run()
    assert call.is_finished


def test_a_timeout_that_passes_in_the_queue_is_deadline_exceeded(server):
    """One microsecond: over before the engine looks."""
    request = request_for(X)
    request.parameters["timeout"].int64_param = 1
    server.let_jobs_wait()
    call = server.start("ModelInfer", request.SerializeToString())
    server.engine.run_waiting()
    assert isinstance(call.error, Expired)


def test_a_cancelled_call_costs_no_compute(server):
    server.let_jobs_wait()
    call = server.start("ModelInfer", request_for(X).SerializeToString())
    call.has_gone = True
    server.engine.run_waiting()
    assert isinstance(call.error, Cancelled)
    assert server.repository.get("iris").lane.batcher.statistics.totals().executions == 0


def test_a_kernel_fault_fails_the_call(server):
    call = server.start("ModelInfer", request_for(X).SerializeToString())
    server.engine.fail(KernelFault())
    assert isinstance(call.error, KernelFault)


# Streams


def test_a_stream_is_answered_in_the_order_of_its_requests(server):
    """Whichever is computed first; each answer is marked as the final one, as Triton does."""
    call, stream = server.open()
    for i in range(5):
        stream.on_message(request_for([[i, 0, 0]], id=str(i), raw=i != 3).SerializeToString())
    for index in (4, 0, 2, 0, 0):
        server.engine.run(index)
    answers = [answer.infer_response for answer in stream_answers(call)]
    assert [answer.id for answer in answers] == list("01234")
    assert [tensor_of(answer)[0, 0] for answer in answers] == [0, 1, 2, 3, 4]
    assert all(answer.parameters["triton_final_response"].bool_param for answer in answers)
    assert not call.has_ended
    stream.on_half_close()
    assert call.is_finished


def test_a_request_that_fails_is_told_with_its_id_and_the_stream_lives_on(server):
    """error_message says why; infer_response has the id, and the names that the client gave."""
    call, stream = server.open()
    messages = [
        request_for(X, id="0"),
        request_for([[1.0]], id="1", model_version="1"),
        request_for(X, id="2", model="rose"),
        request_for(X, id="3"),
        request_for(X, id="4"),
    ]
    for message in messages:
        stream.on_message(message.SerializeToString())
    stream.on_message(b"\xff" * 9)
    server.engine.run()
    server.engine.fail(KernelFault())
    server.engine.run()
    answers = stream_answers(call)
    assert [answer.infer_response.id for answer in answers] == ["0", "1", "2", "3", "4", ""]
    assert [answer.error_message for answer in answers] == [
        "",
        "inputs has shape (1, 1); model 'iris' expects (rows, 3)",
        "unknown model 'rose'; this server has 'iris'",
        "internal error; the server's log has the details",
        "",
        "the message's 9 bytes are not a inference.ModelInferRequest",
    ]
    failed = answers[1].infer_response
    assert (failed.model_name, failed.model_version, len(failed.outputs)) == ("iris", "1", 0)


def test_a_message_that_is_too_large_fails_alone():
    server = OipServer(echoed(3), limits=InferenceLimits(max_message_bytes=1024))
    call, stream = server.open()
    stream.on_message(request_for(X * 100, id="big").SerializeToString())
    stream.on_message(request_for(X, id="small").SerializeToString())
    server.engine.run()
    big, small = stream_answers(call)
    assert (big.infer_response.id, small.infer_response.id) == ("big", "small")
    assert "max_message_bytes" in big.error_message
    assert tensor_of(small.infer_response).tolist() == X


def test_a_window_of_requests_is_taken():
    """Each answer that is sent asks for one more request."""
    server = OipServer(echoed(3), limits=InferenceLimits(stream_window=2))
    call, stream = server.open()
    assert call.demand == 2
    for _ in range(2):
        stream.on_message(request_for(X).SerializeToString())
    server.engine.run(1)
    assert call.demand == 2
    server.engine.run(0)
    assert call.demand == 4


def test_a_drain_answers_what_was_taken(server):
    call, stream = server.open()
    stream.on_message(request_for(X, id="a").SerializeToString())
    stream.on_drain()
    stream.on_message(request_for(X, id="late").SerializeToString())
    assert not call.has_ended
    server.engine.run()
    assert [answer.infer_response.id for answer in stream_answers(call)] == ["a"]
    assert isinstance(call.error, Draining)


def test_a_half_close_waits_for_the_last_answer(server):
    call, stream = server.open()
    stream.on_message(request_for(X).SerializeToString())
    stream.on_half_close()
    assert not call.has_ended
    server.engine.run()
    assert call.is_finished


def test_timeouts_are_each_requests_own(server):
    """On a stream, too: the request with a timeout expires, the one without does not."""
    call, stream = server.open()
    server.let_jobs_wait()
    hurried = request_for(X, id="hurried")
    hurried.parameters["timeout"].int64_param = 1
    stream.on_message(hurried.SerializeToString())
    stream.on_message(request_for(X, id="patient").SerializeToString())
    server.engine.run_waiting()
    first, second = stream_answers(call)
    assert first.error_message.startswith("the deadline passed")
    assert second.error_message == ""


def test_answers_made_in_several_threads_keep_their_order(server):
    call, stream = server.open()
    for i in range(64):
        stream.on_message(request_for([[i, 0, 0]], id=str(i)).SerializeToString())
    jobs = server.engine.jobs
    start = threading.Barrier(8)

    def answer(k):
        start.wait(10)
        for lane, job in jobs[k::8][::-1]:
            job.form.deliver([job], lane.forward(np.frombuffer(job.data, np.float32).reshape(-1, 3)))

    threads = [threading.Thread(target=answer, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    answers = [answer.infer_response for answer in stream_answers(call)]
    assert [answer.id for answer in answers] == [str(i) for i in range(64)]
    assert [tensor_of(answer)[0, 0] for answer in answers] == list(range(64))


# Both services


def test_requests_of_both_services_are_computed_in_one_batch():
    """One execution for two requests of each service, raw and typed; each gets its own rows."""
    batches = []
    model = echoed(3)

    def forward(x):
        batches.append(len(x))
        return x.copy()

    model.lane.forward = forward
    server = OipServer(model)
    server.let_jobs_wait()
    own_methods = InferenceApi(server.repository, server.engine, InferenceLimits()).methods()
    predict = own_methods[f"/{OWN_SERVICE}/Predict"]
    calls = []
    for i in range(2):
        call = FakeCall()
        predict.start(call).on_message(own_request_for([[i, 0, 0]]).SerializeToString())
        calls.append(call)
        raw = request_for([[10 + i, 0, 0]], datatype=("FP32", "FP64")[i], raw=i == 0)
        calls.append(server.start("ModelInfer", raw.SerializeToString()))
    assert not any(call.has_ended for call in calls)
    server.engine.run_waiting()
    assert batches == [4]
    firsts = [
        rows_of(own.PredictResponse.FromString(calls[0].replies[0]))[0, 0],
        tensor_of(pb.ModelInferResponse.FromString(calls[1].replies[0]))[0, 0],
        rows_of(own.PredictResponse.FromString(calls[2].replies[0]))[0, 0],
        tensor_of(pb.ModelInferResponse.FromString(calls[3].replies[0]))[0, 0],
    ]
    assert firsts == [0, 10, 1, 11]
    totals = model.lane.batcher.statistics.totals()
    assert (totals.executions, totals.success.count, totals.rows) == (1, 4, 4)


# Requests that are recognised


def forms_of(server, *requests):
    """The forms of the jobs that *requests* become; equal ones were recognised."""
    for request in requests:
        call = server.start("ModelInfer", request.SerializeToString())
        assert call.error is None
    forms = [job.form for _, job in server.engine.jobs]
    while server.engine.jobs:
        server.engine.run()
    return forms


def test_a_request_like_an_earlier_one_is_recognised(server):
    """Other rows and another id of the same length: one form, so that a batch is encoded at once."""
    first, second = forms_of(server, request_for(X, id="a"), request_for([[4, 5, 6]], id="b"))
    assert first is second


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.parameters["timeout"].MergeFrom(pb.InferParameter(int64_param=10_000_000)),
        lambda r: setattr(r.inputs[0], "datatype", "UINT32"),
        lambda r: r.outputs.add(name="labels"),
        lambda r: setattr(r, "model_version", "1"),
        lambda r: setattr(r, "id", "longer"),
        lambda r: r.inputs[0].shape.__delitem__(0),
    ],
    ids=["timeout", "datatype", "outputs", "version", "id's length", "shape"],
)
def test_a_request_that_says_something_else_is_not(server, change):
    requests = [request_for(X, id="a") for _ in range(3)]
    change(requests[1])
    first, other, third = forms_of(server, *requests)
    assert first is third
    assert first is not other


def test_a_timeout_is_looked_at_every_time(server):
    """A request with one is not remembered: its deadline is its own."""
    request = request_for(X)
    request.parameters["timeout"].int64_param = 10_000_000
    first, second = forms_of(server, request, request)
    assert first is not second


def test_rows_that_are_converted_are_converted_every_time(server):
    for i in range(3):
        assert tensor_of(server.infer(request_for([[i, 0, 0]], datatype="FP64"))).tolist() == [[i, 0, 0]]
        assert tensor_of(server.infer(request_for([[i, 0, 0]], datatype="INT32"))).tolist() == [[i, 0, 0]]


@pytest.mark.parametrize("twice", ["id", "raw_input_contents"])
def test_a_field_that_comes_twice_is_left_to_the_parser(server, twice):
    """The last id counts; two raw contents are one too many."""
    again = pb.ModelInferRequest(id="b") if twice == "id" else pb.ModelInferRequest(raw_input_contents=[b""])
    message = request_for(X, id="a").SerializeToString() + again.SerializeToString()
    for _ in range(2):
        call = server.start("ModelInfer", message)
        if twice == "id":
            server.engine.run()
            assert pb.ModelInferResponse.FromString(call.replies[0]).id == "b"
        else:
            assert isinstance(call.error, InvalidArgument)


def test_rows_that_do_not_come_last_are_left_to_the_parser(server):
    """Fields in another order mean the same."""
    request = request_for(X, id="a")
    raw = pb.ModelInferRequest(raw_input_contents=request.raw_input_contents).SerializeToString()
    request.ClearField("raw_input_contents")
    for _ in range(2):
        call = server.start("ModelInfer", raw + request.SerializeToString())
        server.engine.run()
        assert tensor_of(pb.ModelInferResponse.FromString(call.replies[0])).tolist() == X


def test_requests_that_arrive_together_are_queued_together(server):
    """As a transport hands them over: each fails or is answered on its own."""
    server.let_jobs_wait()
    calls = [FakeCall() for _ in range(4)]
    messages = [request_for([[i, 0, 0]], id=str(i)).SerializeToString() for i in range(3)]
    handle_all = server.methods["/inference.GRPCInferenceService/ModelInfer"].handle_all
    handle_all(list(zip(calls, [*messages[:2], b"\xff", messages[2]], strict=True)))
    server.engine.run_waiting()
    assert isinstance(calls[2].error, InvalidArgument)
    answered = [pb.ModelInferResponse.FromString(calls[k].replies[0]) for k in (0, 1, 3)]
    assert [(answer.id, tensor_of(answer)[0, 0]) for answer in answered] == [("0", 0), ("1", 1), ("2", 2)]
    assert server.repository.get("iris").lane.batcher.statistics.totals().executions == 1
