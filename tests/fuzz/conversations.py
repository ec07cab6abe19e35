"""Nothing in, what well-behaved clients say out: recorded from real ones, as the bytes of each flush."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

import numpy as np
from support.h2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Answer,
    block,
    frame,
    prefixed,
)
from support.h2_in_memory import InMemoryClient, InMemoryServer
from support.oip import request_for as oip_request_for
from support.serving import request_for

from fuzz.served import Served
from fuzz.strict_api import StrictApi
from nnproto.v1.inference_pb2 import OUTPUT_KIND_LABELS

Script = Callable[[InMemoryClient], None]


def record(script: Script, settings: dict[int, int] | None = None) -> list[bytes]:
    """What a client says in *script*, to a server that answers it."""
    api, served = StrictApi(1 << 20), Served(1 << 20)
    server = InMemoryServer({**api.methods(), **served.methods}, served.after_messages)
    with InMemoryClient(server, settings) as client:
        script(client)
        api.answer_waiting()
        server.loop.run()
        while client.receive():
            pass
    assert not api.broken
    assert all(answer.is_over or answer.reset is not None for answer in client.answers.values())
    return client.sent


def recorded() -> dict[str, list[bytes]]:
    """name -> the conversation of that name. Byte for byte the same each time."""
    found = {name: record(script) for name, script in _SCRIPTS.items()}
    found["tiny windows"] = record(_tiny_windows, {4: 1, 5: 16384})
    found["no window"] = record(_no_window, {4: 0})
    # By hand and without HPACK's state: what is dropped or moved spoils no later frame.
    return found | _BY_HAND


def _unary(client: InMemoryClient) -> None:
    for message in (b"", b"hello", b"x" * 3000):
        client.call(b"/f/Echo", message)
        client.call(b"/f/Plain", message)
    client.call(b"/f/Info", b"", (b"x-text", b"v"), (b"x-bin", b"AAEC,AQ"), (b"grpc-timeout", b"9S"))


def _unary_at_once(client: InMemoryClient) -> None:
    for i in range(12):
        path = (b"/f/Echo", b"/f/Wait", b"/f/Later")[i % 3]
        client.request(path, prefixed(bytes(i)))


def _errors(client: InMemoryClient) -> None:
    client.call(b"/f/Fail", "no ☺".encode())
    client.call(b"/f/None", b"x")
    client.call(b"/f/Echo", b"x", (b"grpc-encoding", b"snappy"))
    client.wait(client.request(b"/f/Echo", prefixed(b"a") + prefixed(b"b")))
    client.wait(client.request(b"/f/Echo", b""))
    client.wait(client.request(b"/f/Echo", b"\0\xff\xff\xff\xff"))


def _not_grpc(client: InMemoryClient) -> None:
    for method, kind in ((b"GET", b"application/grpc"), (b"POST", b"text/html")):
        fields = [
            (b":method", method),
            (b":scheme", b"http"),
            (b":path", b"/f/Echo"),
            (b"content-type", kind),
        ]
        stream_id = client.h2.send_request(fields, end_stream=True)
        client.answers[stream_id] = Answer()
        client.flush()
        client.wait(stream_id)


def _streams(client: InMemoryClient) -> None:
    client.call(b"/f/Count", bytes(40))
    client.wait(client.request(b"/f/Collect", prefixed(bytes(700)) * 5))
    stream_id = client.request(b"/f/Chat", prefixed(b"0"), ends=False)
    for i in range(1, 6):
        client.receive()
        client.h2.send_data(stream_id, prefixed(bytes(i)))
        client.flush()
    client.h2.end_stream(stream_id)
    client.flush()
    client.wait(stream_id)
    client.wait(client.request(b"/f/Chat64", b"".join(prefixed(bytes(i)) for i in range(90))))


def _compressed(client: InMemoryClient) -> None:
    message = b"squeeze me " * 300
    encoding = (b"grpc-encoding", b"gzip")
    client.wait(client.request(b"/f/Echo", prefixed(gzip.compress(message, mtime=0), 1), encoding))
    body = prefixed(zlib.compress(message), 1) + prefixed(b"plain")
    client.wait(client.request(b"/f/Chat64", body, (b"grpc-encoding", b"deflate")))
    bomb = zlib.compress(bytes(3 << 20))
    client.wait(client.request(b"/f/Collect", prefixed(bomb, 1), (b"grpc-encoding", b"deflate")))


def _resets(client: InMemoryClient) -> None:
    for path in (b"/f/Later", b"/f/Chat", b"/f/Echo", b"/f/Later"):
        stream_id = client.request(path, prefixed(b"x" * 100), ends=path == b"/f/Later")
        client.h2.reset_stream(stream_id)
        client.flush()
        client.answers[stream_id].reset = 8
    client.call(b"/f/Echo", b"after")


def _pings(client: InMemoryClient) -> None:
    client.h2.ping(b"12345678")
    client.flush()
    client.receive()
    client.call(b"/f/Echo", b"x")
    client.h2.update_settings({4: 100_000})
    client.h2.ping(b"abcdefgh")
    client.flush()


def _big(client: InMemoryClient) -> None:
    client.call(b"/f/Collect", bytes(200_000))
    client.call(b"/f/Grow", (150_000).to_bytes(4, "big"))


def _many_big_answers(client: InMemoryClient) -> None:
    for _ in range(4):
        client.request(b"/f/Grow", prefixed((300_000).to_bytes(4, "big")))
    for stream_id in list(client.answers):
        client.wait(stream_id)


def _trailers(client: InMemoryClient) -> None:
    stream_id = client.request(b"/f/Echo", prefixed(b"x"), ends=False)
    client.h2.send_trailers(stream_id, [(b"x-trailer", b"1")])
    client.flush()
    client.wait(stream_id)


def _goodbye(client: InMemoryClient) -> None:
    client.request(b"/f/Later", prefixed(b"last"))
    client.h2.send_goaway()
    client.flush()


def _tiny_windows(client: InMemoryClient) -> None:
    client.call(b"/f/Echo", b"0123456789" * 2)
    client.call(b"/f/Count", bytes(5))


def _no_window(client: InMemoryClient) -> None:
    stream_id = client.request(b"/f/Grow", prefixed((50_000).to_bytes(4, "big")))
    client.receive()
    client.h2.update_settings({4: 30_000})
    client.flush()
    client.receive()
    client.h2.update_settings({4: 10})
    client.flush()
    client.receive()
    client.h2.update_settings({4: 100_000})
    client.flush()
    client.wait(stream_id)


def _predict(client: InMemoryClient) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    message = request_for(rows, id="a").SerializeToString()
    for _ in range(3):
        client.call(b"/nnproto.v1.Inference/Predict", message)
    labels = request_for(rows[0], id="b", output=OUTPUT_KIND_LABELS, top_k=2).SerializeToString()
    client.call(b"/nnproto.v1.Inference/Predict", labels)
    client.call(b"/nnproto.v1.Inference/Predict", request_for(rows, "rose").SerializeToString())
    client.wait(
        client.request(b"/nnproto.v1.Inference/PredictStream", prefixed(message) * 7 + prefixed(b"?"))
    )
    client.call(b"/nnproto.v1.Inference/ListModels", b"")
    client.call(b"/grpc.health.v1.Health/Check", b"\n\4iris")
    watch = client.request(b"/grpc.health.v1.Health/Watch", prefixed(b""))
    client.receive()
    client.h2.reset_stream(watch)
    client.flush()
    client.answers[watch].reset = 8


def _open_inference(client: InMemoryClient) -> None:
    for raw in (True, False):
        message = oip_request_for([[1.0, 2.0, 3.0]] * 2, id="x", raw=raw).SerializeToString()
        for _ in range(2):
            client.call(b"/inference.GRPCInferenceService/ModelInfer", message)
        body = prefixed(message) * 5 + prefixed(b"\xff")
        client.wait(client.request(b"/inference.GRPCInferenceService/ModelStreamInfer", body))
    client.call(b"/inference.GRPCInferenceService/ModelMetadata", b"\n\4iris")
    client.call(b"/inference.GRPCInferenceService/ServerLive", b"")


_SCRIPTS: dict[str, Script] = {
    "predict": _predict,
    "open inference": _open_inference,
    "unary": _unary,
    "unary at once": _unary_at_once,
    "errors": _errors,
    "not gRPC": _not_grpc,
    "streams": _streams,
    "compressed": _compressed,
    "resets": _resets,
    "pings": _pings,
    "big": _big,
    "many big answers": _many_big_answers,
    "trailers": _trailers,
    "goodbye": _goodbye,
}

_HELLO = PREFACE + frame(SETTINGS, 0, 0)


def _call(stream_id: int, path: bytes, body: bytes, *more: tuple[bytes, bytes]) -> list[bytes]:
    return [
        frame(HEADERS, END_HEADERS, stream_id, block(path, *more)),
        frame(DATA, END_STREAM, stream_id, body),
    ]


_BY_HAND: dict[str, list[bytes]] = {
    "calls by hand": [
        _HELLO,
        frame(SETTINGS, ACK, 0),
        *_call(1, b"/f/Echo", prefixed(b"one")),
        *_call(3, b"/f/Wait", prefixed(b"two")),
        *_call(5, b"/f/Chat64", prefixed(b"a") * 3 + prefixed(b"")),
        *_call(7, b"/f/Count", prefixed(bytes(9))),
        *_call(9, b"/f/Fail", prefixed(b"why")),
        *_call(11, b"/f/Echo", prefixed(b"two") * 2, (b"grpc-timeout", b"100m")),
        *_call(
            13, b"/f/Collect", prefixed(gzip.compress(b"z" * 90, mtime=0), 1), (b"grpc-encoding", b"gzip")
        ),
    ],
    "streams side by side": [
        _HELLO,
        *(frame(HEADERS, END_HEADERS, stream_id, block(b"/f/Chat")) for stream_id in (1, 3, 5)),
        *(frame(DATA, 0, stream_id, prefixed(bytes(stream_id))) for stream_id in (1, 3, 5, 1, 5, 3)),
        frame(RST_STREAM, 0, 3, bytes((0, 0, 0, 8))),
        frame(DATA, PADDED, 1, b"\x04" + prefixed(b"padded") + bytes(4)),
        frame(DATA, 0, 5, b"\0\0\0"),
        frame(DATA, END_STREAM, 5, b"\0\x03abc"),
        frame(DATA, END_STREAM, 1),
    ],
    "in pieces": [
        _HELLO,
        frame(HEADERS, 0, 1, block(b"/f/Echo")[:10]),
        frame(CONTINUATION, 0, 1, block(b"/f/Echo")[10:20]),
        frame(CONTINUATION, END_HEADERS, 1, block(b"/f/Echo")[20:]),
        frame(PRIORITY, 0, 1, bytes((0, 0, 0, 0, 16))),
        frame(WINDOW_UPDATE, 0, 0, (70_000).to_bytes(4, "big")),
        frame(WINDOW_UPDATE, 0, 1, (70_000).to_bytes(4, "big")),
        frame(PING, 0, 0, b"12345678"),
        *_call(3, b"/f/Grow", prefixed((100_000).to_bytes(4, "big"))),
        frame(DATA, 0, 1, b""),
        frame(DATA, END_STREAM, 1, b""),
        frame(SETTINGS, 0, 0, bytes((0, 4, 0, 16, 0, 0)) + bytes((0, 3, 0, 0, 0, 9))),
    ],
}
