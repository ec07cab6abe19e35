"""`nnclient models` -> what the server serves, as a table, CSV or JSON."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from nnclient.commands.connection import client_of
from nnclient.models import ModelInfo
from nnclient.text_table import format_table

_HEADER = ["name", "version", "layers", "activations", "dtype", "parameters", "labels"]


def run(args: argparse.Namespace) -> int:
    """Print the models; return the exit status."""
    with client_of(args) as client:
        models = client.models()
    if args.format == "json":
        print(json.dumps([_as_json(model) for model in models], indent=2))
    elif args.format == "csv":
        rows = [_cells(model, str(model.parameter_count), " ".join(model.labels)) for model in models]
        csv.writer(sys.stdout, lineterminator="\n").writerows([_HEADER, *rows])
    else:
        rows = [_cells(model, f"{model.parameter_count:,}", _summary(model.labels)) for model in models]
        print(format_table(_HEADER, rows, right=[_HEADER.index("parameters")]))
    return 0


def _cells(model: ModelInfo, parameters: str, labels: str) -> list[str]:
    activations = " ".join(layer.activation for layer in model.layers)
    return [model.name, model.version, model.architecture, activations, str(model.dtype), parameters, labels]


def _summary(labels: Sequence[str]) -> str:
    shown = labels if len(labels) <= 4 else [*labels[:2], "…", labels[-1]]
    return f"{len(labels)}: {' '.join(shown)}" if labels else "-"


def _as_json(model: ModelInfo) -> dict[str, Any]:
    return {**dataclasses.asdict(model), "dtype": str(model.dtype)}
