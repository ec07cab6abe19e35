"""docs/operations.md -> every setting and metric is in it, as it is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from nnserver.config import Config
from nnserver.metrics.definitions import METRICS

TEXT = (Path(__file__).parent.parent / "docs" / "operations.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| ")
]


def flag(name: str) -> str:
    return "PATH" if name == "models" else "--" + name.replace("_", "-")


def test_every_setting_is_explained() -> None:
    """
    Each has a row of a table of docs/operations.md: | `--flag` | default | what for, when to change it |.

    If this names a setting of yours: add its row to the table that it belongs to.
    """
    explained = {name for row in ROWS for name in re.findall(r"`(--[\w-]+|PATH)`", row[0])}
    missing = [setting.name for setting in fields(Config) if flag(setting.name) not in explained]
    assert not missing, f"docs/operations.md has no row for {', '.join(map(flag, missing))}"


def test_no_flag_is_explained_that_does_not_exist() -> None:
    known = {flag(setting.name) for setting in fields(Config)} | {
        "--config",
        "--check",
        "--help",
        "--version",
    }
    named = {name for row in ROWS for name in re.findall(r"`(--[\w-]+)`", row[0])}
    assert named <= known


def test_defaults_are_the_settings_own() -> None:
    """Numbers as they are in Config; "off" and "on"; empty where there is none."""
    defaults = {flag(setting.name): setting.default for setting in fields(Config)}
    rows = [row for row in ROWS if len(row) == 3 and re.fullmatch(r"`--[\w-]+`", row[0])]
    assert len(rows) > 30
    for name, told, _ in rows:
        default = defaults.get(name.strip("`"))
        if isinstance(default, bool):
            assert told == ("on" if default else "off"), name
        elif isinstance(default, int | float):
            assert float(told.replace(",", "")) == default, name
        elif default:
            assert told == default or name == "`--transport`", name


def test_every_metric_is_in_the_table() -> None:
    """With its type and its labels; and no other is."""
    told = {
        row[0].strip("`"): (row[1], set(re.findall(r"\w+", row[2])))
        for row in ROWS
        if row[0].startswith(("`nnserve_", "`process_"))
    }
    assert told == {name: (metric.type, set(metric.labels)) for name, metric in METRICS.items()}
