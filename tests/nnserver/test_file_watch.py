"""Looks at files, one by one: when a change is acted on, and what becomes of a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnserver.errors import ConfigError
from nnserver.file_watch import FileWatch


class Acted:
    """An action that counts, and fails if told to."""

    def __init__(self) -> None:
        self.times = 0
        self.failure = ""

    def __call__(self) -> None:
        self.times += 1
        if self.failure:
            raise ConfigError(self.failure)


def test_a_change_is_acted_on_once_it_has_stood_still(tmp_path: Path) -> None:
    file, acted = tmp_path / "file", Acted()
    file.write_text("1")
    watch = FileWatch("files", lambda: [str(file)], acted)
    for _ in range(3):
        watch.look()
    assert acted.times == 0
    file.write_text("12")
    watch.look()
    file.write_text("123")
    watch.look()
    assert acted.times == 0
    watch.look()
    watch.look()
    assert acted.times == 1


def test_a_failure_is_logged_once_and_tried_again_with_the_next_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, acted = tmp_path / "file", Acted()
    file.write_text("1")
    watch = FileWatch("files", lambda: [str(file)], acted)
    acted.failure = "they are broken"
    file.unlink()
    for _ in range(5):
        watch.look()
    assert acted.times == 1
    assert caplog.text.count("files not reloaded, those before stay in use: they are broken") == 1
    acted.failure = ""
    file.write_text("1234")
    watch.look()
    watch.look()
    assert acted.times == 2


def test_other_paths_are_a_change_too(tmp_path: Path) -> None:
    acted, paths = Acted(), [str(tmp_path / "a")]
    watch = FileWatch("files", lambda: list(paths), acted)
    paths[0] = str(tmp_path / "b")
    watch.look()
    watch.look()
    assert acted.times == 1
