"""Arguments in, a real nnserver process out, on a free port or socket, ended by its own process id."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from nnproto.v1 import inference_pb2 as pb

NNSERVER = Path(sys.executable).parent / "nnserver"
PREDICT = "/nnproto.v1.Inference/Predict"
PREDICT_STREAM = "/nnproto.v1.Inference/PredictStream"
# Long enough for a cold compile on a busy machine; a server that is well answers at once.
PATIENCE_S = 60.0


class ServerProcess:
    """A running nnserver: its address, its channel and what it printed."""

    def __init__(
        self,
        *arguments: str,
        listen: str = "127.0.0.1:0",
        env: dict[str, str] | None = None,
        command: Sequence[str] = (str(NNSERVER),),
        log: Path | None = None,
    ) -> None:
        """log: a file for standard error: what is written there would fill a pipe in a long run."""
        self._log = log
        with contextlib.ExitStack() as stack:
            self.process = subprocess.Popen(
                [*command, "--listen", listen, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if log is None else stack.enter_context(log.open("w")),
                text=True,
                errors="replace",  # gRPC's core logs what a peer has sent, as it is.
                env={**os.environ, **(env or {})},
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        if " ready on " not in self.ready_line:
            _, errors = self.process.communicate()
            raise RuntimeError(f"the server did not start: {errors}")
        self.address = self.ready_line.split(" ready on ")[1].split(";")[0]

    def channel(self, **options: Any) -> grpc.Channel:
        """A channel of its own connection."""
        settings = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        return grpc.insecure_channel(self.address, options=[*settings, *options.items()])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """End the server, if it still runs, and return its exit status."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        try:
            self.out, self.errors = self.process.communicate(timeout=PATIENCE_S)
            if self._log is not None:
                self.errors = self._log.read_text(errors="replace")
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode

    def status(self, key: str) -> int:
        """A number of /proc/PID/status: "Threads", or "VmRSS" in KiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
        raise KeyError(key)

    def cpu_s(self) -> float:
        """Seconds of processor time that the server has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def running(*arguments: str, **options: Any) -> Iterator[ServerProcess]:
    """Run nnserver with *arguments* for the block."""
    server = ServerProcess(*arguments, **options)
    try:
        yield server
    finally:
        server.stop()


class Stub:
    """The service's methods on one channel, with messages of nnproto."""

    def __init__(self, channel: grpc.Channel) -> None:
        def method(name: str, kind: str, answer: Any) -> Any:
            make = getattr(channel, kind)
            return make(
                f"/nnproto.v1.Inference/{name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=answer.FromString,
            )

        self.predict = method("Predict", "unary_unary", pb.PredictResponse)
        self.predict_stream = method("PredictStream", "stream_stream", pb.PredictResponse)
        self.differentiate = method("Differentiate", "unary_unary", pb.DifferentiateResponse)
        self.differentiate_stream = method("DifferentiateStream", "stream_stream", pb.DifferentiateResponse)
        self.list_models = method("ListModels", "unary_unary", pb.ListModelsResponse)
        self.get_model = method("GetModel", "unary_unary", pb.Model)


def request(x: Any, model: str = "digits", **fields: Any) -> pb.PredictRequest:
    """A request with the rows *x*, sent in their own dtype."""
    x = np.asarray(x)
    dtype = pb.DATA_TYPE_FLOAT64 if x.dtype == np.float64 else pb.DATA_TYPE_FLOAT32
    return pb.PredictRequest(
        model=model, inputs=pb.Tensor(shape=x.shape, dtype=dtype, data=x.tobytes()), **fields
    )


def rows(response: pb.PredictResponse) -> NDArray[Any]:
    """The outputs of *response*."""
    dtype = "<f8" if response.outputs.dtype == pb.DATA_TYPE_FLOAT64 else "<f4"
    return np.frombuffer(response.outputs.data, dtype).reshape(tuple(response.outputs.shape))
