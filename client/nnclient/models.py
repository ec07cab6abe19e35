"""Model message -> ModelInfo: what a server says about a model it serves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnclient.wire import DTYPE_OF
from nnproto.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """
    One dense layer.

    activation: its name, as in nncore.ACTIVATIONS, or "softmax".
    alpha: the activation's parameter: none, one for all outputs, or one an output.
    """

    n_in: int
    n_out: int
    activation: str
    alpha: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """
    One model being served.

    dtype: the type in which it computes and answers, whatever was sent.
    labels: names of the classes by index; empty if it has none.
    feature_names: names of the inputs by index; may be empty.
    parameter_count: trained numbers: weights, biases and alphas.
    """

    name: str
    version: str
    dtype: np.dtype[np.floating]
    n_in: int
    n_out: int
    layers: tuple[LayerInfo, ...]
    labels: tuple[str, ...]
    feature_names: tuple[str, ...]
    parameter_count: int

    @property
    def architecture(self) -> str:
        """The layers' widths, such as "64-64-32-10"."""
        return "-".join(map(str, [self.n_in, *(layer.n_out for layer in self.layers)]))


def decode_model(message: pb.Model) -> ModelInfo:
    """Return *message* as a ModelInfo. Raises ValueError if it does not hold together."""
    if message.dtype not in DTYPE_OF or not message.inputs.shape or not message.outputs.shape:
        raise ValueError(f"description of model {message.name!r} lacks its dtype or shapes")
    return ModelInfo(
        name=message.name,
        version=message.version,
        dtype=DTYPE_OF[message.dtype].newbyteorder("="),
        n_in=message.inputs.shape[-1],
        n_out=message.outputs.shape[-1],
        layers=tuple(
            LayerInfo(layer.n_in, layer.n_out, layer.activation, tuple(layer.alpha))
            for layer in message.layers
        ),
        labels=tuple(message.labels),
        feature_names=tuple(message.feature_names),
        parameter_count=message.parameter_count,
    )
