"""Bodies and headers in any form a peer may choose, against what gRPC's document says they mean."""

from __future__ import annotations

import base64
import gzip
import itertools
import tracemalloc
import zlib
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.h2 import head, prefixed

from nnserver.call import check_metadata
from nnserver.errors import BadMessage, Expired, MessageTooLarge, Status
from nnserver.transport import framing

LIMIT = 1 << 20


def assembler(encoding: bytes = b"", limit: int = LIMIT, plain_limit: int = LIMIT) -> framing.Assembler:
    return framing.Assembler(limit, plain_limit, encoding)


def taken(found: framing.Assembler) -> list[bytes]:
    messages = []
    while (message := found.next_message()) is not None:
        assert type(message) is bytes
        messages.append(message)
    return messages


def cut(data: bytes, where: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(i % (len(data) + 1) for i in where)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(
    sizes=st.lists(st.one_of(st.integers(0, 20), st.sampled_from([1023, 1024, 5000, 70_000])), max_size=12),
    where=st.lists(st.integers(0, 200_000), max_size=40),
    take_every=st.integers(1, 5),
)
def test_messages_come_out_as_they_went_in_however_the_body_was_cut(
    sizes: list[int], where: list[int], take_every: int
) -> None:
    messages = [bytes((i + j) % 251 for j in range(size)) for i, size in enumerate(sizes)]
    body = b"".join(map(prefixed, messages))
    found, out = assembler(), []
    for i, piece in enumerate(cut(body, where)):
        found.feed(piece)
        if i % take_every == 0:
            out += taken(found)
    assert out + taken(found) == messages
    assert found.size == 0


@given(
    messages=st.lists(st.binary(max_size=300), max_size=5),
    step=st.integers(1, 7),
    encoding=st.sampled_from([b"gzip", b"deflate"]),
    plain=st.sets(st.integers(0, 4)),
)
def test_compressed_and_plain_messages_mix(
    messages: list[bytes], step: int, encoding: bytes, plain: set[int]
) -> None:
    squeeze = gzip.compress if encoding == b"gzip" else zlib.compress
    body = b"".join(
        prefixed(message) if i in plain else prefixed(squeeze(message), 1)
        for i, message in enumerate(messages)
    )
    found = assembler(encoding)
    for i in range(0, len(body), step):
        found.feed(body[i : i + step])
    assert taken(found) == messages


@given(
    body=st.binary(max_size=200), encoding=st.sampled_from([b"", b"gzip", b"deflate"]), step=st.integers(1, 9)
)
def test_any_bytes_are_messages_or_an_error_of_ours(body: bytes, encoding: bytes, step: int) -> None:
    found = assembler(encoding)
    try:
        for i in range(0, len(body), step):
            found.feed(body[i : i + step])
            taken(found)
    except (BadMessage, MessageTooLarge):
        pass


def test_size_counts_what_is_held() -> None:
    found = assembler()
    found.feed(prefixed(b"abc") + b"\0\0")
    assert found.size == 10
    assert found.next_message() == b"abc"
    assert found.size == 2
    found.clear()
    assert found.size == 0
    found.feed(prefixed(b"x"))
    assert taken(found) == [b"x"]


def test_the_limit_is_a_size_that_is_still_taken() -> None:
    found = assembler(limit=10)
    found.feed(prefixed(bytes(10)))
    assert taken(found) == [bytes(10)]
    found.feed(prefixed(bytes(11))[:5])
    with pytest.raises(MessageTooLarge, match="max_message_bytes"):
        found.next_message()


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_a_bomb_is_not_blown_up(encoding: bytes) -> None:
    """A thousandfold message is refused after its limit's worth of bytes."""
    squeeze = gzip.compress if encoding == b"gzip" else zlib.compress
    bomb = squeeze(bytes(200 << 20))
    found = assembler(encoding)
    found.feed(prefixed(bomb, 1))
    tracemalloc.start()
    with pytest.raises(MessageTooLarge, match="when decompressed"):
        found.next_message()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * LIMIT


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_a_decompressed_message_may_have_the_limit(encoding: bytes) -> None:
    squeeze = gzip.compress if encoding == b"gzip" else zlib.compress
    found = assembler(encoding)
    found.feed(prefixed(squeeze(bytes(LIMIT)), 1))
    assert taken(found) == [bytes(LIMIT)]


@pytest.mark.parametrize(
    ("encoding", "message", "compressed"),
    [
        (b"", b"x", 1),
        (b"gzip", b"not gzip", 1),
        (b"gzip", gzip.compress(b"cut short")[:-3], 1),
        (b"gzip", gzip.compress(b"more") + b"after it", 1),
        (b"gzip", gzip.compress(b"one") + gzip.compress(b"two"), 1),
        (b"gzip", b"", 1),
        (b"deflate", gzip.compress(b"gzip"), 1),
        (b"", b"x", 2),
        (b"gzip", b"x", 255),
    ],
)
def test_what_is_not_one_compressed_message_is_bad(encoding: bytes, message: bytes, compressed: int) -> None:
    found = assembler(encoding)
    found.feed(prefixed(message, compressed))
    with pytest.raises(BadMessage):
        found.next_message()


def test_small_pieces_cost_little_more_than_their_bytes() -> None:
    """A message in pieces of two bytes would take up thirty times its size as objects."""
    found = assembler()
    found.feed((500_000).to_bytes(5, "big"))
    pieces = [bytes((i & 255, i >> 8 & 255)) for i in range(1000)]
    tracemalloc.start()
    for _ in range(200):
        for piece in pieces:
            found.feed(piece)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert found.size == 400_005
    assert held < 2 * 400_000


def test_messages_that_were_taken_are_let_go() -> None:
    """A few bytes of the next message do not keep a large chunk alive."""
    found = assembler()
    tracemalloc.start()
    found.feed(prefixed(bytes(500_000)) + b"\0\0\0")
    assert found.next_message() == bytes(500_000)
    assert found.next_message() is None
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert found.size == 3
    assert held < 100_000


# Headers.


def test_a_head_says_path_timeout_and_encoding() -> None:
    found = framing.read_headers(
        tuple(head(b"/a.B/C", (b"grpc-timeout", b"250m"), (b"grpc-encoding", b"gzip")))
    )
    assert (found.path, found.timeout_s, found.encoding) == (b"/a.B/C", 0.25, b"gzip")
    assert found.fault is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"1H", 3600.0),
        (b"2M", 120.0),
        (b"3S", 3.0),
        (b"4m", 0.004),
        (b"5u", 5e-6),
        (b"6n", 6e-9),
        (b"0n", 0.0),
        (b"99999999H", 99999999 * 3600.0),
        (b"100000000S", None),
        (b"-1S", None),
        (b"1", None),
        (b"S", None),
        (b"", None),
        (b"1 S", None),
        (b"1s", None),
        ("١S".encode(), None),
    ],
)
def test_timeouts(text: bytes, seconds: float | None) -> None:
    found = framing.read_headers(tuple(head(b"/a.B/C", (b"grpc-timeout", text))))
    assert found.timeout_s == (None if seconds is None else pytest.approx(seconds))
    if seconds:
        assert found.fault is None
    else:
        assert isinstance(found.fault, framing.BadTimeout if seconds is None else Expired)


@pytest.mark.parametrize(
    ("content_type", "is_grpc"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc+json", True),
        (b"application/grpc;charset=utf-8", True),
        (b"application/grpc-web", False),
        (b"application/grpc-web+proto", False),
        (b"application/grpcx", False),
        (b"application/json", False),
        (b"text/html", False),
        (b"", False),
    ],
)
def test_content_types(content_type: bytes, is_grpc: bool) -> None:
    headers = ((b":method", b"POST"), (b":path", b"/a.B/C"), (b"content-type", content_type))
    if is_grpc:
        assert framing.read_headers(headers).path == b"/a.B/C"
    else:
        with pytest.raises(framing.NotGrpc) as refusal:
            framing.read_headers(headers)
        assert refusal.value.headers == ((b":status", b"415"),)


def test_another_method_than_post_is_refused() -> None:
    with pytest.raises(framing.NotGrpc) as refusal:
        framing.read_headers(((b":method", b"GET"), (b":path", b"/"), (b"content-type", b"application/grpc")))
    assert refusal.value.headers == ((b":status", b"405"), (b"allow", b"POST"))


@pytest.mark.parametrize("encoding", [b"snappy", b"GZIP", b"gzip, deflate", b"br"])
def test_unknown_encodings_are_known_to_be_unknown(encoding: bytes) -> None:
    found = framing.read_headers(tuple(head(b"/", (b"grpc-encoding", encoding))))
    assert isinstance(found.fault, framing.UnknownEncoding)


def test_identity_is_no_encoding() -> None:
    assert framing.read_headers(tuple(head(b"/", (b"grpc-encoding", b"identity")))).encoding == b""


@given(values=st.lists(st.binary(max_size=20), min_size=1, max_size=4), is_padded=st.booleans())
def test_binary_metadata_is_what_was_sent(values: list[bytes], is_padded: bool) -> None:
    encoded = [base64.b64encode(value) for value in values]
    if not is_padded:
        encoded = [value.rstrip(b"=") for value in encoded]
    found = framing.metadata([(b"x-bin", b",".join(encoded))])
    assert found == tuple(("x-bin", value) for value in values)


def test_metadata_holds_the_callers_own_only() -> None:
    headers = head(b"/", (b"grpc-timeout", b"1S"), (b"user-agent", b"me"), (b"k", b"v"), (b"k", b"w"))
    assert framing.metadata(headers) == (("user-agent", "me"), ("k", "v"), ("k", "w"))


@given(name=st.binary(max_size=9), value=st.binary(max_size=30))
def test_any_metadata_that_was_received_may_be_sent_back(name: bytes, value: bytes) -> None:
    found = framing.metadata([(b"x-bin", value), (b"x", value), (name, value), (name + b"-bin", value)])
    check_metadata(found)
    assert framing.metadata(framing.metadata_headers(found)) == tuple(
        (key, item.strip(" ") if isinstance(item, str) else item) for key, item in found
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"k", b"\xe4"),
        (b"k", "☺".encode()),
        (b"k", b"a\tb"),
        (b"a!b", b"x"),
        (b"grpc-anything", b"x"),
        (b"grpc-trace-bin", b"YQ"),
        (b"host", b"x"),
        (b"content-length", b"5"),
        (b"k-bin", b"YQ=Q"),
        (b"k-bin", b"A"),
        (b"k-bin", b"!!!!"),
        (b"k-bin", b"Y Q"),
    ],
)
def test_what_grpc_could_not_carry_back_is_left_out(name: bytes, value: bytes) -> None:
    assert framing.metadata([(name, value), (b"other", b"x")]) == (("other", "x"),)


def test_binary_metadata_is_sent_without_padding_and_text_without_spaces_around_it() -> None:
    sent = framing.metadata_headers((("a-bin", b"a"), ("b-bin", b""), ("c", " x y ")))
    assert sent == ((b"a-bin", b"YQ"), (b"b-bin", b""), (b"c", b"x y"))


def message_of(text: str) -> bytes:
    status, message = framing.error_trailers(Status.INTERNAL, text)
    assert status == (b"grpc-status", b"13")
    assert message[0] == b"grpc-message"
    return message[1]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200))
def test_a_text_comes_back_from_its_percent_encoding(text: str) -> None:
    message = message_of(text)
    assert all(0x20 <= byte <= 0x7E for byte in message)
    assert unquote(message.decode("ascii")) == text


@given(st.text(st.sampled_from("a%é☺😈"), min_size=400, max_size=500), st.integers(1, 30))
def test_a_text_too_long_for_a_header_is_cut_between_characters(text: str, times: int) -> None:
    text *= times
    message = message_of(text)
    assert len(message) <= 4096
    found = unquote(message.decode("ascii"), errors="strict")
    assert text.startswith(found)
    assert len(found) == len(text) or len(message) > 4096 - 24 or len(found) >= 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [(" ", b"%20"), ("  a  ", b"%20 a %20"), ("a b", b"a b"), ("100%", b"100%25"), (" " * 5000, None)],
)
def test_no_message_begins_or_ends_with_a_space(text: str, message: bytes | None) -> None:
    """HTTP/2 allows none around a value: a peer may refuse the whole block (RFC 9113, 8.2.1)."""
    found = message_of(text)
    assert found == (message or b"%20" + b" " * 4094 + b"%20")


def test_a_status_without_a_text_has_no_message() -> None:
    assert framing.error_trailers(Status.INTERNAL, "") == ((b"grpc-status", b"13"),)


def test_half_a_surrogate_pair_does_not_lose_the_status() -> None:
    assert message_of("a\ud800b") == b"a?b"
