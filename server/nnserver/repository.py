"""
Paths in, served models out: finds, checks, loads and names models.

A path is a model file or a folder of model files (NAME.safetensors); no path means the
models that come with the package. Every model has one version, "1".
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

import nncore
from nnserver.batcher import Batcher, QueueLimits
from nnserver.engine import Lane
from nnserver.errors import ConfigError, NotFound

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
BUNDLED = Path(__file__).parent / "models"

# A gRPC status text is a header: with much more than 8 KiB of them, clients give up the call.
_NAMES_SHOWN = 20

# Names travel in messages, logs and file names: no separators, controls or leading dots.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")


@dataclass(frozen=True)
class ServedModel:
    """A loaded model with its name, version and way through the engine."""

    name: str
    version: str
    mlp: nncore.Mlp
    lane: Lane

    @cached_property
    def max_label_bytes(self) -> int:
        """Bytes of the longest class label in UTF-8."""
        return max(len(label.encode()) for label in self.mlp.class_labels)


class Repository:
    """The models being served, by name and version."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(sorted(self._models.values(), key=lambda model: (model.name, model.version)))

    def get(self, name: str, version: str = "") -> ServedModel:
        """Return the model; raises NotFound, naming what there is."""
        model = self._models.get(name)
        if model is None:
            if not name:
                raise NotFound(f"no model was named; this server has {self._names()}")
            raise NotFound(f"unknown model {_quoted(name)}; this server has {self._names()}")
        if version and version != model.version:
            raise NotFound(
                f"model '{name}' has no version {_quoted(version)}; it has version '{model.version}'"
            )
        return model

    def has(self, name: str) -> bool:
        return name in self._models

    def _names(self) -> str:
        names = [f"'{model.name}'" for model in self]
        shown = ", ".join(names[:_NAMES_SHOWN]) or "no models"
        return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def load_repository(paths: Iterable[str], limits: QueueLimits) -> Repository:
    """
    Load every model under *paths* and run each once, so that the first request is fast.

    Raises ConfigError, naming the file and what is wrong with it.
    """
    files = list(_model_files(paths))
    by_name: dict[str, Path] = {}
    for file in files:
        name = file.name.removesuffix(SUFFIX)
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{file}: {_quoted(name)} cannot be a model's name; use letters, digits, '_', '-' and '.', "
                "at most 128, the first a letter, digit or '_'"
            )
        if name in by_name and not file.samefile(by_name[name]):
            raise ConfigError(f"two models are named '{name}': {by_name[name]} and {file}")
        by_name[name] = file
    return Repository(_load(name, file, limits) for name, file in by_name.items())


def _model_files(paths: Iterable[str]) -> Iterator[Path]:
    given = [Path(path) for path in paths] or [BUNDLED]
    for path in given:
        if path.is_dir():
            # Hidden files are left alone: what is still being written is often one.
            found = sorted(file for file in path.glob(f"*{SUFFIX}") if not file.name.startswith("."))
            if not found:
                raise ConfigError(f"{path} has no model in it (*{SUFFIX})")
            yield from found
        elif not path.exists():
            raise ConfigError(f"there is no model file or folder {path}")
        elif path.suffix != SUFFIX:
            raise ConfigError(f"{path} is not a model file; expected NAME{SUFFIX} (see `nncore --help`)")
        else:
            yield path


def _load(name: str, file: Path, limits: QueueLimits) -> ServedModel:
    started = time.perf_counter()
    try:
        mlp = nncore.load(file)
    except (nncore.NncoreError, OSError) as error:
        raise ConfigError(f"cannot load {file}: {error}") from error
    mlp.forward(row := np.zeros((1, mlp.n_in), mlp.dtype))
    warm = time.perf_counter()
    mlp.forward(row)
    # An upper bound: rows of a batch share the reading of the weights. The engine learns the rest.
    row_cost_s = time.perf_counter() - warm
    logger.info(
        "model loaded name=%s layers=%d parameters=%d load_s=%.3f",
        name,
        len(mlp.layers),
        mlp.parameter_count,
        time.perf_counter() - started,
    )
    return ServedModel(name, "1", mlp, Lane(Batcher(name, limits), mlp.forward, row_cost_s=row_cost_s))


def _quoted(text: str) -> str:
    """Return a client's text fit for an error message: short, printable, in quotes."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
