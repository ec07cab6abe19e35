"""A client that is a program of its own in, what became of each case out."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from interop.endpoints import Endpoint

_HERE = Path(__file__).parent
# Below the suite's limit of a test, so that the cases that did end are told.
_TIMEOUT_S = 110.0


class NotAtHand(Exception):
    """What a client needs is not installed; says what, and what would install it."""


@dataclass(frozen=True)
class Program:
    """A client that takes cases as arguments and prints one line for each."""

    command: tuple[str, ...]

    def outcomes(self, arguments: Iterable[str]) -> dict[str, str]:
        """Run the program; return by case "ok", or what was wrong."""
        try:
            output = subprocess.run(
                [*self.command, *arguments], stdout=subprocess.PIPE, timeout=_TIMEOUT_S, check=True
            ).stdout
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
        lines = (line.partition(" ") for line in output.decode().splitlines())
        return {case: outcome for case, _, outcome in lines}

    def outcome_after(self, case: str, arguments: Iterable[str], act: Callable[[], None]) -> str:
        """Run *case* and, once it says that it has begun, *act*; return its outcome."""
        command = [*self.command, *arguments, case]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if process.stdout.readline() != f"{case} begun\n":
                return f"{case} did not begin"
            act()
            return process.communicate(timeout=_TIMEOUT_S)[0].strip()

    def predict(self, endpoint: Endpoint, row: bytes) -> bytes:
        """Send the float32 *row* to the model digits; return the bytes of the outputs."""
        arguments = [*endpoint.arguments, "--predict", "digits", "--inputs", row.hex()]
        outcome = self.outcomes(arguments)["predict"]
        if outcome.startswith("failed"):
            raise RuntimeError(outcome)
        return bytes.fromhex(outcome)


def grpc_js() -> Program:
    """The client on @grpc/grpc-js; raises NotAtHand without Node.js or the package."""
    folder = _HERE / "grpc_js"
    if not shutil.which("node"):
        raise NotAtHand("Node.js is not installed; as root, `make test-interop` installs it")
    if not (folder / "node_modules" / "@grpc" / "grpc-js").exists():
        raise NotAtHand("@grpc/grpc-js is not installed; `make test-interop` installs it with npm")
    return Program(("node", str(folder / "client.js")))


def cpp() -> Program:
    """The client on gRPC's C++ library, built if it is not current; raises NotAtHand without the library."""
    for tool in ("g++", "make", "pkg-config", "protoc", "grpc_cpp_plugin"):
        if not shutil.which(tool):
            raise NotAtHand(f"{tool} is not installed; as root, `make test-interop` installs it")
    if subprocess.run(["pkg-config", "--exists", "grpc++", "protobuf"]).returncode:
        raise NotAtHand("libgrpc++-dev is not installed; as root, `make test-interop` installs it")
    folder = _HERE / "cpp"
    subprocess.run(["make", "--quiet", "-C", str(folder), f"-j{os.cpu_count()}"], check=True)
    return Program((str(folder / "build" / "client"),))


def h2load() -> str:
    """The path of h2load; raises NotAtHand."""
    found = shutil.which("h2load")
    if not found:
        raise NotAtHand("h2load is not installed; as root, `make test-interop` installs it")
    return found
