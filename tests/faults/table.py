"""
Nothing in, the tables of docs/faults.md out: from the tests themselves, and from those of other rooms.

    PYTHONPATH=tests python -m faults.table      writes them into the document
"""

from __future__ import annotations

from pathlib import Path

from faults import (
    test_access_and_metrics,
    test_lifecycle_and_exposure,
    test_models,
    test_protocol,
    test_requests,
    test_time_and_load,
)
from faults.tried import Tried, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- The tables: written by faults.table. -->\n", "<!-- The end of the tables. -->\n"

# What other rooms' tests show: not done again here.
ELSEWHERE = [
    Tried(
        "Load",
        "40 peers that dawdle at the listener of metrics",
        "the oldest are let go, scrapes go on",
        "test_peers_that_dawdle_do_not_keep_a_scraper_out",
    ),
    Tried(
        "Lifecycle",
        "scrapes while models are loaded and unloaded",
        "no counter goes down",
        "test_scrapes_are_consistent_while_models_come_and_go",
    ),
    Tried(
        "Exposure",
        "tokens that are wrong, or of another scope",
        "UNAUTHENTICATED; PERMISSION_DENIED",
        "test_each_scope_opens_its_methods_and_no_other",
    ),
    Tried(
        "Payloads",
        "answers larger than may be",
        "RESOURCE_EXHAUSTED, not computed",
        "test_an_answer_that_would_be_oversized_is_refused_before_it_is_computed",
    ),
    Tried(
        "Payloads",
        "integers that a float does not hold (OIP)",
        "INVALID_ARGUMENT",
        "test_integers_are_taken_exactly_or_not_at_all",
    ),
    Tried(
        "Values",
        "NaN and infinities with --reject-nonfinite",
        "INVALID_ARGUMENT, by row and column",
        "test_nan_is_refused_by_row_and_column_if_so_set",
    ),
    Tried(
        "Values",
        "a model whose kernel fails",
        "INTERNAL for its batch, generic text",
        "test_a_kernel_fault_fails_its_batch_only",
    ),
    Tried(
        "Protocol",
        "bombs of fields: 8 million empty tensors, with gzip",
        "INVALID_ARGUMENT",
        "test_bombs_of_fields_hold_nobody_up",
    ),
    Tried(
        "Protocol",
        "25 attacks on HTTP/2 (h2): see transport.md",
        "closed, reset or borne",
        "test_others_are_served_and_memory_returns",
    ),
    Tried(
        "Protocol",
        "43 errors of HTTP/2 (h2)",
        "GOAWAY with its code",
        "test_a_broken_connection_is_told_why_and_closed",
    ),
    Tried(
        "Protocol",
        "10,000,000 messages to the decoders: see below",
        "answered or refused rightly",
        "test_the_corpus_and_the_first_mutations_of_it_hold",
    ),
    Tried(
        "Time",
        "a deadline amid a stream",
        "DEADLINE_EXCEEDED",
        "test_a_stream_with_a_deadline_ends_when_it_passes",
    ),
    Tried(
        "Time",
        "200 calls and streams cancelled",
        "nothing is left",
        "test_cancelled_calls_leave_nothing_behind",
    ),
    Tried(
        "Time",
        "400 MB of requests from who reads no answer",
        "held back; memory bounded",
        "test_a_client_that_does_not_read_is_not_read_from",
    ),
    Tried(
        "Time",
        "a request byte by byte, a silent peer (h2)",
        "DEADLINE_EXCEEDED; closed",
        "test_who_dawdles_is_let_go",
    ),
    Tried("Time", "64 idle streams", "others are served", "test_64_idle_streams_keep_nobody_waiting"),
    Tried("Load", "2,000 idle connections (h2)", "borne", "test_2000_idle_connections_cost_little"),
    Tried(
        "Load",
        "answers that nobody reads, of 40 peers (h2)",
        "the peer that holds most is closed",
        "test_answers_that_nobody_reads_are_bounded",
    ),
    Tried(
        "Model files",
        "flipped, cut and inserted bytes (hypothesis)",
        "a whole model, or a reason",
        "test_damaged_files_raise_nothing_else",
    ),
    Tried(
        "Model files",
        "a header that promises more numbers than there are",
        "refused, nothing allocated",
        "test_load_does_not_allocate_what_a_header_promises",
    ),
    Tried(
        "Model files",
        "links out, at every place of a repository",
        "refused",
        "test_a_name_or_link_that_is_refused_stops_the_start",
    ),
    Tried(
        "Model files",
        "replaced 20 times while two clients ask",
        "no request lost or swapped",
        "test_no_request_is_lost_or_swapped_while_its_model_is_replaced",
    ),
    Tried(
        "Lifecycle",
        "the port is taken",
        "an error that says so, status 1",
        "test_a_port_in_use_is_an_error_that_says_so",
    ),
    Tried(
        "Lifecycle",
        "a corrupt model at start",
        "an error that names it, status 1",
        "test_a_corrupt_model_file_is_named",
    ),
    Tried(
        "Lifecycle",
        "a cache that others can write to",
        "it does not start",
        "test_a_folder_that_others_can_write_to_is_refused",
    ),
    Tried(
        "Lifecycle",
        "SIGTERM or SIGINT under load",
        "every request answered or UNAVAILABLE, status 0",
        "test_drain_under_load_loses_nothing",
    ),
    Tried(
        "Lifecycle",
        "SIGTERM or SIGINT twice",
        "it ends at once, status 128 + number",
        "test_a_second_signal_ends_at_once",
    ),
    Tried(
        "Lifecycle",
        "everything at once, for minutes: see below",
        "no request lost or swapped",
        "test_every_request_is_accounted_for_and_nothing_is_left",
    ),
    Tried(
        "Exposure",
        "a fault of an api, of a kernel",
        "INTERNAL, generic text",
        "test_a_fault_of_the_api_is_internal_and_tells_nothing",
    ),
    Tried(
        "Exposure",
        "the text of every refusal of these tables",
        "no path, traceback or type of ours",
        "test_a_wrong_request_is_refused",
    ),
    Tried(
        "Exposure",
        "a fault while a model is loaded",
        "generic text; the log has it",
        "test_a_fault_of_ours_while_loading_is_no_text_for_clients",
    ),
]


def lines() -> list[Tried]:
    """Every line, in the order of the tests."""
    found = [*test_requests.LINES, *test_models.LINES]
    for module in (
        *(test_requests, test_protocol, test_time_and_load, test_models),
        *(test_lifecycle_and_exposure, test_access_and_metrics),
    ):
        for test in vars(module).values():
            if callable(test) and getattr(test, "__module__", "").endswith(module.__name__):
                found += getattr(test, "tried", ())
    return found + ELSEWHERE


def updated(document: str) -> str:
    """*document* with its tables as they should be."""
    before, rest = document.split(BEGIN)
    return before + BEGIN + "\n" + table(lines()) + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
