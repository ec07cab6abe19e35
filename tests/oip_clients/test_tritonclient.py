"""NVIDIA's tritonclient against nnserver: synchronous, asyncio, streams, statistics and model control."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from support.models import save_scale
from support.server import ServerProcess
from tritonclient.utils import InferenceServerException

import nncore

X = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Any]:
    with triton.InferenceServerClient(server.address) as client:
        yield client


def inputs_of(x: Any, datatype: str = "FP32", of: Any = triton) -> list[Any]:
    tensor = of.InferInput("inputs", list(x.shape), datatype)
    tensor.set_data_from_numpy(x)
    return [tensor]


def outputs_of(*names: str, **options: Any) -> list[Any]:
    return [triton.InferRequestedOutput(name, **options) for name in names]


def error_of(call: Any, *arguments: Any, **options: Any) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, **options)
    return caught.value


def test_the_server_and_its_models_describe_themselves(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("iris")
    assert client.is_model_ready("iris", "1")
    assert not client.is_model_ready("rose")
    metadata = client.get_server_metadata()
    assert metadata.name == "nnserve"
    assert "statistics" in metadata.extensions
    model = client.get_model_metadata("iris", as_json=True)
    assert model["versions"] == ["1", "2"]
    assert model["inputs"] == [{"name": "inputs", "datatype": "FP32", "shape": ["-1", "4"]}]
    assert [output["name"] for output in model["outputs"]] == ["outputs", "probabilities", "labels"]
    config = client.get_model_config("iris").config
    assert (config.name, list(config.input[0].dims), config.max_batch_size) == ("iris", [4], 4096)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_request_is_answered_with_all_outputs(
    client: Any, iris: nncore.Mlp, compression: str | None
) -> None:
    result = client.infer("iris", inputs_of(X), request_id="a", compression_algorithm=compression)
    assert np.array_equal(result.as_numpy("outputs"), iris.forward(X))
    assert np.array_equal(result.as_numpy("probabilities"), iris.predict_proba(X))
    indices, _ = iris.top_labels_from(iris.forward(X))
    assert result.as_numpy("labels").tolist() == [[iris.class_labels[i].encode()] for i in indices[:, 0]]
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("a", "iris", "2")


def test_versions_outputs_and_parameters_of_a_request(client: Any, iris: nncore.Mlp) -> None:
    result = client.infer(
        "iris",
        inputs_of(X),
        model_version="1",
        outputs=outputs_of("probabilities"),
        priority=3,
        timeout=10_000_000,
        sequence_id=5,
        sequence_start=True,
        parameters={"mine": "yes"},
    )
    assert result.get_response().model_version == "1"
    assert [output.name for output in result.get_response().outputs] == ["probabilities"]


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [
        ("FP64", np.float64),
        ("FP16", np.float16),
        ("INT8", np.int8),
        ("UINT16", np.uint16),
        ("INT64", np.int64),
    ],
)
def test_other_datatypes_are_converted(client: Any, iris: nncore.Mlp, datatype: str, dtype: Any) -> None:
    x = np.arange(8).reshape(2, 4).astype(dtype)
    result = client.infer("iris", inputs_of(x, datatype), outputs=outputs_of("outputs"))
    assert np.array_equal(result.as_numpy("outputs"), iris.forward(x.astype(np.float32)))


def test_bfloat16_as_tritonclient_writes_it(client: Any, iris: nncore.Mlp) -> None:
    x = np.array([[1.5, -2.0, 0.25, 3.0]], ml_dtypes.bfloat16)
    result = client.infer("iris", inputs_of(x, "BF16"), outputs=outputs_of("outputs"))
    assert np.array_equal(result.as_numpy("outputs"), iris.forward(x.astype(np.float32)))


def test_a_float64_model(client: Any, iris: nncore.Mlp) -> None:
    x = X.astype(np.float64)
    result = client.infer("iris64", inputs_of(x, "FP64"), outputs=outputs_of("outputs"))
    assert np.array_equal(result.as_numpy("outputs"), iris.astype("float64").forward(x))


def test_classification(client: Any, iris: nncore.Mlp) -> None:
    result = client.infer("iris", inputs_of(X), outputs=outputs_of("probabilities", class_count=2))
    indices, scores = iris.top_labels_from(iris.forward(X), 2)
    texts = result.as_numpy("probabilities")
    assert texts.shape == (5, 2)
    for text, index, score in zip(texts.ravel(), indices.ravel(), scores.ravel(), strict=True):
        value, position, label = text.decode().split(":")
        assert np.float32(value) == score
        assert int(position) == index
        assert label == iris.class_labels[index]


def test_no_rows(client: Any) -> None:
    result = client.infer("iris", inputs_of(np.zeros((0, 4), np.float32)), outputs=outputs_of("outputs"))
    assert result.as_numpy("outputs").shape == (0, 3)


@pytest.mark.parametrize(
    ("model", "x", "status", "text"),
    [
        ("iris", X[:, :3], "INVALID_ARGUMENT", "inputs has shape (5, 3); model 'iris' expects (rows, 4)"),
        ("rose", X, "NOT_FOUND", "unknown model 'rose'; this server has 'iris', 'iris64'"),
    ],
)
def test_a_wrong_request_raises_with_status_and_reason(
    client: Any, model: str, x: Any, status: str, text: str
) -> None:
    error = error_of(client.infer, model, inputs_of(x))
    assert error.status() == f"StatusCode.{status}"
    assert error.message() == text
    assert client.infer("iris", inputs_of(X)).as_numpy("outputs").shape == (5, 3)


def test_shared_memory_is_refused(client: Any) -> None:
    tensor = triton.InferInput("inputs", [1, 4], "FP32")
    tensor.set_shared_memory("region", 16)
    assert "shared memory" in error_of(client.infer, "iris", [tensor]).message()
    assert error_of(client.get_system_shared_memory_status).status() == "StatusCode.UNIMPLEMENTED"


def test_many_asynchronous_requests(client: Any, iris: nncore.Mlp) -> None:
    """async_infer: callbacks, as they come."""
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for i in range(50):
        client.async_infer(
            "iris",
            inputs_of(X[i % 5 : i % 5 + 1]),
            callback=lambda result, error, i=i: done.put((i, result, error)),
            outputs=outputs_of("outputs"),
        )
    for _ in range(50):
        i, result, error = done.get(timeout=30)
        assert error is None
        assert np.array_equal(result.as_numpy("outputs"), iris.forward(X[i % 5 : i % 5 + 1]))


def test_a_stream_is_answered_in_order_and_outlives_errors(client: Any, iris: nncore.Mlp) -> None:
    """Errors come through the callback, with the reason; the stream goes on."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for i in range(30):
        model = "rose" if i % 10 == 7 else "iris"
        client.async_stream_infer(
            model, inputs_of(X[i % 5 :]), request_id=str(i), enable_empty_final_response=i % 2 == 0
        )
    for i in range(30):
        result, error = answers.get(timeout=30)
        if i % 10 == 7:
            assert error.message().startswith("unknown model 'rose'")
        else:
            assert error is None
            response = result.get_response()
            assert response.id == str(i)
            assert response.parameters["triton_final_response"].bool_param
            assert np.array_equal(result.as_numpy("outputs"), iris.forward(X[i % 5 :]))
    client.stop_stream()


def test_asyncio(server: ServerProcess, iris: nncore.Mlp) -> None:
    async def run() -> None:
        async with triton_aio.InferenceServerClient(server.address) as client:
            assert await client.is_server_ready()
            results = await asyncio.gather(
                *(client.infer("iris", inputs_of(X[i : i + 1], of=triton_aio)) for i in range(5))
            )
            for i, result in enumerate(results):
                assert np.array_equal(result.as_numpy("outputs"), iris.forward(X[i : i + 1]))
            with pytest.raises(InferenceServerException, match="unknown model"):
                await client.infer("rose", inputs_of(X, of=triton_aio))

            async def requests() -> Any:
                for i in range(10):
                    yield {"model_name": "iris", "inputs": inputs_of(X, of=triton_aio), "request_id": str(i)}

            ids = []
            async for result, error in client.stream_infer(requests()):
                assert error is None
                ids.append(result.get_response().id)
            assert ids == [str(i) for i in range(10)]

    asyncio.run(run())


def test_statistics(client: Any) -> None:
    def now() -> Any:
        (stats,) = client.get_inference_statistics("iris64").model_stats
        return stats

    before = now()
    client.infer("iris64", inputs_of(X.astype(np.float64), "FP64"))
    error_of(client.infer, "iris64", inputs_of(X[:, :3]))
    after = now()
    assert after.inference_count == before.inference_count + 5
    assert after.execution_count == before.execution_count + 1
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert len(client.get_inference_statistics().model_stats) == 3


def test_model_control(client: Any, folder: Path) -> None:
    file = save_scale(folder / "scale.safetensors", 2.0, n=4)
    try:
        assert not client.is_model_ready("scale")
        client.load_model("scale")
        assert client.is_model_ready("scale")
        result = client.infer("scale", inputs_of(X), outputs=outputs_of("outputs"))
        assert np.array_equal(result.as_numpy("outputs"), 2 * X)
        index = {model.name: model for model in client.get_model_repository_index().models}
        assert (index["scale"].version, index["scale"].state) == ("1", "READY")
        file.write_bytes(b"")
        assert error_of(client.load_model, "scale").status() == "StatusCode.FAILED_PRECONDITION"
        assert client.is_model_ready("scale")
        assert "config" in error_of(client.load_model, "scale", config="{}").message()
        client.unload_model("scale")
        assert not client.is_model_ready("scale")
    finally:
        file.unlink()
    assert error_of(client.load_model, "scale").status() == "StatusCode.NOT_FOUND"
