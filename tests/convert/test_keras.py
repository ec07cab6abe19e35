"""from_keras: models and their files answer what Keras answers; what holds code is refused unread."""

import io
import json
import zipfile
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers as L  # noqa: N812  short, as there are many

import nncore
from nncore import ConversionError

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of Keras and its backend, about themselves


def normalization(n, **options):
    layer = L.Normalization(**options)
    layer.adapt(np.random.default_rng(n).normal(1.0, 2.0, (50, n)).astype(np.float32))
    return layer


LAYERS: dict[str, Any] = {
    **{
        f"Activation {name}": (lambda n, name=name: L.Activation(name))
        for name in (
            *("linear", "relu", "relu6", "sigmoid", "tanh", "softplus", "softsign", "silu", "gelu", "elu"),
            *("selu", "celu", "leaky_relu", "hard_sigmoid", "hard_silu", "hard_tanh", "mish", "log_sigmoid"),
        )
    },
    "ReLU": lambda n: L.ReLU(),
    "ReLU 6": lambda n: L.ReLU(max_value=6.0),
    "ReLU threshold": lambda n: L.ReLU(threshold=0.5),
    "ReLU slope": lambda n: L.ReLU(negative_slope=0.3),
    "LeakyReLU": lambda n: L.LeakyReLU(),
    "LeakyReLU 0.1": lambda n: L.LeakyReLU(negative_slope=0.1),
    "PReLU": lambda n: L.PReLU(alpha_initializer="random_uniform"),
    "ELU": lambda n: L.ELU(alpha=0.8),
    "Dropout": lambda n: L.Dropout(0.5),
    "GaussianNoise": lambda n: L.GaussianNoise(0.5),
    "BatchNormalization": lambda n: L.BatchNormalization(
        gamma_initializer=keras.initializers.RandomUniform(0.5, 1.5),
        moving_mean_initializer="random_normal",
        moving_variance_initializer=keras.initializers.RandomUniform(0.5, 1.5),
    ),
    "BatchNormalization bare": lambda n: L.BatchNormalization(center=False, scale=False),
    "LayerNormalization": lambda n: L.LayerNormalization(gamma_initializer="random_normal"),
    "LayerNormalization bare": lambda n: L.LayerNormalization(center=False, scale=False),
    "Normalization": normalization,
    "Normalization inverted": lambda n: normalization(n, invert=True),
    "Normalization given": lambda n: L.Normalization(mean=0.5, variance=4.0),
    "Rescaling": lambda n: L.Rescaling(1 / 255, offset=0.5),
    "Flatten": lambda n: L.Flatten(),
    "Reshape": lambda n: L.Reshape((n,)),
    "Identity": lambda n: L.Identity(),
    "Sequential": lambda n: keras.Sequential([L.Dense(n, activation="tanh")]),
}


def rows(*shape):
    x = np.random.default_rng(shape[-1]).standard_normal((30, *shape))
    return np.concatenate([x, np.zeros((1, *shape)), 20 * np.ones((1, *shape))]).astype(np.float32)


def assert_alike(mlp, model, x):
    expected = np.asarray(model.predict(x, verbose=0))
    scale = max(1.0, np.abs(expected).max())
    answer = mlp.forward(x.reshape(len(x), -1))
    np.testing.assert_allclose(answer, expected.reshape(len(x), -1), rtol=0, atol=3e-5 * scale)


def in_every_form(model, folder):
    """The model itself, its .keras file and its .h5 file, converted."""
    model.save(folder / "m.keras")
    model.save(folder / "m.h5")
    return [nncore.from_keras(source) for source in (model, folder / "m.keras", folder / "m.h5")]


@pytest.mark.parametrize("name", list(LAYERS))
def test_every_layer(name, tmp_path):
    """Each kind of layer, in a live model and in both files."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), L.Dense(5), LAYERS[name](5), L.Dense(3, use_bias=False)])
    for mlp in in_every_form(model, tmp_path):
        assert_alike(mlp, model, rows(4))


@settings(max_examples=25)
@given(st.integers(0, 1 << 30))
def test_random_model(tmp_path_factory, seed):
    """Chains of layers, Sequential and functional."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    parts = []
    n = n_in = int(rng.integers(2, 9))
    for _ in range(rng.integers(1, 4)):
        n = int(rng.integers(2, 9))
        parts.append(L.Dense(n, activation=[None, "relu", "gelu", "tanh"][rng.integers(4)]))
        parts += [LAYERS[list(LAYERS)[i]](n) for i in rng.integers(len(LAYERS), size=rng.integers(3))]
    last = rng.integers(3)
    if last:
        parts.append([L.Softmax(), L.Dense(2, activation="softmax")][last - 1])
    if rng.integers(2):
        model = keras.Sequential([keras.Input((n_in,)), *parts])
    else:
        x = source = keras.Input((n_in,))
        for part in parts:
            x = part(x)
        model = keras.Model(source, x)
    for mlp in in_every_form(model, tmp_path_factory.mktemp("keras")):
        assert_alike(mlp, model, rows(n_in))


def test_images_are_flattened(tmp_path):
    """An input of several axes is flattened, permuted if need be, and its shape kept."""
    model = keras.Sequential([keras.Input((3, 4, 1)), L.Permute((3, 1, 2)), L.Flatten(), L.Dense(2)])
    for mlp in in_every_form(model, tmp_path):
        assert mlp.input_shape == (3, 4, 1)
        assert len(mlp.layers) == 1
        assert_alike(mlp, model, rows(3, 4, 1))


def test_double_precision(tmp_path):
    """float64 weights make a float64 model."""
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, dtype="float64")])
    for mlp in in_every_form(model, tmp_path):
        assert mlp.dtype == np.float64


def test_name_and_labels(tmp_path):
    """A file's name is the model's; labels can be given."""
    model = keras.Sequential([keras.Input((4,)), L.Dense(2)], name="inner")
    model.save(tmp_path / "outer.keras")
    assert nncore.from_keras(model).name == "inner"
    mlp = nncore.from_keras(tmp_path / "outer.keras", labels=["a", "b"])
    assert (mlp.name, mlp.labels) == ("outer", ("a", "b"))


def test_weights_without_names(tmp_path):
    """Files of versions that do not say whose a group is are read in the order of their layers."""
    parts = [L.Dense(5, name="z"), L.BatchNormalization(name="y"), L.Dense(5, name="a"), L.PReLU(name="b")]
    model = keras.Sequential([keras.Input((4,)), *parts])
    model.save(tmp_path / "m.keras")

    def without_names(members):
        buffer = io.BytesIO(members["model.weights.h5"])
        with h5py.File(buffer, "r+") as file:
            file.visititems(lambda name, group: group.attrs.pop("name", None) and None)
        members["model.weights.h5"] = buffer.getvalue()

    edited(tmp_path / "m.keras", without_names)
    assert_alike(nncore.from_keras(tmp_path / "m.keras"), model, rows(4))


def test_keras_2_file(tmp_path):
    """hard_sigmoid and the functional description as Keras 2 had them."""
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="d")])
    model.save(tmp_path / "m.h5")
    nodes: list[Any] = [
        {
            "class_name": "InputLayer",
            "name": "i",
            "config": {"batch_input_shape": [None, 4], "name": "i"},
            "inbound_nodes": [],
        },
        {
            "class_name": "Dense",
            "name": "d",
            "config": {"name": "d", "units": 3, "activation": "hard_sigmoid", "use_bias": True},
            "inbound_nodes": [[["i", 0, 0, {}]]],
        },
    ]
    config = {"layers": nodes, "input_layers": [["i", 0, 0]], "output_layers": [["d", 0, 0]]}
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": config})
        file.attrs["keras_version"] = "2.15.0"
    x = rows(4)
    expected = np.clip(0.2 * model.predict(x, verbose=0) + 0.5, 0, 1)
    np.testing.assert_allclose(nncore.from_keras(tmp_path / "m.h5").forward(x), expected, atol=1e-6)


# Refusals


def edited(path, change):
    """*path* with its members changed by *change*, a function of the dict of them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def config_edit(change):
    def apply(members):
        config = json.loads(members["config.json"])
        change(config["config"]["layers"])
        members["config.json"] = json.dumps(config).encode()

    return apply


def weights_edit(change):
    def apply(members):
        buffer = io.BytesIO(members["model.weights.h5"])
        with h5py.File(buffer, "r+") as file:
            change(file)
        members["model.weights.h5"] = buffer.getvalue()

    return apply


def saved(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="d", activation="relu")])
    model.save(tmp_path / "m.keras")
    return tmp_path / "m.keras"


def external_link(file):
    del file["layers/dense/vars/0"]
    file["layers/dense/vars/0"] = h5py.ExternalLink("/tmp/other.h5", "/x")


def soft_link(file):
    del file["layers/dense/vars/0"]
    file["layers/dense/vars/0"] = h5py.SoftLink("/layers/dense/vars/1")


def external_storage(file):
    del file["layers/dense/vars/0"]
    place = file["layers/dense/vars"]
    place.create_dataset("0", (4, 3), "f4", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


def virtual(file):
    del file["layers/dense/vars/0"]
    layout = h5py.VirtualLayout((4, 3), "f4")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", (4, 3))
    file["layers/dense/vars"].create_virtual_dataset("0", layout)


def bomb(file):
    del file["layers/dense/vars/0"]
    file["layers/dense/vars"].create_dataset("0", (1 << 14, 1 << 14), "f4", chunks=(1, 1 << 14), fillvalue=0)


def objects(file):
    del file["layers/dense/vars/0"]
    file["layers/dense/vars"].create_dataset("0", data=["text"], dtype=h5py.string_dtype())


def fill_with_nan(file):
    file["layers/dense/vars/0"].write_direct(np.full((4, 3), np.nan, "f4"))


def edit_layer(**changes):
    return config_edit(lambda layers: layers[1].update(changes))


def replace_activation(value):
    return config_edit(lambda layers: layers[1]["config"].update(activation=value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weights_edit(external_link), "has a link at 'layers/dense/vars/0'; links are not followed"),
        (weights_edit(soft_link), "has a link at 'layers/dense/vars/0'"),
        (weights_edit(external_storage), "the weights '0' lie in another file"),
        (weights_edit(virtual), "the weights '0' lie in another file"),
        (weights_edit(bomb), "the weights '0' unpack to 1,073,741,824 bytes"),
        (weights_edit(objects), "the weights '0' are no numbers"),
        (
            weights_edit(fill_with_nan),
            "is nan",
        ),
        (weights_edit(lambda f: f.pop("layers")), r"layer 'd' \(Dense\): has 0 arrays of weights"),
        (edit_layer(class_name="Lambda"), "no code of a model is run"),
        (edit_layer(module="mine"), "Dense is a custom object"),
        (
            edit_layer(registered_name="Mine>Dense"),
            "Mine>Dense is a custom",
        ),
        (
            edit_layer(class_name="Conv2D"),
            r"'d' \(Conv2D\): the layer is not",
        ),
        (config_edit(lambda layers: layers[1].pop("config")), "is not understood"),
        (config_edit(lambda layers: layers.clear()), "the model has no layers"),
        (replace_activation("mine"), "activation 'mine' is not supported"),
        (replace_activation({"class_name": "__lambda__", "config": {}}), "no code of a model is run"),
        (
            replace_activation({"class_name": "function", "config": "f", "module": "mine"}),
            "is a custom object",
        ),
        (lambda m: m.update({"config.json": b"{"}), "config.json is not valid JSON"),
        (lambda m: m.update({"config.json": b"[" * 100_000}), "config.json is not valid JSON"),
        (
            lambda m: m.update({"config.json": b"{}" + b" " * (100 << 20)}),
            "unpacks from .* to 104,857,602 bytes",
        ),
        (lambda m: m.update({"model.weights.h5": b"no"}), "model.weights.h5 is not an HDF5 file"),
        (lambda m: m.pop("config.json"), "has no 'config.json' in it"),
        (lambda m: m.update({"config.json": b'{"class_name": "Mine"}'}), "the model is a Mine"),
    ],
)
def test_hostile_and_damaged_files(tmp_path, change, message):
    """Links, other files, bombs, code and nonsense are refused by name."""
    path = edited(saved(tmp_path), change)
    with pytest.raises((ConversionError, nncore.ModelError), match=message):
        nncore.from_keras(path)


def test_lambda_layer_is_refused_as_keras_saves_it(tmp_path):
    """Its code is in the file, and stays there."""
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.Lambda(lambda x: x * 2, name="twice")])
    model.save(tmp_path / "m.keras")
    for source in (model, tmp_path / "m.keras"):
        with pytest.raises(ConversionError, match=r"'twice' \(Lambda\): a Lambda holds code"):
            nncore.from_keras(source)


class Mine(L.Layer):
    def call(self, x):
        return x


def test_custom_layer_is_refused(tmp_path):
    """A class of a user's own is named."""
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), Mine(name="own")])
    model.save(tmp_path / "m.keras")
    with pytest.raises(ConversionError, match=r"layer 'own' \(Mine\): .*custom object"):
        nncore.from_keras(tmp_path / "m.keras")


def residual():
    source = keras.Input((4,))
    return keras.Model(source, L.Add(name="sum")([source, L.Dense(4)(source)]))


def two_outputs():
    source = keras.Input((4,))
    return keras.Model(source, [L.Dense(4)(source), L.Dense(2)(source)])


def two_inputs():
    sources = [keras.Input((4,)), keras.Input((4,))]
    return keras.Model(sources, L.Add()(sources))


def shared():
    source, layer = keras.Input((4,)), L.Dense(4, name="twice")
    return keras.Model(source, layer(layer(source)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (residual, r"layer 'sum' \(Add\): has 2 inputs or uses"),
        (two_outputs, "has 1 inputs and 2 outputs"),
        (two_inputs, "has 2 inputs and 1 outputs"),
        (shared, r"layer 'twice' \(Dense\): has 2 inputs or uses"),
        (lambda: keras.Sequential([keras.Input((4, 3)), L.Dense(2)]), "which is not the whole row"),
        (lambda: keras.Sequential([keras.Input((4, 3)), L.LSTM(2)]), r"\(LSTM\): the layer is not"),
        (lambda: keras.Sequential([keras.Input((None,)), L.Rescaling(2.0)]), "all sizes but the first"),
        (lambda: keras.Sequential([L.Dense(2)]), "the model does not say its input's shape|0 arrays"),
    ],
)
def test_what_is_no_chain(tmp_path, build, message):
    """Branches, shared layers and other shapes are refused by the layer's name."""
    model = build()
    with pytest.raises(ConversionError, match=message):
        nncore.from_keras(model)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x89HDF\r\n\x1a\n", b"text"])
def test_files_that_are_no_models(tmp_path, content):
    """Empty, torn and foreign files are one error."""
    path = tmp_path / "m.keras"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"m\.keras"):
        nncore.from_keras(path)


def test_weights_alone_are_no_model(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ConversionError, match="weights alone are not a model"):
        nncore.from_keras(tmp_path / "m.weights.h5")


def test_other_objects_are_refused():
    with pytest.raises(ConversionError, match="int is no Keras model, and no path of one"):
        nncore.from_keras(3)
