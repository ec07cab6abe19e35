"""
A command in, the same command run against a server of its own out.

    python benchmarks/with_server.py [--pin] [--server-args "..."] -- COMMAND [ARG...]

Starts nnserver on a free port of 127.0.0.1, sets NNCLIENT_TARGET, runs COMMAND, stops the server and
returns COMMAND's exit status. --pin gives the server the first core and COMMAND the others, so
that neither slows the other down; without at least two cores, or off Linux, it does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

READY = " ready on "


@dataclass(frozen=True)
class Server:
    """A running nnserver."""

    address: str
    pid: int

    def memory_mib(self) -> float:
        """Return its resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@contextlib.contextmanager
def running_server(arguments: list[str], cores: set[int] | None = None) -> Iterator[Server]:
    """Run nnserver with *arguments* on *cores*; give it once it is ready; stop it."""
    nnserver = Path(sys.executable).parent / "nnserver"
    server = subprocess.Popen(
        [str(nnserver), "--listen", "127.0.0.1:0", *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        if cores:
            # Before it has threads to speak of; those it starts later inherit the cores.
            os.sched_setaffinity(server.pid, cores)
        assert server.stdout is not None
        line = server.stdout.readline()
        if READY not in line:
            raise SystemExit(f"the server did not start (exit status {server.wait()})")
        yield Server(line.split(READY)[1].split(";")[0], server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command against a server of its own.")
    parser.add_argument("--pin", action="store_true", help="server on the first core, command on the others")
    parser.add_argument("--server-args", default="", help="further arguments for nnserver")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command was given")

    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    is_pinned = args.pin and len(usable) > 1
    with running_server(shlex.split(args.server_args), set(usable[:1]) if is_pinned else None) as server:
        if is_pinned:
            os.sched_setaffinity(0, set(usable[1:]))
        try:
            return subprocess.run(command, env={**os.environ, "NNCLIENT_TARGET": server.address}).returncode
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
