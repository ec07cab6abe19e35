"""Differentiate and DifferentiateStream by way of the seam: answers, errors, batches and order."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.calls import FakeCall
from support.jobs import RecordedJob
from support.models import random_mlp
from support.serving import Server, array_of, derivative_of, request_for, rows_of, served

import nncore
from nnproto.v1 import inference_pb2 as pb
from nnserver.api.differentiate import _derivative
from nnserver.api.inference import InferenceLimits
from nnserver.batcher import Batcher, QueueLimits
from nnserver.derivatives import MOST_LANES
from nnserver.engine import Engine, Lane
from nnserver.errors import (
    Cancelled,
    Expired,
    InvalidArgument,
    MessageTooLarge,
    NotFound,
    NotInTime,
    QueueFull,
    ServerError,
)
from nnserver.metrics.model_history import ModelHistory
from nnserver.repository import Repository
from nnserver.served_model import ServedModel
from nnserver.statistics import ModelStatistics

RNG = np.random.default_rng(5)
KINDS = ("VJP", "JVP", "JACOBIAN", "VALUE_AND_GRAD", "HVP")
OF = {pb.OUTPUT_KIND_UNSPECIFIED: "outputs", pb.OUTPUT_KIND_OUTPUTS: "outputs"} | {
    pb.OUTPUT_KIND_PROBABILITIES: "probabilities"
}
IRIS = random_mlp(7, (4, 6, 3), "tanh")


def asked(kind: str, mlp: nncore.Mlp, rows: int | None, inputs: Any, outputs: Any, dtype: str) -> Any:
    """A request's fields, and what nncore says of the same: values and derivatives."""
    shape = () if rows is None else (rows,)
    x = RNG.standard_normal((*shape, mlp.n_in)).astype(dtype)
    fields: dict[str, Any] = {"input_indices": inputs or ()}
    if kind in ("VALUE_AND_GRAD", "HVP"):
        outputs = None if mlp.n_out == 1 else [mlp.n_out - 1]
    fields["output_indices"] = outputs or ()
    n_in, n_out = len(inputs or range(mlp.n_in)), len(outputs or range(mlp.n_out))
    v = RNG.standard_normal((*shape, n_out)).astype(dtype)
    t = RNG.standard_normal((*shape, n_in)).astype(dtype)

    def expected(of: str) -> tuple[Any, Any]:
        choice: Any = {"of": of, "inputs": inputs}
        if kind == "VJP":
            return mlp.value_and_vjp(x, v, outputs=outputs, **choice)
        if kind == "JVP":
            return mlp.value_and_jvp(x, t, outputs=outputs, **choice)
        if kind == "JACOBIAN":
            return mlp.value_and_jacobian(x, outputs=outputs, **choice)
        if kind == "VALUE_AND_GRAD":
            return mlp.value_and_grad(x, mlp.n_out - 1, **choice)
        return mlp.value_and_hvp(x, t, mlp.n_out - 1, **choice)

    if kind == "VJP":
        fields["cotangents"] = v
    if kind in ("JVP", "HVP"):
        fields["tangents"] = t
    return x, fields, expected


def failure_of(server: Server, request: pb.DifferentiateRequest) -> tuple[type, str]:
    with pytest.raises(ServerError) as caught:
        server.differentiate(request)
    assert not server.engine.jobs, "a request that was refused was queued"
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("model_dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", OF)
def test_values_and_derivatives_are_nncores_bits(kind: str, output: Any, model_dtype: str) -> None:
    """Whatever is asked for, in either dtype, for several rows, one, a single one and none."""
    mlp = random_mlp(3, (4, 5, 3), "swish", dtype=model_dtype)
    server = Server(served(mlp))
    for rows in (3, 1, None, 0):
        for inputs, outputs in ((None, None), ([2, 0], [1]), (None, [2, 0])):
            for dtype in ("float32", "float64"):
                x, fields, expected = asked(kind, mlp, rows, inputs, outputs, dtype)
                response = server.differentiate(derivative_of(x, kind, output=output, id="a", **fields))
                assert (response.model, response.version, response.id) == ("iris", "1", "a")
                assert not response.HasField("error")
                for got, right in zip(
                    (array_of(response.values), array_of(response.derivatives)),
                    expected(OF[output]),
                    strict=True,
                ):
                    assert got.dtype == model_dtype
                    np.testing.assert_array_equal(got, right, strict=True)


def test_values_are_predicts_bits() -> None:
    """One call gives f and its derivative: the values are those of Predict."""
    server = Server(served(IRIS))
    x = RNG.standard_normal((5, 4)).astype(np.float32)
    for output in (pb.OUTPUT_KIND_OUTPUTS, pb.OUTPUT_KIND_PROBABILITIES):
        values = array_of(server.differentiate(derivative_of(x, "JACOBIAN", output=output)).values)
        np.testing.assert_array_equal(values, rows_of(server.predict(request_for(x, output=output))))


def test_a_model_of_one_output_needs_no_index() -> None:
    """VALUE_AND_GRAD and HVP are of one output; of a model that has but one, it need not be named."""
    mlp = random_mlp(4, (3, 4, 1), "tanh")
    server, x = Server(served(mlp)), RNG.standard_normal((2, 3)).astype(np.float32)
    for indices in ((), (0,)):
        response = server.differentiate(derivative_of(x, "VALUE_AND_GRAD", output_indices=indices))
        np.testing.assert_array_equal(array_of(response.derivatives), mlp.value_and_grad(x)[1])


def test_what_answers_have_in_common_has_the_same_numbers() -> None:
    """Names, id and error are encoded by code that knows PredictResponse alone."""
    for name in ("model", "version", "id", "error"):
        predict, differentiate = (
            kind.DESCRIPTOR.fields_by_name[name] for kind in (pb.PredictResponse, pb.DifferentiateResponse)
        )
        assert (predict.number, predict.type) == (differentiate.number, differentiate.type)


X = np.ones((2, 4), np.float32)
ROW = "a row for each of inputs"


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        (
            "UNSPECIFIED",
            {},
            "kind is DERIVATIVE_KIND_UNSPECIFIED; expected DERIVATIVE_KIND_VJP, DERIVATIVE_KIND_JVP, "
            "DERIVATIVE_KIND_JACOBIAN, DERIVATIVE_KIND_VALUE_AND_GRAD or DERIVATIVE_KIND_HVP",
        ),
        (
            "JACOBIAN",
            {"output": pb.OUTPUT_KIND_LABELS},
            "output is OUTPUT_KIND_LABELS; expected OUTPUT_KIND_OUTPUTS or OUTPUT_KIND_PROBABILITIES, "
            "which have derivatives",
        ),
        (
            "JACOBIAN",
            {"output": 9},
            "output is 9; expected OUTPUT_KIND_OUTPUTS or OUTPUT_KIND_PROBABILITIES, which have derivatives",
        ),
        (
            "JACOBIAN",
            {"input_indices": [0, 4]},
            "input_indices[1] is 4; model 'iris' has inputs 0 to 3",
        ),
        (
            "JACOBIAN",
            {"output_indices": [2**32 - 1]},
            "output_indices[0] is 4294967295; model 'iris' has outputs 0 to 2",
        ),
        ("JACOBIAN", {"input_indices": [3, 1, 3]}, "input_indices[2] repeats input_indices[0]: 3"),
        (
            "JACOBIAN",
            {"output_indices": [0, 1, 2, 0]},
            "output_indices has 4 entries; model 'iris' has 3 outputs",
        ),
        (
            "HVP",
            {"tangents": X},
            "output_indices has 0 entries; DERIVATIVE_KIND_HVP is of one output: expected its index, "
            "from 0 to 2",
        ),
        (
            "VALUE_AND_GRAD",
            {"output_indices": [0, 2]},
            "output_indices has 2 entries; DERIVATIVE_KIND_VALUE_AND_GRAD is of one output: expected its "
            "index, from 0 to 2",
        ),
        ("VJP", {}, f"cotangents are missing; model 'iris' expects (2, 3), {ROW}"),
        ("JVP", {}, f"tangents are missing; model 'iris' expects (2, 4), {ROW}"),
        (
            "HVP",
            {"output_indices": [1], "input_indices": [3, 0]},
            f"tangents are missing; model 'iris' with 2 input_indices expects (2, 2), {ROW}",
        ),
        (
            "VJP",
            {"cotangents": np.ones((2, 4))},
            "cotangents has shape (2, 4); model 'iris' expects (rows, 3)",
        ),
        (
            "VJP",
            {"cotangents": np.ones((2, 3)), "output_indices": [1]},
            "cotangents has shape (2, 3); model 'iris' with 1 output_indices expects (rows, 1)",
        ),
        ("JVP", {"tangents": np.ones((3, 4))}, "tangents has 3 rows; expected 2, one for each of inputs"),
        (
            "VJP",
            {"cotangents": np.ones((2, 3)), "tangents": X},
            "tangents are given; DERIVATIVE_KIND_VJP takes cotangents",
        ),
        ("JACOBIAN", {"tangents": X}, "tangents are given; DERIVATIVE_KIND_JACOBIAN takes none"),
    ],
)
def test_wrong_requests_are_refused_by_name(kind: str, fields: dict[str, Any], text: str) -> None:
    """Each says what was wrong and what was expected, and nothing is computed."""
    assert failure_of(Server(served(IRIS)), derivative_of(X, kind, **fields)) == (InvalidArgument, text)


def test_what_predict_refuses_is_refused_alike() -> None:
    """Unknown models, shapes, dtypes, byte counts, what is no message, and NaN if the server is told so."""
    server = Server(served(IRIS), limits=InferenceLimits(reject_nonfinite=True))
    right = derivative_of(X, "JVP", tangents=X)
    assert failure_of(server, derivative_of(X, "JACOBIAN", model="rose"))[0] is NotFound
    for broken, text in (
        (derivative_of(X[:, :2], "JACOBIAN"), "inputs has shape (2, 2); model 'iris' expects (rows, 4)"),
        (pb.DifferentiateRequest(model="iris", kind=right.kind), "inputs has dtype DATA_TYPE_UNSPECIFIED"),
        (derivative_of(X, "JVP", tangents=X * np.nan), "tangents has nan at row 0, column 0"),
        (derivative_of(X * np.inf, "JACOBIAN"), "inputs has inf at row 0, column 0"),
    ):
        kind, message = failure_of(server, broken)
        assert kind is InvalidArgument
        assert message.startswith(text)
    right.tangents.data = right.tangents.data[:-1]
    assert failure_of(server, right)[1] == "tangents has 31 bytes of data; shape (2, 4) of float32 takes 32"
    call = server.start("Differentiate", b"\xff")
    assert "are not a nnproto.v1.DifferentiateRequest" in str(call.error)


def test_an_answer_too_large_is_refused_before_it_is_computed() -> None:
    """A few rows can ask for megabytes of Jacobians: the size is known, and fewer inputs make it fit."""
    mlp = random_mlp(1, (64, 64))
    server = Server(served(mlp), limits=InferenceLimits(max_message_bytes=100_000))
    x = np.zeros((8, 64), np.float32)
    kind, text = failure_of(server, derivative_of(x, "JACOBIAN"))
    assert kind is MessageTooLarge
    values_and_jacobians = 8 * (64 + 64 * 64) * 4
    assert f"the answer to 8 rows would have about {values_and_jacobians + 256} bytes" in text
    few = server.differentiate(derivative_of(x, "JACOBIAN", input_indices=range(8)))
    assert tuple(few.derivatives.shape) == (8, 64, 8)


@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 5),
    chosen=st.sets(st.integers(0, 3), min_size=1),
)
@settings(max_examples=30)
def test_the_size_that_is_checked_is_the_answers(kind: str, rows: int, chosen: set[int]) -> None:
    """An answer is never larger than what was checked, and no more than the envelope's 256 bytes smaller."""
    x, fields, _ = asked(kind, IRIS, rows, sorted(chosen), None, "float32")
    request = derivative_of(x, kind, id="an id", **fields)
    size = len(Server(served(IRIS)).differentiate(request).SerializeToString())
    limits = InferenceLimits(max_message_bytes=max(size + 256, request.ByteSize()))
    Server(served(IRIS), limits=limits).differentiate(request)
    if request.ByteSize() < size:
        with pytest.raises(MessageTooLarge):
            Server(served(IRIS), limits=InferenceLimits(max_message_bytes=size - 1)).differentiate(request)


# Batches


def lanes_of(server: Server) -> list[Any]:
    return [lane for lane, _ in server.engine.jobs]


def test_requests_for_one_derivative_travel_together() -> None:
    """Kind, output kind and selection decide, not rows or ids; values are of the row alone."""
    server = Server(served(IRIS))
    same = [
        derivative_of(RNG.standard_normal((n, 4)).astype(np.float32), "JACOBIAN", id=str(n)) for n in (1, 3)
    ]
    others = [
        derivative_of(X, "VALUE_AND_GRAD", output_indices=[1]),
        derivative_of(X, "JACOBIAN", output=pb.OUTPUT_KIND_PROBABILITIES),
        derivative_of(X, "JACOBIAN", input_indices=[1]),
        derivative_of(X, "JACOBIAN", input_indices=[1], output_indices=[0]),
    ]
    # All inputs, named in order, are all inputs.
    same.append(derivative_of(X, "JACOBIAN", input_indices=range(4), output_indices=range(3)))
    for request in (*same, *others):
        server.start("Differentiate", request.SerializeToString())
    lanes = lanes_of(server)
    assert len(set(lanes[:3])) == 1
    assert len({*lanes}) == 1 + len(others)
    assert all(lane.batcher.statistics is lanes[0].batcher.statistics for lane in lanes)


def test_what_waits_for_all_derivatives_of_a_model_is_bounded_together() -> None:
    """Two kinds have two queues; together they hold no more than one would."""
    model = served(IRIS, limits=QueueLimits(max_requests=3))
    lanes = [
        model.derivatives.lane_of(derivative)
        for derivative in derivatives_of(
            model, [derivative_of(X, "JACOBIAN"), derivative_of(X, "JVP", tangents=X)]
        )
    ]
    jobs = [job for _ in range(2) for job in waiting_jobs(X, lanes)]
    for lane, job in jobs[:3]:
        lane.batcher.put(job)
    with pytest.raises(QueueFull, match="3 requests for its derivatives, max_queue_requests"):
        jobs[3][0].batcher.put(jobs[3][1])
    lanes[0].batcher.take()
    jobs[3][0].batcher.put(jobs[3][1])


def test_the_bytes_that_wait_are_bounded_together() -> None:
    """Not even an empty queue takes a job while the others hold as much as may wait."""
    model = served(IRIS, limits=QueueLimits(max_bytes=X.nbytes))
    lanes = [
        model.derivatives.lane_of(derivative)
        for derivative in derivatives_of(
            model, [derivative_of(X, "JACOBIAN"), derivative_of(X, "JVP", tangents=X)]
        )
    ]
    (lane, job), (other, second) = waiting_jobs(X, lanes)
    lane.batcher.put(job)
    with pytest.raises(QueueFull):
        other.batcher.put(second)
    lane.batcher.take()
    other.batcher.put(second)


def derivatives_of(model: Any, requests: list[pb.DifferentiateRequest]) -> list[Any]:
    return [_derivative(request, model) for request in requests]


def waiting_jobs(x: Any, lanes: list[Any]) -> list[Any]:
    return [(lane, RecordedJob(x)) for lane in lanes]


def test_a_lane_that_is_idle_makes_room_and_one_that_is_not_stays() -> None:
    """Clients choose what they ask for; lanes are few, and no waiting job is forgotten."""
    model = served(random_mlp(2, (10, 2)))
    x = np.ones((1, 10), np.float32)
    (first,) = derivatives_of(model, [derivative_of(x, "JACOBIAN")])
    wanted = [replace(first, inputs=(i, j), n_in=2) for i in range(10) for j in range(10) if i != j][
        : MOST_LANES + 1
    ]
    lanes = [model.derivatives.lane_of(each) for each in wanted[:-1]]
    lanes[0].batcher.put(waiting_jobs(x, lanes)[0][1])
    assert model.derivatives.lane_of(wanted[-1]) not in lanes
    assert model.derivatives.lane_of(wanted[0]) is lanes[0]
    assert model.derivatives.lane_of(wanted[1]) is not lanes[1], "it was idle, and the least recently used"


def test_too_many_kinds_at_once_are_refused() -> None:
    """If all lanes have work, a further kind of derivative is RESOURCE_EXHAUSTED."""
    model = served(random_mlp(2, (10, 2)))
    x = np.ones((1, 10), np.float32)
    (first,) = derivatives_of(model, [derivative_of(x, "JACOBIAN")])
    wanted = [replace(first, inputs=(i, j), n_in=2) for i in range(10) for j in range(10) if i != j][
        : MOST_LANES + 1
    ]
    lanes = [model.derivatives.lane_of(each) for each in wanted[:-1]]
    for lane, job in waiting_jobs(x, lanes):
        lane.batcher.put(job)
    with pytest.raises(QueueFull, match=f"{MOST_LANES} different derivatives of model 'iris'"):
        model.derivatives.lane_of(wanted[-1])


def test_the_first_batch_is_not_for_an_event_loop_and_the_next_ones_are_if_short() -> None:
    """What was never computed has no known cost; then it has the measured or the estimated one."""
    model = served(IRIS)
    model.lane.row_cost_s = 2e-6
    (wanted,) = derivatives_of(model, [derivative_of(X, "JACOBIAN")])
    lane = model.derivatives.lane_of(wanted)
    assert lane.row_cost_s == np.inf
    assert lane.rows_of_a_turn() == 1428, "20 ms of 2 us for each of 7 passes"
    lane.note_cost(10, 3.0)  # compiling
    assert lane.row_cost_s == pytest.approx(14e-6)
    lane.note_cost(1, 24e-6)
    assert lane.row_cost_s == pytest.approx(15e-6)


def test_what_compiling_took_is_not_taken_for_the_price_of_a_row() -> None:
    """A queue whose first batch took seconds refuses nobody for it; it learns from the second."""
    (wanted,) = derivatives_of(served(IRIS), [derivative_of(X, "JACOBIAN")])
    batcher = served(IRIS).derivatives.lane_of(wanted).batcher
    now = batcher.clock()
    for elapsed_s, is_taken in ((5.0, True), (5.0, False)):
        batcher.put(RecordedJob(X))
        batcher.take()
        batcher.note_run(192, elapsed_s)
        batcher.put(RecordedJob(np.ones((192, 4))))
        late = RecordedJob(X, deadline=now + 2)
        if is_taken:
            batcher.put(late)
        else:
            with pytest.raises(NotInTime):
                batcher.put(late)
        batcher.take()


def test_requests_in_flight_are_counted_over_all_lanes() -> None:
    """Metrics see those that wait for derivatives, and those that run, once."""
    mlp = random_mlp(7, (4, 6, 3), "tanh")
    statistics = ModelStatistics(is_detailed=True)
    lane = Lane(Batcher("iris", statistics=statistics), mlp.forward, 4, mlp.dtype)
    model = ServedModel("iris", "1", mlp, lane)
    (wanted,) = derivatives_of(model, [derivative_of(X, "JACOBIAN")])
    other = model.derivatives.lane_of(wanted)
    history = ModelHistory(Repository([model]))
    assert history.batchers()["iris", "1"] == [lane.batcher, other.batcher]
    lane.batcher.put(RecordedJob(X))
    other.batcher.put(RecordedJob(X))
    other.batcher.take()
    assert (len(lane.batcher), len(other.batcher), statistics.running()) == (1, 0, 1)


class KeepingJob(RecordedJob):
    """A job that keeps what it was given as it is."""

    def deliver(self, jobs: Any, y: Any) -> int:
        self.outputs = y
        self._answered.set()
        return 0


def test_who_left_while_a_batch_ran_gets_no_derivatives_and_the_others_get_theirs() -> None:
    """Rows of the living are picked from values and derivatives alike."""
    model = served(IRIS)
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    (wanted,) = derivatives_of(model, [derivative_of(x, "JACOBIAN")])
    lane = model.derivatives.lane_of(wanted)
    # A second between any two looks: so long that it is worth looking who has gone.
    lane.batcher.clock = itertools.count().__next__
    jobs = [KeepingJob(x[i : i + 1]) for i in range(3)]
    forward = lane.forward

    def leaving(rows: Any) -> Any:
        jobs[1].has_gone = True
        return forward(rows)

    lane.forward = leaving
    engine = Engine(threads=1)
    try:
        engine.submit_all(lane, jobs)
        engine.run_waiting()
        for job in jobs:
            job.wait()
    finally:
        engine.close()
    assert isinstance(jobs[1].error, Cancelled)
    values, jacobians = model.mlp.value_and_jacobian(x)
    for index in (0, 2):
        np.testing.assert_array_equal(jobs[index].outputs.values[0], values[index])
        np.testing.assert_array_equal(jobs[index].outputs.derivatives[0], jacobians[index])


def test_deadlines_and_cancellation_are_as_for_predictions() -> None:
    """Who waits no longer costs nothing, on arrival already."""
    server = Server(served(IRIS))
    message = derivative_of(X, "JACOBIAN").SerializeToString()
    assert isinstance(server.start("Differentiate", message, FakeCall(deadline=0.0)).error, Expired)
    gone = FakeCall()
    gone.has_gone = True
    assert isinstance(server.start("Differentiate", message, gone).error, Cancelled)
    assert not server.engine.jobs


# Streams


def test_a_stream_answers_in_order_and_lives_on_after_an_error() -> None:
    """Requests for different derivatives, run in another order; one is wrong and says so with its id."""
    server = Server(served(IRIS))
    call, listener = server.open("DifferentiateStream")
    for request in (
        derivative_of(X, "JACOBIAN", id="a"),
        derivative_of(X, "HVP", id="b", tangents=X),
        derivative_of(X, "VALUE_AND_GRAD", id="c", output_indices=[1]),
    ):
        listener.on_message(request.SerializeToString())
    listener.on_half_close()
    server.engine.run(1)
    server.engine.run(0)
    assert call.is_finished
    answers = [pb.DifferentiateResponse.FromString(reply) for reply in call.replies]
    assert [answer.id for answer in answers] == ["a", "b", "c"]
    assert [answer.error.code for answer in answers] == [0, 3, 0]
    assert answers[1].error.message.startswith("output_indices has 0 entries")
    assert not answers[1].HasField("values")
    np.testing.assert_array_equal(array_of(answers[2].derivatives), IRIS.value_and_grad(X, 1)[1])


def test_a_model_that_was_differentiated_is_freed_with_its_last_job() -> None:
    """Nothing keeps it: no lane, no queue, no cycle that only the garbage collector would find."""
    mlp = random_mlp(7, (4, 6, 3), "tanh")
    gc.collect()
    gc.disable()
    try:
        server = Server(served(mlp))
        server.differentiate(derivative_of(X, "JACOBIAN"))
        server.differentiate(derivative_of(X, "JVP", tangents=X))
        kept = weakref.ref(mlp)
        del mlp
        server.repository.remove("iris")
        assert kept() is None
    finally:
        gc.enable()
