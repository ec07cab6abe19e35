"""from_onnx: graphs of one kind each, what comes with them, and what is refused, by name."""

import contextlib
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from support.onnx_builder import Graph, run, save

import nncore
from nncore import ConversionError

X = np.random.default_rng(1).standard_normal((20, 6)).astype(np.float32)
W = np.random.default_rng(2).standard_normal((6, 3)).astype(np.float32)
# A few roundings of float32 in sums of at most 784 numbers of about 1.
CLOSE: Any = {"rtol": 0, "atol": 3e-5}


def converted(tmp_path, graph, outputs, shape=(None, 6), **options):
    """The Mlp of *graph*, by way of a file."""
    opset = {key: options.pop(key) for key in ("opset", "output_type", "rank") if key in options}
    return nncore.from_onnx(save(graph.model(outputs, list(shape), **opset), tmp_path / "m.onnx"), **options)


def perceptron(graph, x="x"):
    """A dense layer, relu, a dense layer."""
    hidden = graph.node("Relu", graph.node("Gemm", x, graph.const(W), graph.const(np.ones(3))))
    return graph.node("MatMul", hidden, graph.const(W[:3, :2]))


def weights(mlp, index=0):
    """The weights of a layer."""
    layer = mlp.layers[index]
    assert isinstance(layer, nncore.Layer)
    return layer.weights


def refused(tmp_path, graph, outputs, message, shape=(None, 6), **options):
    with pytest.raises(ConversionError, match=message):
        converted(tmp_path, graph, outputs, shape, **options)


@pytest.mark.parametrize("batch", [None, "N", 1, 8])
def test_batch_axis(tmp_path, batch):
    """A batch that is unknown, named or fixed is rows all the same."""
    graph = Graph()
    model = graph.model(perceptron(graph), [batch, 6])
    mlp = nncore.from_onnx(save(model, tmp_path / "m.onnx"))
    size = batch if isinstance(batch, int) else 20
    np.testing.assert_allclose(mlp.forward(X[:size]), run(model, X[:size]), **CLOSE)


@pytest.mark.parametrize("how", ["Flatten", "Reshape", "Reshape to one row", "Reshape by shape", "Squeeze"])
@pytest.mark.parametrize("batch", [None, 1])
def test_input_of_higher_rank_is_flattened(tmp_path, how, batch):
    """Images come as rows; their shape is kept."""
    if how == "Reshape to one row" and batch is None:
        return
    graph = Graph(3)
    shape = (1, 2, 3) if how != "Squeeze" else (1, 1, 6)
    flat = {
        "Flatten": lambda: graph.node("Flatten", "x"),
        "Reshape": lambda: graph.node("Reshape", "x", graph.ints(-1, 6)),
        "Reshape to one row": lambda: graph.node("Reshape", "x", graph.ints(1, 6)),
        "Reshape by shape": lambda: graph.node("Reshape", "x", graph.ints(0, -1)),
        "Squeeze": lambda: graph.node("Squeeze", "x", graph.ints(1, 2)),
    }[how]()
    model = graph.model(perceptron(graph, flat), [batch, *shape])
    mlp = nncore.from_onnx(save(model, tmp_path / "m.onnx"))
    rows = X[: batch or 20]
    assert mlp.input_shape == shape
    np.testing.assert_allclose(mlp.forward(rows), run(model, rows.reshape(-1, *shape)), **CLOSE)


def test_channels_last_image_is_transposed_into_the_first_layer(tmp_path):
    """A transpose of the axes of a row costs nothing: the first layer's weights are put in order."""
    graph = Graph(3)
    turned = graph.node("Transpose", "x", perm=[0, 3, 1, 2])
    scaled = graph.node("Mul", turned, graph.const(np.arange(1.0, 4).reshape(1, 3, 1, 1)))
    model = graph.model(perceptron(graph, graph.node("Flatten", scaled)), [None, 2, 1, 3])
    mlp = nncore.from_onnx(save(model, tmp_path / "m.onnx"))
    assert [layer.n_out for layer in mlp.layers] == [3, 2]
    np.testing.assert_allclose(mlp.forward(X), run(model, X.reshape(-1, 2, 1, 3)), **CLOSE)


def test_row_without_batch_axis(tmp_path):
    """An input of one axis is one row."""
    graph = Graph()
    model = graph.model(graph.node("MatMul", "x", graph.const(W)), [6], rank=1)
    mlp = nncore.from_onnx(save(model, tmp_path / "m.onnx"))
    np.testing.assert_allclose(mlp.forward(X[0]), run(model, X[0]), **CLOSE)


def test_affine_chains_are_folded(tmp_path):
    """Scalers before, between and after cost no layers."""
    graph = Graph(4)
    x = graph.affine(graph.affine("x", 6), 6)
    x = graph.affine(graph.node("MatMul", x, graph.const(W)), 3)
    x = graph.affine(graph.node("Tanh", graph.affine(x, 3)), 3)
    x = graph.affine(graph.node("MatMul", x, graph.const(W[:3, :2])), 2)
    model = graph.model(x, [None, 6])
    mlp = nncore.from_onnx(save(model, tmp_path / "m.onnx"))
    assert [layer.n_out for layer in mlp.layers] == [3, 2]
    np.testing.assert_allclose(mlp.forward(X), run(model, X), **CLOSE)


def test_unfolded_weights_keep_their_bits(tmp_path):
    """Where nothing is folded, every weight is the source's."""
    graph = Graph()
    mlp = converted(tmp_path, graph, perceptron(graph))
    np.testing.assert_array_equal(weights(mlp, 0), W)
    np.testing.assert_array_equal(weights(mlp, 1), W[:3, :2])
    assert mlp.name == "m"


def test_scale_after_the_last_activation_is_a_layer(tmp_path):
    """sigmoid(x) * 2 - 1 at the end has a layer of its own."""
    graph = Graph()
    y = graph.node("Sub", graph.node("Mul", graph.node("Sigmoid", "x"), graph.const(2.0)), graph.const(1.0))
    model = graph.model(y, [None, 6])
    mlp = nncore.from_onnx(save(model, tmp_path / "m.onnx"))
    assert [layer.activation for layer in mlp.layers] == ["sigmoid", "identity"]
    np.testing.assert_allclose(mlp.forward(X), run(model, X), **CLOSE)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17])
def test_old_opsets(tmp_path, opset):
    """Clip, Squeeze, Softmax and Dropout as older versions have them."""
    graph = Graph()
    if opset < 11:
        clipped = graph.node("Clip", graph.node("MatMul", "x", graph.const(W)), min=-1.0, max=1.0)
        lifted = graph.node("Unsqueeze", clipped, axes=[1])
        y = graph.node("Squeeze", lifted, axes=[1])
    else:
        y = graph.node("Clip", graph.node("MatMul", "x", graph.const(W)), graph.const(-1.0), graph.const(1.0))
    y = graph.node("Softmax", graph.node("Dropout", y))
    model = graph.model(y, [None, 6], opset=opset)
    model.ir_version = 8
    mlp = nncore.from_onnx(save(model, tmp_path / "m.onnx"))
    np.testing.assert_allclose(mlp.forward(X), run(model, X), **CLOSE)


def test_swish_operator(tmp_path):
    """Swish, new in opset 24, with its alpha."""
    graph = Graph()
    y = graph.node("Swish", graph.node("MatMul", "x", graph.const(W)), alpha=1.5)
    mlp = converted(tmp_path, graph, y, opset=24)
    z = X.astype(np.float64) @ W
    np.testing.assert_allclose(mlp.forward(X), z / (1 + np.exp(-1.5 * z)), **CLOSE)
    assert [layer.activation for layer in mlp.layers] == ["swish", "identity"]


@pytest.mark.parametrize("operator", ["Greater", "Less", "GreaterOrEqual", "LessOrEqual"])
def test_comparison_is_a_step(tmp_path, operator):
    """A comparison with a constant that is cast to numbers is a step."""
    graph = Graph()
    z = graph.node("MatMul", "x", graph.const(W))
    y = graph.node("Cast", graph.node(operator, z, graph.const(0.25)), to=TensorProto.FLOAT)
    model = graph.model(y, [None, 6])
    mlp = nncore.from_onnx(save(model, tmp_path / "m.onnx"))
    np.testing.assert_array_equal(mlp.forward(X), run(model, X))


def test_heads_of_one_layer_are_joined(tmp_path):
    """Concat of layers over the same numbers is one layer."""
    graph = Graph()
    hidden = graph.node("Relu", graph.node("MatMul", "x", graph.const(W)))
    heads = [graph.node("MatMul", hidden, graph.const(W[:3, i : i + 1])) for i in range(3)]
    model = graph.model(graph.node("Concat", *heads, axis=-1), [None, 6])
    mlp = nncore.from_onnx(save(model, tmp_path / "m.onnx"))
    assert [layer.n_out for layer in mlp.layers] == [3, 3]
    np.testing.assert_allclose(mlp.forward(X), run(model, X), **CLOSE)


def test_local_functions_are_put_in_place(tmp_path):
    """A model whose layer is a function of its own."""
    function = helper.make_function(
        "local",
        "Layer",
        ["a", "w"],
        ["c"],
        [helper.make_node("MatMul", ["a", "w"], ["b"]), helper.make_node("Relu", ["b"], ["c"])],
        [helper.make_opsetid("", 21)],
    )
    graph = Graph()
    y = graph.node("Layer", "x", graph.const(W), domain="local")
    model = graph.model(y, [None, 6])
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.append(function)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    np.testing.assert_allclose(nncore.from_onnx(path).forward(X), np.maximum(X @ W, 0), **CLOSE)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_narrow_weights_become_float32(tmp_path, kind):
    """float16 and bfloat16 weights are held exactly."""
    narrow = W.astype(np.float16) if kind == TensorProto.FLOAT16 else W
    if kind == TensorProto.BFLOAT16:
        narrow = ((W.view(np.uint32) >> 16) << 16).view(np.float32)
        raw = (narrow.view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        raw = narrow.astype("<f2").tobytes()
    graph = Graph()
    graph.initializers.append(helper.make_tensor("w", kind, [6, 3], raw, raw=True))
    model = graph.model(graph.node("MatMul", "x", "w"), [None, 6])
    model.graph.input[0].type.tensor_type.elem_type = kind
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    np.testing.assert_array_equal(weights(nncore.from_onnx(path)), narrow.astype(np.float32))


def test_labels_names_and_dtype_can_be_given(tmp_path):
    """What the file does not say, the caller may."""
    graph = Graph()
    mlp = converted(
        tmp_path,
        graph,
        perceptron(graph),
        labels=["no", "yes"],
        feature_names=list("abcdef"),
        name="answer",
        dtype="float64",
    )
    assert (mlp.labels, mlp.name, str(mlp.dtype)) == (("no", "yes"), "answer", "float64")
    assert mlp.feature_names == tuple("abcdef")


# External data


def external(tmp_path, location):
    """A model whose weights lie in the file *location*, which is written beside it."""
    graph = Graph()
    model = graph.model(graph.node("MatMul", "x", graph.const(W)), [None, 6])
    (tmp_path / "sub").mkdir(exist_ok=True)
    tensor = model.graph.initializer[0]
    external_data_helper.set_external_data(tensor, location, offset=4, length=72)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("location", ["w.bin", "sub/w.bin", "sub/../w.bin"])
def test_external_data_inside_the_folder(tmp_path, location):
    """Weights beside the model, or below its folder, are read."""
    path = external(tmp_path, location)
    (tmp_path / location).write_bytes(b"----" + W.astype("<f4").tobytes())
    np.testing.assert_array_equal(weights(nncore.from_onnx(path)), W)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "sub/../../w.bin", "link.bin", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    """No path and no link leads out of the model's folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(b"----" + W.astype("<f4").tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    path = external(folder, location)
    with pytest.raises(ConversionError, match="outside the model's folder"):
        nncore.from_onnx(path)


def test_external_data_that_is_too_short(tmp_path):
    """A file with fewer bytes than its tensor needs, and none at all."""
    path = external(tmp_path, "w.bin")
    with pytest.raises(ConversionError, match=r"'w.bin', and there is no such file"):
        nncore.from_onnx(path)
    (tmp_path / "w.bin").write_bytes(b"-" * 75)
    with pytest.raises(ConversionError, match=r"needs 72 bytes from 4 on in 'w.bin'"):
        nncore.from_onnx(path)


@pytest.mark.parametrize("location", ["w\0.bin", "w" * 5000])
def test_external_data_in_what_no_file_can_be_called(tmp_path, location):
    """One error, that does not repeat a long name."""
    path = external(tmp_path, "w.bin")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConversionError, match=r"which is no file's name$") as caught:
        nncore.from_onnx(path)
    assert len(str(caught.value)) < 200


# Refusals


def test_unsupported_operator_in_the_middle(tmp_path):
    """The node is named, and what is behind it does not matter."""
    graph = Graph()
    x = graph.node("MatMul", "x", graph.const(W))
    x = graph.node("Sin", x)
    refused(tmp_path, graph, graph.node("Relu", x), r"node 'n1' \(Sin\): the operator is not supported")


def test_unsupported_operator_beside_the_way(tmp_path):
    """A branch that no answer depends on may hold anything."""
    graph = Graph()
    graph.node("Sin", "x")
    mlp = converted(tmp_path, graph, perceptron(graph))
    assert mlp.n_out == 2


@pytest.mark.parametrize("comparison", ["Greater", "LessOrEqual"])
def test_choice_between_the_halves_of_an_activation(tmp_path, comparison):
    """PyTorch's exporter chooses x itself where softplus is large, and so spells other activations, too."""
    graph = Graph()
    x = graph.node("MatMul", "x", graph.const(W))
    slope = graph.node("Mul", x, graph.const(np.float32(0.2)))
    halves = (x, slope) if comparison == "Greater" else (slope, x)
    y = graph.node("Where", graph.node(comparison, x, graph.const(np.float32(0))), *halves)
    is_large = graph.node("Greater", y, graph.const(np.float32(20)))
    y = graph.node("Where", is_large, y, graph.node("Softplus", y))
    model = graph.model(y, [None, 6])
    mlp = nncore.from_onnx(save(model, tmp_path / "m.onnx"))
    assert [layer.activation for layer in mlp.layers] == ["leaky_relu", "softplus"]
    np.testing.assert_allclose(mlp.forward(50 * X), run(model, 50 * X), rtol=1e-5, atol=1e-5)


def test_choice_by_constants_of_each_column_is_refused(tmp_path):
    """Where by a mask is no activation."""
    graph = Graph()
    x = graph.node("MatMul", "x", graph.const(W))
    y = graph.node("Where", graph.const([True, False, True], np.bool_), x, graph.const(np.zeros(3)))
    refused(tmp_path, graph, y, r"node 'n\d' \(Where\)")


def test_control_flow_is_refused(tmp_path):
    """If is named; its branches are not entered."""
    graph = Graph()
    x = graph.node("Relu", "x")
    branch = helper.make_graph(
        [helper.make_node("Identity", [x], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    condition = graph.const(True, np.bool_)
    y = graph.node("If", condition, then_branch=branch, else_branch=branch)
    refused(tmp_path, graph, y, r"node 'n1' \(If\): is control flow: which nodes run")


def test_control_flow_whose_branches_alone_read_the_input(tmp_path):
    """The node is named, although no node of the outer graph takes the input."""
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    graph = Graph()
    y = graph.node("If", graph.const(True, np.bool_), then_branch=branch, else_branch=branch)
    refused(tmp_path, graph, y, r"node 'n0' \(If\): is control flow")


def cases():
    def residual(g):
        h = g.node("Relu", g.node("MatMul", "x", g.const(np.eye(6))))
        return g.node("Add", h, "x")

    def product(g):
        h = g.node("Relu", g.node("MatMul", "x", g.const(np.eye(6))))
        return g.node("Mul", h, "x")

    def softmax_then_more(g):
        return g.node("MatMul", g.node("Softmax", "x"), g.const(W))

    def joined(g):
        return g.node("Concat", g.node("Relu", "x"), g.node("Tanh", "x"), axis=1)

    def mean(g):
        return g.node("ReduceMean", "x", g.ints(-1))

    def normalizer(g):
        return g.node("Normalizer", "x", domain="ai.onnx.ml", norm="L2")

    def foreign(g):
        return g.node("Relu", "x", domain="com.example")

    return [
        (residual, r"\(Add\): adds two branches that depend on the input; a model is a chain"),
        (product, r"\(Mul\): multiplies two branches"),
        (softmax_then_more, r"\(Softmax\): softmax is followed by more"),
        (joined, r"\(Concat\): joins branches"),
        (mean, r"\(ReduceMean\): the mean of a row is no layer"),
        (normalizer, r"\(Normalizer\): divides each row by its L2 norm"),
        (foreign, r"\(Relu\): the operator is not supported"),
        (lambda g: g.node("MatMul", "x", "x"), "multiplies two matrices that depend on the input"),
        (lambda g: g.node("Pow", "x", g.const(2.0)), "to the power 2, which is no activation"),
        (lambda g: g.node("Pow", "x", g.const(7.0)), "raises to the power 7"),
        (lambda g: g.node("Sqrt", "x"), "sqrt is no layer"),
        (lambda g: g.node("MatMul", "x", g.const(np.ones((5, 2)))), r"weights have shape \(5, 2\); expected"),
        (lambda g: g.node("Add", "x", g.const(np.ones(5))), "combines .* with a constant"),
        (lambda g: g.node("Add", "x", g.const(np.ones((4, 6)))), "differs from row to row"),
        (lambda g: g.node("Softmax", "x", axis=0), "works on axis 0"),
        (lambda g: g.node("Reshape", "x", g.ints(-1)), "which mixes rows"),
        (lambda g: g.node("Reshape", "x", g.ints(-1, 5)), "reshapes"),
        (lambda g: g.node("Reshape", "x", g.ints(3, -1)), "reshapes"),
        (lambda g: g.node("Transpose", "x", perm=[0, 5]), "axes"),
        (lambda g: g.node("Clip", "x", g.const(-1e6), g.const(1e6)), "bounds beyond ±1000"),
        (lambda g: g.node("Clip", "x", g.const(1.0), g.const(1.0)), "which leaves one number"),
        (lambda g: g.node("Cast", "x", to=TensorProto.INT64), "to whole ones"),
        (lambda g: g.node("MatMul", "x", g.const(np.full((6, 2), np.nan))), "is nan"),
        (lambda g: g.node("Div", "x", g.const(np.zeros(6))), "is inf"),
        (lambda g: g.node("Gemm", "x", "missing"), "tensor 'missing' is computed nowhere"),
        (lambda g: g.node("Gemm", "x"), "lacks input 1"),
        (lambda g: g.node("Gemm", "x", g.const(W), alpha="no"), "has alpha = b'no'"),
        (lambda g: g.node("LayerNormalization", "x", g.const(np.ones(6)), axis=0), "a part of the row"),
        (lambda g: g.node("ArgMax", "x", axis=1), "does not depend on the input|no output of numbers"),
    ]


@pytest.mark.parametrize(("build", "message"), cases())
def test_what_is_no_perceptron(tmp_path, build, message):
    """The error names the node, its operator, and why."""
    graph = Graph()
    path = tmp_path / "m.onnx"
    path.write_bytes(graph.model(build(graph), [None, 6]).SerializeToString())
    with pytest.raises((ConversionError, nncore.ModelError), match=message):
        nncore.from_onnx(path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([None, None], r"input 'x' has size 'unknown' on axis 1"),
        ([None, "features"], r"input 'x' has size 'features' on axis 1"),
        ([None, 1 << 40], "at most 16,777,216 are supported"),
        ([], "is a single number"),
    ],
)
def test_input_shapes_that_say_too_little_or_too_much(tmp_path, shape, message):
    """The number of inputs must be known, and believable."""
    graph = Graph()
    refused(tmp_path, graph, graph.node("Relu", "x"), message, shape)


def test_several_inputs(tmp_path):
    """Two inputs are refused by name."""
    graph = Graph()
    model = graph.model(graph.node("Add", "x", "z"), [None, 6])
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, 6]))
    with pytest.raises(ConversionError, match=r"2 inputs \('x', 'z'\); expected one"):
        nncore.from_onnx(save(model, tmp_path / "m.onnx"))


def test_several_outputs(tmp_path):
    """With two answers the caller has to choose, and may."""
    graph = Graph()
    hidden = graph.node("Relu", graph.node("MatMul", "x", graph.const(W)))
    outputs = [hidden, graph.node("Softmax", hidden)]
    refused(tmp_path, graph, outputs, f"2 outputs; name one of '{outputs[0]}', '{outputs[1]}'")
    mlp = converted(tmp_path, graph, outputs, output=outputs[1])
    assert [layer.activation for layer in mlp.layers] == ["relu", "softmax"]
    refused(tmp_path, graph, outputs, "there is no output 'other'", output="other")


def test_dangling_output(tmp_path):
    """An output that no node computes is named."""
    graph = Graph()
    graph.node("Relu", "x")
    path = tmp_path / "m.onnx"
    path.write_bytes(graph.model("nothing", [None, 6]).SerializeToString())
    with pytest.raises(ConversionError, match="output 'nothing' is computed by no node"):
        nncore.from_onnx(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not onnx", bytes(range(256)) * 10, b"\x08\x0a"])
def test_files_that_are_no_onnx(tmp_path, content):
    """Empty, foreign and truncated files are one error."""
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"m.onnx is not an ONNX"):
        nncore.from_onnx(path)


def test_damaged_files_never_raise_anything_else(tmp_path):
    """A file with any byte changed, or cut anywhere, is converted or refused."""
    graph = Graph(7)
    content = graph.model(graph.walk("x", 6), [None, 6]).SerializeToString()
    rng = np.random.default_rng(0)
    path = tmp_path / "m.onnx"
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        if rng.integers(4) == 0:
            del damaged[rng.integers(len(damaged)) :]
        path.write_bytes(damaged)
        with np.errstate(all="ignore"), contextlib.suppress(nncore.NncoreError):
            nncore.from_onnx(path)


def doubled(graph, times):
    x = graph.const(np.ones(1))
    for _ in range(times):
        x = graph.node("Concat", x, x, axis=0)
    return x


@pytest.mark.parametrize(
    "build",
    [
        lambda g: g.node("Expand", g.const(1.0), g.ints(1 << 20, 1 << 20)),
        lambda g: g.node("ConstantOfShape", g.ints(1 << 20, 1 << 20)),
        lambda g: g.node("MatMul", g.const(np.ones((1 << 15, 1))), g.const(np.ones((1, 1 << 15)))),
        lambda g: g.node("Add", g.const(np.ones((1 << 15, 1))), g.const(np.ones((1, 1 << 15)))),
        lambda g: g.node("Gather", g.const(np.ones((1, 1 << 15))), g.const(np.zeros(1 << 15), np.int64)),
        lambda g: g.node("Concat", *[doubled(g, 26)] * 3, axis=0),
    ],
)
def test_small_files_cannot_ask_for_all_memory(tmp_path, build):
    """Constants of a terabyte are refused before they are made."""
    graph = Graph()
    refused(tmp_path, graph, graph.node("Add", "x", build(graph)), "makes a constant of shape")


def test_tensor_whose_bytes_do_not_fit_its_shape(tmp_path):
    """A shape that promises more numbers than there are is refused."""
    graph = Graph()
    model = graph.model(graph.node("MatMul", "x", graph.const(W)), [None, 6])
    model.graph.initializer[0].dims[:] = [6, 1 << 50]
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConversionError, match="has 72 bytes; its shape"):
        nncore.from_onnx(path)


def test_strings_and_sparse_tensors_are_refused(tmp_path):
    """Neither is a weight."""
    graph = Graph()
    graph.initializers.append(helper.make_tensor("w", TensorProto.STRING, [1], [b"a"]))
    path = tmp_path / "m.onnx"
    path.write_bytes(graph.model(graph.node("MatMul", "x", "w"), [None, 6]).SerializeToString())
    with pytest.raises(ConversionError, match="expected a constant"):
        nncore.from_onnx(path)
    graph = Graph()
    model = graph.model(graph.node("MatMul", "x", "w"), [None, 6])
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    indices = numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [6, 3]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConversionError, match="initializer 'w' is sparse"):
        nncore.from_onnx(path)


def test_deep_graphs_are_walked_without_recursion(tmp_path):
    """Five thousand nodes in a row."""
    graph = Graph()
    x = "x"
    for _ in range(5000):
        x = graph.node("Neg", graph.node("Identity", x))
    mlp = converted(tmp_path, graph, x)
    np.testing.assert_array_equal(mlp.forward(X), X)


def test_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        nncore.from_onnx(tmp_path / "none.onnx")


def test_onnx_version_is_recent_enough():
    """The package in this environment knows the opsets that are tested."""
    assert onnx.defs.onnx_opset_version() >= 24
