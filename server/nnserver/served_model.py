"""A loaded model with what serving it takes: its name, version, way through the engine and settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import nncore
from nnserver.derivatives import DerivativeLanes
from nnserver.engine import Lane
from nnserver.model_settings import ModelSettings


@dataclass(frozen=True)
class ServedModel:
    """One version of a model. Immutable: what changes on disk becomes another ServedModel."""

    name: str
    version: str
    mlp: nncore.Mlp
    lane: Lane
    settings: ModelSettings = field(default_factory=ModelSettings)

    @cached_property
    def derivatives(self) -> DerivativeLanes:
        """The model's derivatives' ways through the engine."""
        return DerivativeLanes(self.mlp, self.lane)

    @cached_property
    def max_label_bytes(self) -> int:
        """Bytes of the longest class label in UTF-8."""
        return max(len(label.encode()) for label in self.mlp.class_labels)
