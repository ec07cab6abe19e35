"""The bookkeeping of streams, without a network: any batches, any losses, the same results."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnclient import InternalError, InvalidInput, Labels, MessageTooLarge, Unavailable
from nnclient.conversation import Conversation, split_rows
from nnclient.wire import Question
from nnproto.v1 import inference_pb2 as pb


def answer_to(request: bytes) -> pb.PredictResponse:
    """The model of these tests: y = 2 x, in float32."""
    message = pb.PredictRequest.FromString(request)
    dtype = "<f4" if message.inputs.dtype == pb.DATA_TYPE_FLOAT32 else "<f8"
    y = 2 * np.frombuffer(message.inputs.data, dtype).astype("<f4")
    return pb.PredictResponse(
        model="m",
        id=message.id,
        outputs=pb.Tensor(shape=message.inputs.shape, dtype=pb.DATA_TYPE_FLOAT32, data=y.tobytes()),
    )


def refusal_of(request: bytes, code: int = 3) -> pb.PredictResponse:
    return pb.PredictResponse(
        id=pb.PredictRequest.FromString(request).id, error=pb.Error(code=code, message="refused")
    )


def make_conversation(
    max_in_flight: int = 4, message_bytes: int = 1024, output: Any = "outputs"
) -> Conversation:
    return Conversation(Question("m", output=output), message_bytes, "host:1", max_in_flight)


@settings(deadline=None, max_examples=200)
@given(
    row_counts=st.lists(st.integers(0, 400), max_size=8),
    max_in_flight=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_results_are_whole_and_in_order_whatever_is_lost(
    row_counts: list[int], max_in_flight: int, seed: int
) -> None:
    """However sending, answering and losing the connection interleave, each batch gets its own answer."""
    batches = [
        np.arange(rows * 3, dtype=np.float32).reshape(rows, 3) + 1000 * index
        for index, rows in enumerate(row_counts)
    ]
    # Not drawn step by step: thousands of draws are more than Hypothesis is made for.
    steps = random.Random(seed)
    talk = make_conversation(max_in_flight)
    to_come, results = list(batches), []
    on_the_wire: list[bytes] = []
    while not talk.is_finished:
        actions = []
        if talk.wants_batch:
            actions.append("add")
        if talk.has_request:
            actions.append("send")
        if on_the_wire:
            actions.append("answer")
        if talk.has_result:
            actions.append("pop")
        action = "lose" if steps.random() < 0.02 else steps.choice(actions)
        if action == "add":
            if to_come:
                talk.add_batch(to_come.pop(0))
            else:
                talk.end_input()
        elif action == "send":
            on_the_wire.append(talk.next_request() or b"")
        elif action == "answer":
            talk.receive(answer_to(on_the_wire.pop(0)))
        elif action == "pop":
            results.append(talk.pop_result())
        else:
            on_the_wire.clear()
            talk.rewind()
        assert talk.in_flight == len(on_the_wire) <= max_in_flight
    assert len(results) == len(batches)
    for result, batch in zip(results, batches, strict=True):
        assert isinstance(result, np.ndarray)
        assert np.array_equal(result, 2 * batch)


def exchange(talk: Conversation, answer: Any = answer_to) -> None:
    """Send and answer all there is."""
    while (request := talk.next_request()) is not None:
        talk.receive(answer(request))


def test_no_input_ahead_of_what_is_in_flight() -> None:
    """With max_in_flight requests unanswered, no batch is wanted and none is sent."""
    talk = make_conversation(max_in_flight=2)
    sent = []
    for value in range(2):
        assert talk.wants_batch
        talk.add_batch([[value, 0.0, 0.0]])
        sent.append(talk.next_request())
    assert not talk.wants_batch
    assert not talk.has_request
    talk.receive(answer_to(sent[0]))  # type: ignore[arg-type]
    assert not talk.wants_batch, "a result that no one has taken is still held in memory"
    talk.pop_result()
    assert talk.wants_batch


def test_bad_batches_do_not_pile_up() -> None:
    """Batches refused here never reach the wire, and still count against the bound."""
    talk = make_conversation(max_in_flight=3)
    for _ in range(3):
        talk.add_batch("nonsense")
    assert not talk.wants_batch
    assert isinstance(talk.pop_result(), InvalidInput)
    assert talk.wants_batch


def test_a_refused_piece_fails_its_batch_alone() -> None:
    """The rest of the batch is not asked for, its neighbours are answered, and the rows are named."""
    talk = make_conversation(max_in_flight=1, message_bytes=1024)
    talk.add_batch(np.zeros((200, 3), np.float32))
    pieces = 0

    def refuse_second(request: bytes) -> pb.PredictResponse:
        nonlocal pieces
        pieces += 1
        return refusal_of(request) if pieces == 2 else answer_to(request)

    exchange(talk, refuse_second)
    assert pieces == 2
    error = talk.pop_result()
    assert isinstance(error, InvalidInput)
    assert error.batch_index == 0
    first = 1024 - 1 - 128
    assert f"in rows {first // 12} to {2 * (first // 12) - 1} of x" in str(error)
    talk.add_batch([[1.0, 2.0, 3.0]])
    exchange(talk)
    assert np.array_equal(talk.pop_result(), [[2, 4, 6]])  # type: ignore[arg-type]


def test_draining_leaves_the_request_unanswered() -> None:
    """UNAVAILABLE for one request is about the server: it is sent again, elsewhere."""
    talk = make_conversation()
    talk.add_batch([[1.0, 2.0, 3.0]])
    request = talk.next_request()
    assert request is not None
    with pytest.raises(Unavailable):
        talk.receive(refusal_of(request, code=14))
    talk.rewind()
    assert talk.next_request() == request


def test_an_answer_out_of_turn_is_a_fault_of_the_server() -> None:
    """Answers are matched by id, so that rows can never be given to the wrong batch."""
    talk = make_conversation()
    talk.add_batch([[1.0]])
    talk.next_request()
    talk.add_batch([[2.0]])
    second = talk.next_request()
    assert second is not None
    with pytest.raises(InternalError, match="out of turn"):
        talk.receive(answer_to(second))


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (
            pb.Tensor(shape=[1, 3], dtype=pb.DATA_TYPE_FLOAT32, data=b"\0" * 12),
            r"outputs of shape \(1, 3\) for 2",
        ),
        (pb.Tensor(shape=[6], dtype=pb.DATA_TYPE_FLOAT32, data=b"\0" * 24), "outputs of shape"),
        (pb.Tensor(shape=[2, 3], dtype=pb.DATA_TYPE_FLOAT32, data=b"\0" * 23), "buffer size"),
        (pb.Tensor(shape=[2, 3]), "unknown dtype"),
    ],
)
def test_malformed_answers_are_internal_errors(tensor: pb.Tensor, text: str) -> None:
    """They fail their batch and say what the server sent."""
    talk = make_conversation()
    talk.add_batch(np.zeros((2, 3)))
    exchange(
        talk, lambda request: pb.PredictResponse(id=pb.PredictRequest.FromString(request).id, outputs=tensor)
    )
    error = talk.pop_result()
    assert isinstance(error, InternalError)
    with pytest.raises(InternalError, match=text):
        raise error


def test_labels_with_another_count_are_internal_errors() -> None:
    """top_k classes a row were asked for, and nothing else will do."""
    talk = make_conversation(output="labels")
    talk.add_batch(np.zeros((1, 3)))
    exchange(
        talk,
        lambda request: pb.PredictResponse(
            id=pb.PredictRequest.FromString(request).id, labels=[pb.RowLabels(top=[])]
        ),
    )
    assert isinstance(talk.pop_result(), InternalError)


def test_labels_are_joined_over_pieces() -> None:
    """A large batch's labels come as one Labels, although names differ in length."""

    def classify(request: bytes) -> pb.PredictResponse:
        message = pb.PredictRequest.FromString(request)
        x = np.frombuffer(message.inputs.data, "<f4")
        rows = [pb.RowLabels(top=[pb.LabelScore(label="n" * int(v), index=int(v), score=v / 9)]) for v in x]
        return pb.PredictResponse(id=message.id, labels=rows)

    x = (np.arange(1000) % 9 + 1).astype(np.float32)[:, None]
    talk = make_conversation(output="labels")
    talk.add_batch(x)
    exchange(talk, classify)
    labels = talk.pop_result()
    assert isinstance(labels, Labels)
    assert labels.shape == (1000, 1)
    assert labels.indices[:, 0].tolist() == x[:, 0].tolist()
    assert labels[8][0] == ("nnnnnnnnn", 9, 1.0)


def test_the_input_may_reuse_its_array() -> None:
    """What was sent once is sent again as it was, even if the caller has filled the array anew."""
    x = np.ones((1, 3), np.float32)
    talk = make_conversation()
    talk.add_batch(x)
    first = talk.next_request()
    x[:] = 9
    talk.rewind()
    assert talk.next_request() == first


def test_results_may_be_written_to() -> None:
    """An answer is the caller's own array."""
    talk = make_conversation()
    talk.add_batch(np.ones((1, 3)))
    exchange(talk)
    result = talk.pop_result()
    assert isinstance(result, np.ndarray)
    result += 1


@settings(deadline=None, max_examples=100)
@given(rows=st.integers(0, 20_000), columns=st.integers(0, 50), data_bytes=st.integers(400, 100_000))
def test_splitting_covers_every_row_once_within_the_bytes(rows: int, columns: int, data_bytes: int) -> None:
    """Ranges follow each other without gap, and each fits."""
    x = np.empty((rows, columns), np.float64)
    ranges = split_rows(x, data_bytes)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == rows
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(ranges))
    assert all(x[start:stop].nbytes <= data_bytes for start, stop in ranges)
    assert all(stop > start for start, stop in ranges) or rows == 0


def test_a_row_larger_than_a_message_is_refused() -> None:
    """Both sizes and both settings are named."""
    with pytest.raises(
        MessageTooLarge, match=r"one row of x is 8,000 bytes.*message_bytes.*--max-message-bytes"
    ):
        split_rows(np.zeros((1, 1000)), 7999)


def test_max_in_flight_is_checked() -> None:
    """None in flight would wait for ever."""
    with pytest.raises(InvalidInput, match="max_in_flight is 0"):
        make_conversation(max_in_flight=0)
