"""Model files that are wrong, change or go while a server runs: what is served goes on being served."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.models import save_scale
from support.oip import request_for as oip_request_for
from support.oip import tensor_of
from support.server import ServerProcess, running

from faults.bystander import PATIENCE_S, Bystander
from faults.test_requests import INFER, check_text
from faults.tried import Tried
from nnproto.oip import inference_pb2 as oip
from nnserver.model_folder import BUNDLED

X = np.arange(1, 5, dtype=np.float32).reshape(4, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with the digits, for the bystander, and "victim", y = 2 x."""
    inside = tmp_path / "models"
    inside.mkdir()
    (inside / "digits.safetensors").write_bytes((BUNDLED / "digits.safetensors").read_bytes())
    save_scale(inside / "victim.safetensors", 2.0)
    return inside


@pytest.fixture
def controlled(transport: str, folder: Path) -> Iterator[ServerProcess]:
    """A server whose clients may load and unload models."""
    with running(str(folder), "--transport", transport, "--model-control") as process:
        yield process
    assert "Traceback" not in process.errors


class Repository:
    """A client that loads, unloads and asks the victim."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def change(self, what: str, name: str = "victim") -> None:
        kind = getattr(oip, f"RepositoryModel{what}Request")
        path = f"/inference.GRPCInferenceService/RepositoryModel{what}"
        self._channel.unary_unary(path)(kind(model_name=name).SerializeToString(), timeout=PATIENCE_S)

    def ask(self) -> np.ndarray:
        """What the victim makes of X."""
        message = oip_request_for(X, "victim", outputs=["outputs"]).SerializeToString()
        reply = self._channel.unary_unary(INFER)(message, timeout=PATIENCE_S)
        return tensor_of(oip.ModelInferResponse.FromString(reply))

    def weight(self) -> float | None:
        """The weight that is served; None if the victim is not there. Raises if X has not one weight."""
        try:
            y = self.ask()
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise
        weights = set((y / X).ravel().tolist())
        assert len(weights) == 1
        return weights.pop()


def whole(folder: Path) -> bytes:
    return (folder / "victim.safetensors").read_bytes()


def put(data: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A change of the victim's file to *data* of what it was."""

    def change(folder: Path) -> None:
        (folder / "victim.safetensors").write_bytes(data(whole(folder)))

    return change


def mismatched(folder: Path) -> None:
    """Weights of one shape under an architecture of another."""
    data = whole(folder)
    changed = data.replace(b'\\"n_out\\": 1', b'\\"n_out\\": 7')
    assert changed != data
    (folder / "victim.safetensors").write_bytes(changed)


def link_out(folder: Path) -> None:
    (folder / "victim.safetensors").unlink()
    outside = save_scale(folder.parent / "outside" / "secret.safetensors", 9.0)
    (folder / "victim.safetensors").symlink_to(outside)


def pipe(folder: Path) -> None:
    (folder / "victim.safetensors").unlink()
    os.mkfifo(folder / "victim.safetensors")


def sparse_terabyte(folder: Path) -> None:
    with (folder / "victim.safetensors").open("r+b") as file, contextlib.suppress(OSError):
        file.truncate(1 << 40)


BAD_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut in its midst": (put(lambda data: data[: len(data) // 2]), "truncated"),
    "cut by its last byte": (put(lambda data: data[:-1]), "bytes of numbers"),
    "empty": (put(lambda data: b""), "has 0 bytes"),
    "a header of 2^63 bytes": (put(lambda data: b"\xff" * 7 + b"\x7f" + data[8:]), "its header is too large"),
    "a header of 15 MB that is not there": (put(lambda data: (15 << 20).to_bytes(8, "little")), "truncated"),
    "a header of brackets": (put(lambda data: (9000).to_bytes(8, "little") + b"[" * 9000), "not valid JSON"),
    "weights that do not match": (mismatched, "shape"),
    "a terabyte of holes": (sparse_terabyte, "bytes of numbers"),
    "NaN for a bias": (put(lambda data: data[:-4] + b"\0\0\xc0\x7f"), "must be finite"),
    "infinity for a bias": (put(lambda data: data[:-4] + b"\0\0\x80\xff"), "must be finite"),
    "a pickle": (put(lambda data: b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR."), "header"),
    "a link out of the folder": (link_out, "leads out"),
    "a pipe": (pipe, "no regular file"),
}

LINES = [
    Tried(
        "Model files",
        f"{what}, to be loaded",
        "FAILED_PRECONDITION; the old one serves",
        "test_a_bad_file_is_refused",
    )
    for what in BAD_FILES
]


def test_a_bad_file_is_refused(controlled: ServerProcess, folder: Path) -> None:
    """With a reason and without a path; the old version serves on, and a good file mends it."""
    good = whole(folder)
    victim = folder / "victim.safetensors"
    with Bystander(controlled) as bystander, controlled.channel() as channel:
        repository = Repository(channel)
        for spoil, text in BAD_FILES.values():
            spoil(folder)
            with pytest.raises(grpc.RpcError) as caught:
                repository.change("Load")
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            check_text(caught.value.details(), text)
            assert str(folder) not in caught.value.details()
            assert repository.weight() == 2.0
            bystander.is_answered()
            victim.unlink()
            victim.write_bytes(good)
        repository.change("Load")
        assert repository.weight() == 2.0


LINES += [
    Tried(
        "Model files", "names that are paths, to be loaded", "NOT_FOUND", "test_nothing_outside_can_be_loaded"
    ),
    Tried(
        "Model files",
        "deleted, cut and overwritten while it is served",
        "served on",
        "test_a_served_model_needs_no_file",
    ),
    Tried(
        "Model files", "half written under --reload", "the old one serves", "test_a_half_written_file_waits"
    ),
    Tried(
        "Model files",
        "loaded, unloaded and asked at once",
        "each answer is a whole model's, or NOT_FOUND",
        "test_load_unload_and_infer_at_once",
    ),
]


@pytest.mark.parametrize(
    "name", ["../outside/secret", "/etc/passwd", "..", ".", "victim.safetensors", "a\0b", "x" * 4000]
)
def test_nothing_outside_can_be_loaded(controlled: ServerProcess, folder: Path, name: str) -> None:
    save_scale(folder.parent / "outside" / "secret.safetensors", 9.0)
    with Bystander(controlled), controlled.channel() as channel:
        for what in ("Load", "Unload"):
            with pytest.raises(grpc.RpcError) as caught:
                Repository(channel).change(what, name)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_served_model_needs_no_file(controlled: ServerProcess, folder: Path) -> None:
    """Weights are in memory: what happens to the file happens to the file."""
    victim = folder / "victim.safetensors"
    with Bystander(controlled), controlled.channel() as channel:
        repository = Repository(channel)
        with victim.open("r+b") as file:
            file.write(b"\xff" * 50)
        assert repository.weight() == 2.0
        os.truncate(victim, 10)
        assert repository.weight() == 2.0
        victim.unlink()
        assert repository.weight() == 2.0


def test_a_half_written_file_waits(transport: str, folder: Path) -> None:
    """Half of a file stays for several looks; when it is whole it is served, and not before."""
    flags = ("--transport", transport, "--reload", "--reload-interval-s", "0.05")
    victim = folder / "victim.safetensors"
    new = save_scale(folder.parent / "new" / "new.safetensors", 3.0).read_bytes()
    with running(str(folder), *flags) as server, Bystander(server), server.channel() as channel:
        repository = Repository(channel)
        victim.write_bytes(new[: len(new) // 2])
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            assert repository.weight() == 2.0
        victim.write_bytes(new)
        end = time.monotonic() + PATIENCE_S
        while repository.weight() != 3.0:
            assert time.monotonic() < end
    assert "Traceback" not in server.errors


def test_load_unload_and_infer_at_once(controlled: ServerProcess, folder: Path) -> None:
    """Two load, one unloads, one replaces the file, three ask, for 200 rounds."""
    rounds = 100
    weights = (2.0, 3.0, 5.0)
    is_over = threading.Event()

    def change(what: str) -> set[str]:
        ends = set()
        with controlled.channel() as channel:
            for _ in range(rounds):
                try:
                    Repository(channel).change(what)
                    ends.add("OK")
                except grpc.RpcError as error:
                    # A file that is replaced while it is read is a reason to try again.
                    is_unsettled = "changed while it was read" in error.details()
                    ends.add("unsettled" if is_unsettled else error.code().name)
        return ends

    def replace() -> set[str]:
        for i in range(rounds):
            save_scale(folder / "victim.safetensors", weights[i % 3])
        return {"OK"}

    def ask() -> set[str]:
        found: set[str] = set()
        with controlled.channel() as channel:
            while not is_over.is_set() or not found:
                weight = Repository(channel).weight()
                assert weight is None or weight in weights
                found.add("NOT_FOUND" if weight is None else "OK")
        return found

    with Bystander(controlled), ThreadPoolExecutor(7) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        changing = [pool.submit(change, what) for what in ("Load", "Load", "Unload")]
        changing.append(pool.submit(replace))
        try:
            ends = set().union(*(future.result() for future in changing))
        finally:
            is_over.set()
        answers = set().union(*(future.result() for future in asking))
    assert ends <= {"OK", "NOT_FOUND", "unsettled"}
    assert "OK" in answers
    with controlled.channel() as channel:
        Repository(channel).change("Load")
        assert Repository(channel).weight() == weights[(rounds - 1) % 3]
