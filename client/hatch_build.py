"""
A build of nnclient -> the same with the package nnproto in it, which lies outside of this folder.

In the repository nnproto is ../proto/nnproto; in a source distribution, which has no outside, it is
beside this file, where the build of that distribution put it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NnprotoHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds nnproto to wheels and source distributions."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files."""
        root = Path(self.root)
        for folder in (root / "nnproto", root.parent / "proto" / "nnproto"):
            if folder.is_dir():
                build_data["force_include"][str(folder)] = "nnproto"
                return
        raise FileNotFoundError(f"nnproto is neither in {root} nor in {root.parent / 'proto'}")
