"""Log records as lines: text and JSON, with facts, and with what clients would like to put there."""

import json
import logging
import sys

import pytest

from nnserver.access_log import RequestFacts, log_request, request_id
from nnserver.errors import Status
from nnserver.log_format import JsonFormatter, TextFormatter

FACTS = RequestFacts("predict", "iris", "1", 3, "id-7")


def record(message, *args, facts=None, exc_info=None, level=logging.INFO):
    made = logging.LogRecord("nnserver.x", level, "x.py", 1, message, args, exc_info)
    made.created = 1_700_000_000.25
    if facts is not None:
        made.facts = facts
    return made


def test_text_appends_facts():
    line = TextFormatter().format(record("request", facts={"rows": 3, "id": "a b", "model": ""}))
    assert line.endswith('INFO nnserver.x request rows=3 id="a b" model=""')


def test_json_has_facts_as_members():
    line = JsonFormatter().format(record("loaded %s", "iris", facts={"rows": 3}))
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "nnserver.x",
        "message": "loaded iris",
        "rows": 3,
    }


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\x1b[31mb", "a\u2028b", "a\x85b", "\x00"])
def test_nothing_that_was_sent_starts_a_line(text):
    """Whether it is in the message or in a fact."""
    for made in (record("reason=%s", text), record("request", facts={"id": text})):
        for formatter in (TextFormatter(), JsonFormatter()):
            line = formatter.format(made)
            assert len(line.splitlines()) == 1
            assert "\x1b" not in line
            assert "\x00" not in line


def test_a_traceback_stays_with_its_record():
    try:
        raise ValueError("why")
    except ValueError:
        made = record("failed", exc_info=sys.exc_info(), level=logging.ERROR)
    assert "ValueError: why" in TextFormatter().format(made)
    line = JsonFormatter().format(made)
    assert len(line.splitlines()) == 1
    assert "ValueError: why" in json.loads(line)["traceback"]


def test_the_access_log_says_what_a_request_was(caplog):
    with caplog.at_level(logging.INFO, "nnserver.access"):
        log_request(FACTS, (("authorization", "Bearer secret"),), Status.OK, 0.00125)
        log_request(FACTS, (), Status.INTERNAL, 0.5)
    good, bad = caplog.records
    assert good.facts == {
        "request_id": "id-7",
        "kind": "predict",
        "model": "iris",
        "version": "1",
        "status": "OK",
        "rows": 3,
        "time_ms": 1.25,
    }
    assert (good.levelname, bad.levelname) == ("INFO", "ERROR")
    assert "secret" not in caplog.text


def test_an_id_is_the_requests_own_or_its_calls_or_made():
    metadata = (("other", "x"), ("x-request-id", "from-the-proxy"))
    assert request_id("own", metadata) == "own"
    assert request_id("", metadata) == "from-the-proxy"
    assert len(request_id("x" * 10_000, ())) == 128
    made = {request_id("", ()) for _ in range(100)}
    assert len(made) == 100
