"""
Log records in, lines out: text for people, or JSON for machines. Set up once, by cli.py.

A record may carry facts of its own (extra={"facts": {...}}): text appends them as name=value, JSON has
them as members. Whatever a client sent cannot start a line: control characters are escaped.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

# The logger of access_log.py.
ACCESS_LOG = "nnserver.access"

_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
# C0, DEL, C1 and the Unicode line ends: what a terminal or a collector takes for the end of a line, or worse.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[^\s\"=]+")


def set_up_logging(level: str, style: str, *, has_access_log: bool = False) -> None:
    """
    Log to standard error from *level* up, as *style* says: text or json.

    has_access_log: whether lines of the access log are written whatever the level is.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if has_access_log:
        logging.getLogger(ACCESS_LOG).setLevel(logging.INFO)


class TextFormatter(logging.Formatter):
    """One line a record, but for tracebacks: time, level, logger, message, facts."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name.
        line = super().formatMessage(record)
        for name, value in _facts(record).items():
            text = str(value)
            line += f" {name}={text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)}"
        return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, facts, and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _facts(record: logging.LogRecord) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = getattr(record, "facts", {})
    return facts
