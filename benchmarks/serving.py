"""
This machine in, a table of requests a second out: both transports beside gRPC's C++ callback API.

    make bench-serving            builds the C++ peers (Debian: libgrpc++-dev protobuf-compiler-grpc
                                  nghttp2-client) and runs this

Every server is given the first core, every generator the second. Answers are compared with nncore's
own, byte for byte, before anything is timed, and by the C++ generator throughout. Candidates take
turns within every round; the table has medians over the rounds and ratios of them. The C++ server
does no work: it answers a constant of the same size. nnserver decodes, runs the model and encodes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import nncore
import nnserver
from benchmarks.document import write_measured
from nnproto.v1 import inference_pb2 as pb

# By candidate, each round's figures: a rate, and latencies where the generator tells them.
Measured = dict[str, list[dict[str, float]]]

HERE = Path(__file__).parent
MODELS = Path(nnserver.__file__).parent / "models"
SERVER_CORE, LOAD_CORE = 0, 1
MEASURE_S = 3.0


@dataclass(frozen=True)
class Workload:
    """One way to load a server."""

    name: str
    generator: str  # "h2load" or "load"
    mode: str  # "unary" or "stream"
    connections: int
    in_flight: int
    model: str
    rows: int


WORKLOADS = (
    Workload("unary, 4 connections x 8 in flight, h2load", "h2load", "unary", 4, 8, "digits", 1),
    Workload("unary, 4 connections x 8 in flight", "load", "unary", 4, 8, "digits", 1),
    Workload("unary, 1 in flight", "load", "unary", 1, 1, "digits", 1),
    Workload("stream, 32 in flight", "load", "stream", 1, 32, "digits", 1),
    Workload("unary, 100 KB messages, 4 x 2 in flight", "load", "unary", 4, 2, "mnist", 32),
    Workload("unary, 3 MB messages, 2 x 2 in flight", "load", "unary", 2, 2, "mnist", 1000),
)
# nnserver's flags; gRPC's C++ callback API has none.
CANDIDATES = {
    "h2": ("--transport", "h2"),
    "h2 polling": ("--transport", "h2", "--busy-poll-us", "200"),
    "grpcio": ("--transport", "grpcio"),
    "c++": (),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the transports beside gRPC's C++ callback API.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=HERE / "cpp" / "build", help="folder of the C++ peers")
    parser.add_argument("--only", default="", help="only workloads whose name contains this")
    parser.add_argument("--candidates", default=",".join(CANDIDATES))
    parser.add_argument("--markdown", type=Path, help="write the tables between the marks of this document")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    args = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed: one for the server, one for the generator")
    candidates = [
        name for name in args.candidates.split(",") if name != "c++" or (args.peers / "echo_server").exists()
    ]
    results: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        for workload in WORKLOADS:
            if args.only in workload.name and shutil.which(workload.generator, path=_path(args.peers)):
                results[workload.name] = measure(workload, candidates, args, Path(folder))
                print(workload.name, *rows(results[workload.name]), sep="\n", flush=True)
    if args.markdown:
        write_measured(args.markdown, section(results, args.rounds))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def measure(workload: Workload, candidates: list[str], args: argparse.Namespace, folder: Path) -> Measured:
    """Return every round's figures by candidate."""
    request, answer = conversation(workload)
    (folder / "request").write_bytes(request)
    (folder / "answer").write_bytes(answer)
    (folder / "body").write_bytes(b"\0" + len(request).to_bytes(4, "big") + request)
    figures: Measured = {name: [] for name in candidates}
    with contextlib.ExitStack() as stack:
        targets = {name: stack.enter_context(running(name, len(answer), args.peers)) for name in candidates}
        for name, target in targets.items():
            if name != "c++":
                check_answer(target, request, answer)
        for _ in range(args.rounds):
            for name, target in targets.items():
                figures[name].append(load(workload, target, args.peers, folder, is_checked=name != "c++"))
    return figures


def conversation(workload: Workload) -> tuple[bytes, bytes]:
    """Return a request of the workload and the answer that nncore itself gives."""
    mlp = nncore.load(MODELS / f"{workload.model}.safetensors")
    x = np.random.default_rng(0).random((workload.rows, mlp.n_in), dtype=np.float32)
    request = pb.PredictRequest(
        model=workload.model, inputs=pb.Tensor(shape=x.shape, dtype=pb.DATA_TYPE_FLOAT32, data=x.tobytes())
    )
    y = mlp.forward(x)
    answer = pb.PredictResponse(
        model=workload.model,
        version="1",
        outputs=pb.Tensor(shape=y.shape, dtype=pb.DATA_TYPE_FLOAT32, data=y.tobytes()),
    )
    return request.SerializeToString(), answer.SerializeToString()


@contextlib.contextmanager
def running(candidate: str, answer_bytes: int, peers: Path) -> Iterator[str]:
    """Run one server on its core; give its address; stop it."""
    if candidate == "c++":
        command = [str(peers / "echo_server"), "127.0.0.1:0", str(answer_bytes)]
    else:
        nnserver_command = str(Path(sys.executable).parent / "nnserver")
        command = [nnserver_command, "--listen", "127.0.0.1:0", *CANDIDATES[candidate]]
    server = subprocess.Popen(
        ["taskset", "-c", str(SERVER_CORE), *command], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        found = re.search(r" ready on (\S+?);", server.stdout.readline())
        if not found:
            raise SystemExit(f"{candidate} did not start")
        yield found[1]
    finally:
        server.terminate()
        server.wait()


def check_answer(target: str, request: bytes, answer: bytes) -> None:
    """Stop if the server's answer is not nncore's, byte for byte."""
    import grpc

    with grpc.insecure_channel(target) as channel:
        predict = channel.unary_unary("/nnproto.v1.Inference/Predict")
        if predict(request, wait_for_ready=True, timeout=30) != answer:
            raise SystemExit(f"{target} does not answer what nncore computes")


def load(workload: Workload, target: str, peers: Path, folder: Path, *, is_checked: bool) -> dict[str, float]:
    """Load *target* for one round; return its rate and, where the generator tells, latencies."""
    pinned = ["taskset", "-c", str(LOAD_CORE)]
    if workload.generator == "h2load":
        command = [
            "h2load",
            f"--duration={MEASURE_S:g}",
            "--warm-up-time=1",
            f"--clients={workload.connections}",
            f"--max-concurrent-streams={workload.in_flight}",
            f"--data={folder / 'body'}",
            "--header=content-type: application/grpc",
            "--header=te: trailers",
            f"http://{target}/nnproto.v1.Inference/Predict",
        ]
        printed = _run([*pinned, *command])
        found = re.search(r"([0-9.]+) req/s", printed)
        failed = re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", printed)
        if not found or not failed or any(int(count) for count in failed.groups()):
            raise SystemExit(f"h2load failed:\n{printed}")
        return {"rate": float(found[1])}
    sizes = [str(workload.connections), str(workload.in_flight), f"{MEASURE_S + 1:g}"]
    answer = str(folder / "answer") if is_checked else "-"
    command = [str(peers / "load"), target, workload.mode, *sizes, str(folder / "request"), answer]
    figures: dict[str, float] = json.loads(_run([*pinned, *command]))
    return figures


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _path(peers: Path) -> str:
    return f"{peers}{os.pathsep}{os.environ.get('PATH', '')}"


def medians(figures: Measured) -> dict[str, dict[str, float]]:
    """Every figure of a workload by candidate, the median over the rounds."""
    return {
        candidate: {figure: statistics.median(each[figure] for each in found) for figure in found[0]}
        for candidate, found in figures.items()
    }


def rows(figures: Measured) -> Iterator[str]:
    """A workload's table for the terminal, a line a candidate."""
    found = medians(figures)
    for candidate, median in found.items():
        line = f"  {candidate:10} {median['rate']:10,.0f} requests/s"
        if "p50_us" in median:
            line += f"   p50 {median['p50_us']:8,.0f} us   p99 {median['p99_us']:8,.0f} us"
        if candidate != "h2" and "h2" in found:
            line += f"   h2 / {candidate}: {found['h2']['rate'] / median['rate']:.2f}"
        yield line


def section(results: dict[str, Measured], rounds: int) -> Iterator[str]:
    """All workloads' tables for a document."""
    yield f"Medians of {rounds} rounds of {MEASURE_S:g} s."
    for name, figures in results.items():
        found = medians(figures)
        yield f"\n**{name[0].upper()}{name[1:]}**\n"
        yield "| server | requests/s | p50, us | p99, us | h2's rate over it |"
        yield "| --- | ---: | ---: | ---: | ---: |"
        for candidate, median in found.items():
            latencies = (f"{median[key]:,.0f}" if key in median else "" for key in ("p50_us", "p99_us"))
            ratio = f"{found['h2']['rate'] / median['rate']:.2f}" if "h2" in found else ""
            yield f"| {candidate} | {median['rate']:,.0f} | {' | '.join(latencies)} | {ratio} |"


if __name__ == "__main__":
    main()
