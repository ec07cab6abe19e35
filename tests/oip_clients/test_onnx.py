"""A repository of ONNX files as their tools write them, asked by tritonclient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper, numpy_helper
from support.server import running
from tritonclient.utils import InferenceServerException

X = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)


def network(scale: float) -> tuple[Any, Any]:
    """An ONNX model, relu(x @ w) @ v + b with weights times *scale*, and the function that it is."""
    rng = np.random.default_rng(0)
    w, v = (scale * rng.standard_normal(shape).astype(np.float32) for shape in ((4, 64), (64, 3)))
    b = rng.standard_normal(3).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(array, name) for array, name in ((w, "w"), (v, "v"), (b, "b"))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, lambda x: np.maximum(x.astype(np.float64) @ w, 0) @ v + b


def save(model: Any, path: Path, apart: bool = False) -> None:
    """Write *model*; its weights in a file beside it if *apart*."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path, save_as_external_data=apart, location="weights.bin", size_threshold=0)


@pytest.mark.parametrize("apart", [False, True], ids=["one file", "weights apart"])
def test_onnx_files_are_served_and_replaced(tmp_path: Path, transport: str, apart: bool) -> None:
    """As NAME.onnx and as NAME/VERSION/model.onnx; a file that is no model leaves the old one serving."""
    (first, of_first), (second, of_second) = network(0.5), network(0.25)
    save(first, tmp_path / "net" / "1" / "model.onnx", apart)
    if not apart:
        save(second, tmp_path / "flat.onnx")
    with (
        running(str(tmp_path), "--transport", transport, "--model-control") as server,
        triton.InferenceServerClient(server.address) as client,
    ):

        def answer(model: str) -> Any:
            tensor = triton.InferInput("inputs", list(X.shape), "FP32")
            tensor.set_data_from_numpy(X)
            return client.infer(model, [tensor]).as_numpy("outputs")

        # Two roundings a multiplication at most, of 64 that are summed up.
        assert np.allclose(answer("net"), of_first(X), rtol=1e-5, atol=1e-5)
        if not apart:
            assert np.allclose(answer("flat"), of_second(X), rtol=1e-5, atol=1e-5)
        save(second, tmp_path / "net" / "2" / "model.onnx", apart)
        client.load_model("net")
        assert np.allclose(answer("net"), of_second(X), rtol=1e-5, atol=1e-5)
        (tmp_path / "net" / "3").mkdir()
        (tmp_path / "net" / "3" / "model.onnx").write_bytes(b"no model")
        with pytest.raises(InferenceServerException, match="model 'net' cannot be loaded: ") as caught:
            client.load_model("net")
        assert "version '2' is still served" in caught.value.message()
        assert str(tmp_path) not in caught.value.message()
        assert np.allclose(answer("net"), of_second(X), rtol=1e-5, atol=1e-5)
