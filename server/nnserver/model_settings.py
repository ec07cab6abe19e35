"""
The text of a model's config.toml in, its settings out.

    version_policy = "all"              # or {latest = 2} (the default is 1), or {specific = [1, 3]}
    default_version = 3                 # of those served; default: the highest
    labels = ["setosa", "versicolor"]   # in place of the model file's
    outputs = ["outputs", "labels"]     # what a request that names no outputs is answered with

    [limits]
    max_queue_requests = 1000           # in place of the server's settings of these names
    max_queue_rows = 100000
    max_queue_bytes = 1000000

    [batching]
    max_batch_rows = 512                # likewise
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nnserver.batcher import QueueLimits

# The outputs that a model can give; see nnproto.v1.OutputKind.
OUTPUTS, PROBABILITIES, LABELS = OUTPUT_NAMES = ("outputs", "probabilities", "labels")

# A version is the name of a folder and travels as text; tools read it as a 32-bit number.
MAX_VERSION = 2**31 - 1


class SettingsError(ValueError):
    """A config.toml that does not say what it should; the text is fit for a client."""


@dataclass(frozen=True)
class VersionPolicy:
    """Which of a model's versions are served: the highest *latest*; or those of *specific*; or all."""

    latest: int | None = None
    specific: tuple[int, ...] = ()

    def choose(self, versions: Iterable[int]) -> list[int]:
        """Return those of *versions* to serve, ascending; raises SettingsError if one is missing."""
        there = sorted(versions)
        if self.latest is not None:
            return there[-self.latest :]
        missing = sorted(set(self.specific) - set(there))
        if missing:
            raise SettingsError(f"version_policy names version {missing[0]}; there are {there}")
        return sorted(self.specific) if self.specific else there


@dataclass(frozen=True)
class ModelSettings:
    """What a model's config.toml says; None: it does not."""

    version_policy: VersionPolicy = VersionPolicy(latest=1)
    default_version: int | None = None
    labels: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None
    max_queue_requests: int | None = None
    max_queue_rows: int | None = None
    max_queue_bytes: int | None = None
    max_batch_rows: int | None = None

    def limits(self, of_server: QueueLimits) -> QueueLimits:
        """Return the limits of the model's queue: its own where it has them."""
        own: dict[str, Any] = {
            "max_requests": self.max_queue_requests,
            "max_rows": self.max_queue_rows,
            "max_bytes": self.max_queue_bytes,
            "max_batch_rows": self.max_batch_rows,
        }
        return replace(of_server, **{name: value for name, value in own.items() if value is not None})


def parse_settings(text: str) -> ModelSettings:
    """Return the settings; raises SettingsError, naming the one that is wrong."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"is not TOML: {error}") from None
    _refuse_unknown(found, ("version_policy", "default_version", "labels", "outputs", "limits", "batching"))
    limits, batching = _table(found, "limits"), _table(found, "batching")
    _refuse_unknown(limits, ("max_queue_requests", "max_queue_rows", "max_queue_bytes"), "limits.")
    _refuse_unknown(batching, ("max_batch_rows",), "batching.")
    return ModelSettings(
        version_policy=_version_policy(found.get("version_policy", {"latest": 1})),
        default_version=_whole(found, "default_version", "", MAX_VERSION),
        labels=_texts(found, "labels"),
        outputs=_output_names(found),
        max_queue_requests=_whole(limits, "max_queue_requests", "limits."),
        max_queue_rows=_whole(limits, "max_queue_rows", "limits."),
        max_queue_bytes=_whole(limits, "max_queue_bytes", "limits."),
        max_batch_rows=_whole(batching, "max_batch_rows", "batching."),
    )


def _version_policy(value: Any) -> VersionPolicy:
    if value == "all":
        return VersionPolicy()
    if isinstance(value, dict) and len(value) == 1:
        ((kind, argument),) = value.items()
        if kind == "latest" and _is_whole(argument):
            return VersionPolicy(latest=argument)
        if kind == "specific" and isinstance(argument, list) and argument and all(map(_is_whole, argument)):
            return VersionPolicy(specific=tuple(argument))
    raise SettingsError(
        f'version_policy is {value!r}; expected "all", {{latest = N}} or {{specific = [N, ...]}}, N from 1'
    )


def _output_names(found: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = _texts(found, "outputs")
    if names is not None and not (names and {*names} <= {*OUTPUT_NAMES} and len({*names}) == len(names)):
        raise SettingsError(
            f"outputs is {list(names)}; expected some of {', '.join(OUTPUT_NAMES)}, each once"
        )
    return names


def _texts(found: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    value = found.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise SettingsError(f"{name} is {value!r}; expected a list of texts")
    return tuple(value)


def _whole(found: Mapping[str, Any], name: str, where: str, high: int | None = None) -> int | None:
    value = found.get(name)
    if value is None:
        return None
    if not _is_whole(value) or (high is not None and value > high):
        raise SettingsError(f"{where}{name} is {value!r}; expected a whole number from 1")
    return int(value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _table(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name, {})
    if not isinstance(value, dict):
        raise SettingsError(f"{name} is {value!r}; expected a table, [{name}]")
    return value


def _refuse_unknown(found: Mapping[str, Any], known: tuple[str, ...], where: str = "") -> None:
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {where}{close[0]}?" if close else ""
            raise SettingsError(f"unknown setting {where}{name}{hint}")
