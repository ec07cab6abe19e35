"""A model on disk in, served models out: reads the files, applies config.toml, warms each version up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

import nncore
from nnserver.batcher import Batcher, QueueLimits
from nnserver.engine import Lane
from nnserver.model_folder import ModelSource, stamp
from nnserver.model_settings import ModelSettings, SettingsError, parse_settings
from nnserver.served_model import ServedModel
from nnserver.statistics import ModelStatistics

logger = logging.getLogger(__name__)

# A file of a few lines; what is larger is something else.
_MAX_CONFIG_BYTES = 1 << 20


class LoadError(Exception):
    """A file that cannot be served. *path* is for the operator, *reason* for clients, too."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot load {path}: {reason}")
        self.path = path
        self.reason = reason


class UnsettledError(LoadError):
    """A file that changed while it was read: another attempt may find it whole."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, f"{path.name} changed while it was read")


def load_versions(
    source: ModelSource,
    limits: QueueLimits,
    keep: Mapping[str, ServedModel] | None = None,
    *,
    detailed_statistics: bool = False,
) -> list[ServedModel]:
    """
    Load the versions of *source* that its settings choose; ascending, the default version last.

    keep: versions whose files have not changed, as they were loaded; they stay as they are unless the
    settings differ. All or nothing: raises LoadError for the first file that is wrong.
    """
    settings = ModelSettings() if source.config is None else _read_settings(source.config)
    try:
        versions = settings.version_policy.choose(source.versions)
        default = versions[-1] if settings.default_version is None else settings.default_version
        if default not in versions:
            raise SettingsError(f"default_version is {default}; the versions served are {versions}")
    except SettingsError as error:
        raise LoadError(source.config or Path(source.name), str(error)) from None
    loaded = []
    for version in sorted(versions, key=lambda version: (version == default, version)):
        kept = (keep or {}).get(str(version))
        if kept is None or kept.settings != settings:
            statistics = ModelStatistics(is_detailed=detailed_statistics)
            kept = _load(source.name, version, source.versions[version], settings, limits, statistics)
        loaded.append(kept)
    return loaded


def _read_settings(config: Path) -> ModelSettings:
    try:
        before = stamp(config)
        with config.open(encoding="utf-8") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
        if len(text) > _MAX_CONFIG_BYTES:
            raise SettingsError(f"has more than {_MAX_CONFIG_BYTES} bytes")
        settings = parse_settings(text)
    except OSError as error:
        raise LoadError(config, _reason(config, error)) from error
    except (SettingsError, UnicodeDecodeError) as error:
        raise LoadError(config, f"{config.name}: {error}") from error
    if stamp(config) != before:
        raise UnsettledError(config)
    return settings


def _load(
    name: str,
    version: int,
    file: Path,
    settings: ModelSettings,
    limits: QueueLimits,
    statistics: ModelStatistics,
) -> ServedModel:
    started = time.perf_counter()
    before = stamp(file)
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise LoadError(file, f"{file.name} is no regular file")  # A pipe would be waited for, for ever.
    try:
        mlp = _READERS[file.suffix](file)
        if settings.labels is not None:
            mlp = nncore.Mlp(mlp.layers, settings.labels, mlp.feature_names, mlp.name, mlp.input_shape)
    except (nncore.NncoreError, OSError, ImportError) as error:
        # A file that is being written is wrong in many ways; that it changes says why.
        settled = stamp(file) == before
        raise (LoadError(file, _reason(file, error)) if settled else UnsettledError(file)) from error
    if stamp(file) != before:
        raise UnsettledError(file)
    mlp.forward(row := np.zeros((1, mlp.n_in), mlp.dtype))
    warm = time.perf_counter()
    mlp.forward(row)
    # An upper bound: rows of a batch share the reading of the weights. The engine learns the rest.
    row_cost_s = time.perf_counter() - warm
    logger.info(
        "model loaded name=%s version=%d layers=%d parameters=%d load_s=%.3f",
        name,
        version,
        len(mlp.layers),
        mlp.parameter_count,
        time.perf_counter() - started,
    )
    batcher = Batcher(name, settings.limits(limits), statistics=statistics)
    lane = Lane(batcher, mlp.forward, mlp.n_in, mlp.dtype, row_cost_s=row_cost_s)
    return ServedModel(name, str(version), mlp, lane, settings)


def _read_onnx(file: Path) -> nncore.Mlp:
    # Looked up when needed: the converter brings in its libraries, which serving does without.
    return nncore.from_onnx(file)


_READERS: Mapping[str, Callable[[Path], nncore.Mlp]] = {".safetensors": nncore.load, ".onnx": _read_onnx}


def _reason(file: Path, error: Exception) -> str:
    """Return what *error* says, without the path that an OSError has in it."""
    if isinstance(error, OSError):
        return f"{file.name}: {error.strerror or type(error).__name__}"
    return str(error)
