"""Random seeds -> PyTorch modules that are multi-layer perceptrons, in layers and in functional forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  as everybody calls it
from torch import nn

LAYERS: dict[str, Any] = {
    "ReLU": lambda n: nn.ReLU(),
    "ReLU6": lambda n: nn.ReLU6(),
    "Sigmoid": lambda n: nn.Sigmoid(),
    "Tanh": lambda n: nn.Tanh(),
    "SiLU": lambda n: nn.SiLU(),
    "Mish": lambda n: nn.Mish(),
    "Softsign": lambda n: nn.Softsign(),
    "Hardswish": lambda n: nn.Hardswish(),
    "Hardsigmoid": lambda n: nn.Hardsigmoid(),
    "Hardtanh": lambda n: nn.Hardtanh(-0.5, 2.0),
    "SELU": lambda n: nn.SELU(),
    "LogSigmoid": lambda n: nn.LogSigmoid(),
    "GELU": lambda n: nn.GELU(),
    "GELU tanh": lambda n: nn.GELU(approximate="tanh"),
    "ELU": lambda n: nn.ELU(0.7),
    "CELU": lambda n: nn.CELU(1.3),
    "LeakyReLU": lambda n: nn.LeakyReLU(0.2),
    "RReLU": lambda n: nn.RReLU(),
    "PReLU": lambda n: nn.PReLU(),
    "PReLU n": lambda n: nn.PReLU(n, init=0.3),
    "Softplus": lambda n: nn.Softplus(),
    "Softplus beta": lambda n: nn.Softplus(beta=2.0, threshold=25.0),
    "Threshold": lambda n: nn.Threshold(0.0, 0.0),
    "Threshold 0.2": lambda n: nn.Threshold(0.2, 0.0),
    "Identity": lambda n: nn.Identity(),
    "Dropout": lambda n: nn.Dropout(0.5),
    "AlphaDropout": lambda n: nn.AlphaDropout(0.5),
    "BatchNorm1d": lambda n: batch_norm(n),
    "LayerNorm": lambda n: layer_norm(n),
    "LayerNorm plain": lambda n: nn.LayerNorm(n, elementwise_affine=False) if n > 1 else nn.Identity(),
}

FUNCTIONS: dict[str, Any] = {
    "swish": lambda x: x * torch.sigmoid(x),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swish exp": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "hard swish": lambda x: x * F.relu6(x + 3) / 6,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp min": lambda x: torch.clamp(x, min=0),
    "relu": lambda x: x.relu(),
    "leaky": lambda x: F.leaky_relu(x, 0.3),
    "abs": lambda x: x.abs() - 0.5,
    "negative": lambda x: 1 - x,
    "scale": lambda x: (x - 0.5) / 2.0,
    "elu": lambda x: F.elu(x, alpha=1.2),
    "leaky by a choice": lambda x: torch.where(x > 0, x, 0.2 * x),
    "elu by a choice": lambda x: torch.where(x <= 0, 0.5 * torch.exp(x) - 0.5, x),
    "threshold by a choice": lambda x: torch.where(x > 0.25, x, 0.0),
    "softsign": lambda x: F.softsign(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "flatten": lambda x: torch.flatten(x, 1),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "contiguous": lambda x: x.contiguous(),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "norm in parts": lambda x: (
        (x - x.mean(-1, keepdim=True))
        / torch.sqrt(((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True) + 1e-3)
    ),
}


def batch_norm(n: int) -> nn.Module:
    layer = nn.BatchNorm1d(n)
    with torch.no_grad():
        for tensor in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
            tensor.uniform_(0.5, 1.5)
    return layer


def layer_norm(n: int) -> nn.Module:
    layer = nn.LayerNorm(n, eps=1e-4)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-1, 1)
    return layer


class Functional(nn.Module):
    """Linear layers with functions between them."""

    def __init__(self, layers: list[nn.Module], names: list[str], last: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.names = names
        self.last = last

    def forward(self, x: Any) -> Any:
        for layer, name in zip(self.layers, self.names, strict=True):
            x = FUNCTIONS[name](layer(x))
        if self.last == "softmax":
            return F.softmax(x, dim=-1)
        return F.log_softmax(x, dim=1) if self.last == "log_softmax" else x


def random_module(seed: int) -> tuple[nn.Module, int]:
    """A module in evaluation mode, and the number of its inputs."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    sizes = [int(size) for size in rng.integers(1, 10, rng.integers(2, 5))]
    linear = [nn.Linear(a, b, bias=bool(rng.integers(4))) for a, b in itertools.pairwise(sizes)]
    if rng.integers(2):
        names = [list(FUNCTIONS)[rng.integers(len(FUNCTIONS))] for _ in linear]
        last = ["", "softmax", "log_softmax"][rng.integers(3)]
        if sizes[1:].count(1):
            names = ["relu" if name == "norm in parts" else name for name in names]
        return Functional(linear, names, last).eval(), sizes[0]
    parts: list[nn.Module] = []
    for layer in linear:
        parts.append(layer)
        names = [list(LAYERS)[index] for index in rng.integers(len(LAYERS), size=rng.integers(3))]
        parts.extend(LAYERS[name](layer.out_features) for name in names)
    if rng.integers(3) == 0:
        parts.append([nn.Softmax(dim=1), nn.LogSoftmax(dim=-1), nn.Softmin(dim=1)][rng.integers(3)])
    return nn.Sequential(*parts).eval(), sizes[0]


def run(module: Any, x: Any) -> Any:
    """What PyTorch answers."""
    with torch.no_grad():
        return module(torch.from_numpy(x)).numpy()
