"""A short form of `make soak`, and that it would find what it looks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from soak.ledger import Ledger
from soak.questions import Questions, save_models
from soak.run import Level, Soak, soak
from support.oip import tensor_of

from nnproto.oip import inference_pb2 as oip
from nnproto.v1 import inference_pb2 as own

SECONDS = 6.0


def test_every_request_is_accounted_for_and_nothing_is_left(transport: str) -> None:
    """Traffic of all kinds beside harm: none is lost or swapped, and the process is as before."""
    run = soak(transport, SECONDS)
    print("\n".join(run.report()))
    assert run.problems == []
    assert run.ledger.answered > 100
    assert run.harms


@pytest.fixture
def questions(tmp_path: Path) -> Questions:
    save_models(tmp_path)
    return Questions(tmp_path, 0)


def answer_own(message: own.PredictRequest, y: np.ndarray) -> own.PredictResponse:
    answer = own.PredictResponse(id=message.id)
    answer.outputs.shape.extend(y.shape)
    answer.outputs.dtype = message.inputs.dtype
    answer.outputs.data = y.tobytes()
    return answer


def test_a_swapped_answer_is_found(questions: Questions) -> None:
    """Of the same model and size, to the same id: by its bits."""
    seen = 0
    while seen < 20:
        one, other = questions.own(), questions.own()
        if one.kind != "nnproto replaced" or other.kind != one.kind or one.message.output != 1:
            continue
        seen += 1
        x = np.frombuffer(one.message.inputs.data, np.float32).reshape(one.message.inputs.shape)
        assert one.problem(answer_own(one.message, x * np.float32(3))) == ""
        mixed = x * np.float32(3)
        mixed[-1] = x[-1] * np.float32(5)
        if len(x) > 1:
            assert "not its own rows" in one.problem(answer_own(one.message, mixed))
        assert "was given the answer to" in one.problem(answer_own(other.message, x * np.float32(3)))


def test_one_bit_is_found(questions: Questions) -> None:
    question = questions.oip()
    while question.kind != "open inference digits" or question.message.outputs[0].name != "outputs":
        question = questions.oip()
    message = question.message
    answer = oip.ModelInferResponse(id=message.id)
    answer.outputs.add(name="outputs", datatype="FP32", shape=(question.rows, 10))
    answer.raw_output_contents.append(bytes(question.rows * 40))
    assert tensor_of(answer).shape == (question.rows, 10)
    assert "not its own rows" in question.problem(answer)


def test_a_lost_request_and_a_status_that_nothing_explains_are_found() -> None:
    ledger = Ledger()
    ledger.make("unary", 5)
    ledger.answer("unary", 3)
    ledger.fail("unary", "CANCELLED", ("CANCELLED",))
    assert (ledger.lost, ledger.wrongs) == (3, [])
    ledger.fail("unary", "INTERNAL", ("CANCELLED",), 2)
    assert ledger.lost == 1
    assert ledger.wrongs == ["unary: 2 failed with INTERNAL; allowed: CANCELLED"]
    assert ledger.answered + ledger.failed + ledger.lost == ledger.made


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (Level(100 << 10, 9, 20), "memory grew"),
        (Level(50 << 10, 14, 20), "threads grew"),
        (Level(50 << 10, 9, 25), "files grew"),
    ],
)
def test_a_process_that_holds_more_at_the_end_is_found(end: Level, text: str, tmp_path: Path) -> None:
    run = Soak("h2", 1.0, 0, tmp_path)
    try:
        run.warm, run.end = Level(50 << 10, 9, 20), end
        run.judge(0)
        (problem,) = run.problems
        assert text in problem
    finally:
        run.close()
