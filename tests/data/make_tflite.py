"""
Nothing -> the .tflite files of this folder, by TensorFlow's own converter.

TensorFlow is too large to install for every run of the tests; the files were made by version 2.21.0:

    python -m venv venv && venv/bin/pip install tensorflow && venv/bin/python tests/data/make_tflite.py
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers as L  # noqa: N812  short, as there are many

FOLDER = Path(__file__).parent


def normalization(n):
    layer = L.Normalization()
    layer.adapt(np.random.default_rng(0).normal(1, 2, (50, n)))
    return layer


keras.utils.set_random_seed(0)
MODELS = {
    "classifier": [
        keras.Input((4,)),
        *(normalization(4), L.Dense(8, activation="relu"), L.BatchNormalization()),
        *(L.Dense(6, activation="gelu"), L.Dropout(0.5), L.Dense(3, activation="softmax")),
    ],
    "image": [
        keras.Input((3, 4, 1)),
        *(L.Rescaling(1 / 255), L.Flatten(), L.Dense(8, activation="swish"), L.LeakyReLU()),
        *(L.Dense(5, activation="tanh"), L.PReLU(alpha_initializer="random_uniform")),
        L.Dense(2, activation="sigmoid"),
    ],
    "selu": [
        keras.Input((4,)),
        *(L.Dense(5, activation=name) for name in ("elu", "hard_sigmoid", "relu6", "selu", "softplus")),
        *(L.Dense(5, activation="softsign"), L.Dense(3)),
    ],
    "layer_norm": [
        keras.Input((4,)),
        *(L.Dense(6), L.LayerNormalization(), L.Activation("relu"), L.Dense(3, activation="log_softmax")),
    ],
}

if __name__ == "__main__":
    for name, parts in MODELS.items():
        converter = tf.lite.TFLiteConverter.from_keras_model(keras.Sequential(parts))
        (FOLDER / f"{name}.tflite").write_bytes(converter.convert())
