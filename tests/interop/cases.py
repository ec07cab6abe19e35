"""
Nothing in, the interoperability cases out: their names, sizes and texts.

Most are gRPC's own (its document interop-test-descriptions), with the numbers that stand there. Of this
suite are half_duplex, the two of gzip, and concurrent_large_unary, which fills the windows of a connection.
"""

from __future__ import annotations

CASES = (
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "half_duplex",
    "cancel_after_begin",
    "cancel_after_first_response",
    "timeout_on_sleeping_server",
    "status_code_and_message",
    "special_status_message",
    "custom_metadata",
    "unimplemented_method",
    "unimplemented_service",
    "gzip_unary",
    "gzip_streaming",
    "concurrent_large_unary",
)

# Not among them: the server ends during this one.
FINISH_WHILE_DRAINING = "finish_while_draining"

# How long a case may take: the machine may be busy.
PATIENCE_S = 60.0

LARGE_REQUEST_BYTES = 271_828
LARGE_RESPONSE_BYTES = 314_159
REQUEST_BYTES = (27_182, 8, 1_828, 45_904)
RESPONSE_BYTES = (31_415, 9, 2_653, 58_979)
CONCURRENT_CALLS = 32
# The second deadline of timeout_on_sleeping_server: long enough for the request to arrive.
ARRIVING_TIMEOUT_S = 0.2
SLEEP_US = 30_000_000

STATUS_CODE = 2
STATUS_MESSAGE = "test status message"
SPECIAL_STATUS_MESSAGE = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"
ECHO_INITIAL = ("x-grpc-test-echo-initial", "test_initial_metadata_value")
ECHO_TRAILING = ("x-grpc-test-echo-trailing-bin", b"\xab\xab\xab")
