"""Answers: outputs of several requests at once, each put into words as protobuf would have it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.serving import echo_mlp, served

from nnproto.v1 import inference_pb2 as pb
from nnserver.api.answers import (
    error_answer,
    id_field,
    labels_encoder,
    largest_labels_bytes,
    tensor_encoder,
)
from nnserver.errors import NotFound, Status

IDS = st.lists(st.text(max_size=200), min_size=1, max_size=5)


def model_of(n=3, **of_mlp):
    return served(echo_mlp(n, **of_mlp))


def fields_of(ids):
    return [id_field(request_id) for request_id in ids]


@given(IDS, st.integers(0, 4), st.booleans(), st.sampled_from(["float32", "float64"]))
def test_tensors_are_what_protobuf_would_write(ids, rows, as_probabilities, dtype):
    """Each request gets its own rows under its own id, in the bytes that protobuf makes of them."""
    model = model_of(dtype=dtype)
    y = np.random.default_rng(rows).standard_normal((len(ids) * rows, 3)).astype(dtype)
    encode = tensor_encoder(model, rows, is_row=False, as_probabilities=as_probabilities)
    wanted = model.mlp.probabilities_from(y) if as_probabilities else y
    number = pb.DATA_TYPE_FLOAT32 if dtype == "float32" else pb.DATA_TYPE_FLOAT64
    for i, (request_id, answer) in enumerate(zip(ids, encode(y, fields_of(ids)), strict=True)):
        data = wanted[i * rows : (i + 1) * rows].tobytes()
        tensor = pb.Tensor(shape=(rows, 3), dtype=number, data=data)
        expected = pb.PredictResponse(model="iris", version="1", id=request_id, outputs=tensor)
        assert pb.PredictResponse.FromString(answer) == expected
        assert len(answer) == expected.ByteSize()


def test_a_row_is_answered_as_a_row():
    """An answer to a request of shape (n_in,) has shape (n_out,)."""
    (answer,) = tensor_encoder(model_of(), 1, is_row=True, as_probabilities=False)(
        np.ones((1, 3), "f4"), [b""]
    )
    assert list(pb.PredictResponse.FromString(answer).outputs.shape) == [3]


@pytest.mark.parametrize("ids", [[b""], [b"", b""]])
def test_outputs_are_written_row_by_row_and_little_endian(ids):
    """The bytes are those that indexing shows, whatever the array's memory order."""
    y = np.asfortranarray(np.arange(6 * len(ids), dtype="f4").reshape(2 * len(ids), 3))
    answers = tensor_encoder(model_of(), 2, is_row=False, as_probabilities=False)(y, ids)
    data = b"".join(pb.PredictResponse.FromString(answer).outputs.data for answer in answers)
    assert np.frombuffer(data, "<f4").tolist() == list(range(6 * len(ids)))


@given(IDS, st.integers(0, 3), st.integers(1, 3))
def test_labels_are_the_top_classes_of_each_row(ids, rows, k):
    """Each request gets the classes of its own rows, under its own id, within the size that is foretold."""
    model = model_of(labels=["a", "bé", "c" * 300])
    y = np.random.default_rng(k).standard_normal((len(ids) * rows, 3)).astype("f4")
    indices, scores = model.mlp.top_labels_from(y, k)
    for i, (request_id, answer) in enumerate(
        zip(ids, labels_encoder(model, rows, k)(y, fields_of(ids)), strict=True)
    ):
        response = pb.PredictResponse.FromString(answer)
        assert (response.model, response.version, response.id) == ("iris", "1", request_id)
        top = [[(entry.label, entry.index, entry.score) for entry in row.top] for row in response.labels]
        part = range(i * rows, (i + 1) * rows)
        assert top == [
            [
                (model.mlp.class_labels[index], index, score)
                for index, score in zip(indices[row].tolist(), scores[row].tolist(), strict=True)
            ]
            for row in part
        ]
        for row in response.labels:
            alone = pb.PredictResponse(labels=[row])
            assert alone.ByteSize() <= largest_labels_bytes(model, k)


def test_an_error_goes_with_the_id_of_its_request():
    """The answer to a failed request of a stream has the id, the status and the text, and no more."""
    answer = error_answer(id_field("7"), NotFound("no such model"))
    assert pb.PredictResponse.FromString(answer) == pb.PredictResponse(
        id="7", error=pb.Error(code=int(Status.NOT_FOUND), message="no such model")
    )
