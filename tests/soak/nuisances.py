"""An address in, trouble out: peers that are killed, talk nonsense or do not read, and models that change."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
from support.h2 import END_HEADERS, HEADERS, PREFACE, SETTINGS, block, connect, frame, prefixed
from support.models import save_scale
from support.server import PREDICT_STREAM, request

from nnproto.oip import inference_pb2 as oip
from soak.questions import COMING, REPLACED, WEIGHTS

_PATH = PREDICT_STREAM.encode()
_HELLO = PREFACE + frame(SETTINGS, 0, 0)
_ROWS = request(np.zeros((40, 64), np.float32)).SerializeToString()
_SCALE_WIDTH = 16
PATIENCE_S = 60.0


class Nuisance(threading.Thread):
    """Does one harm after the other to the server at *address*, with moments between, until it is stopped."""

    def __init__(self, address: str, folder: Path, seed: int) -> None:
        super().__init__(name="nuisance", daemon=True)
        self._address = address
        self._folder = folder
        self._random = random.Random(seed)
        self._stopped = threading.Event()
        self.fault: BaseException | None = None
        self.done: Counter[str] = Counter()
        # What may be done now is done by this thread alone, so that "served or not" is never in doubt.
        self._is_served = True

    def stop(self) -> None:
        """End what is being done, and leave all models served."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        harms: list[Callable[[], None]] = [
            self.talk_nonsense,
            self.begin_and_break_off,
            self.read_nothing,
            self.replace_a_model,
            self.half_write_a_model,
            self.unload_or_load_a_model,
        ]
        try:
            # Everything once, however soon it ends.
            for harm in (self.kill_a_client, *harms):
                self._do(harm)
            while not self._stopped.wait(self._random.uniform(0, 0.4)):
                is_rare = self._random.random() < 0.02
                self._do(self.kill_a_client if is_rare else self._random.choice(harms))
            if not self._is_served:
                self.unload_or_load_a_model()
        except BaseException as error:
            self.fault = error

    def _do(self, harm: Callable[[], None]) -> None:
        harm()
        self.done[harm.__name__.replace("_", " ")] += 1

    def talk_nonsense(self) -> None:
        """Random bytes, half a preface, HTTP/1.1, TLS, and frames that are none."""
        nonsense = self._random.choice(
            (
                self._random.randbytes(self._random.choice((1, 24, 5000))),
                PREFACE[:10],
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
                _HELLO + self._random.randbytes(200),
                _HELLO + frame(HEADERS, END_HEADERS, 1, self._random.randbytes(50)),
            )
        )
        with self._connected() as sock:
            sock.sendall(nonsense)
            sock.settimeout(0.2)
            sock.recv(100)

    def begin_and_break_off(self) -> None:
        """A stream of requests whose connection is reset before its answers come."""
        with self._connected() as sock:
            body = prefixed(_ROWS) * self._random.randint(1, 30)
            sock.sendall(_HELLO + frame(HEADERS, END_HEADERS, 1, block(_PATH)))
            for at in range(0, len(body), 16_000):
                sock.sendall(frame(0, 0, 1, body[at : at + 16_000]))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def read_nothing(self) -> None:
        """Streams whose windows are small and whose answers nobody reads, for a moment."""
        with self._connected() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            settings = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 100))
            sock.sendall(PREFACE + settings)
            for stream_id in (1, 3, 5):
                sock.sendall(frame(HEADERS, END_HEADERS, stream_id, block(_PATH)))
                sock.sendall(frame(0, 0, stream_id, prefixed(_ROWS)))
            self._stopped.wait(self._random.uniform(0.1, 1.0))

    def kill_a_client(self) -> None:
        """A process with calls and a stream open, killed in their midst."""
        mode = self._random.choice(("unary", "stream"))
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "nnclient", "load", "--target", self._address, "--model", "digits"),
                *("--concurrency", "8", "--duration-s", "60", "--mode", mode),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._stopped.wait(3.0)
        os.killpg(process.pid, signal.SIGKILL)  # With the processes that it has started.
        process.wait()

    def replace_a_model(self) -> None:
        """The file is put anew, with other weights; the server sees that by itself."""
        save_scale(self._folder / f"{REPLACED}.safetensors", self._random.choice(WEIGHTS), _SCALE_WIDTH)

    def half_write_a_model(self) -> None:
        """A file that is cut in its midst for longer than the server waits for it to settle, then whole."""
        file = self._folder / f"{REPLACED}.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        self._stopped.wait(1.0)
        file.write_bytes(whole)

    def unload_or_load_a_model(self) -> None:
        """By the Open Inference Protocol."""
        kind = oip.RepositoryModelUnloadRequest if self._is_served else oip.RepositoryModelLoadRequest
        name = kind.DESCRIPTOR.name.removesuffix("Request")
        with grpc.insecure_channel(self._address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            method = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
            method(kind(model_name=COMING).SerializeToString(), timeout=PATIENCE_S)
        self._is_served = not self._is_served

    @contextlib.contextmanager
    def _connected(self):
        """A connection that the server may close at any time."""
        with contextlib.suppress(OSError), connect(self._address) as sock:
            yield sock
