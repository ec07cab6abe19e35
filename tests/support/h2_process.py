"""
Options in, a server of TestApi in a process of its own out, which can be asked what it holds.

    python -m support.h2_process '{"max_streams": 4}'   prints its address, then answers what it is asked

A process of its own, because memory is a process's: in one process the test's own would be counted too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.h2 import RawClient, started, wait_for

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Level:
    """What a server holds: memory of its process after a collection, and its counters."""

    rss_kib: int
    peak_rss_kib: int
    connections: int
    open_calls: int
    open_streams: int
    buffered_bytes: int
    timed_calls: int
    open_files: int
    errors: int

    @property
    def is_idle(self) -> bool:
        return not (
            self.connections
            or self.open_calls
            or self.open_streams
            or self.buffered_bytes
            or self.timed_calls
        )


class H2Process:
    """
    A running server: its address and what it holds.

    Options are those of H2Options, and two more. open_files: how many it may have.  loop: "asyncio" for a
    loop of asyncio's, as where uvloop is not installed.
    """

    def __init__(self, **options: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.h2_process", json.dumps(options)],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Python's own allocator keeps arenas that a few objects are left in: after a flood it holds twice
            # what it did, and goes on growing for fifty of them. The C library gives back what is free.
            env={**os.environ, "PYTHONMALLOC": "malloc"},
        )
        self._lock = threading.Lock()
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the server did not start"

    def client(self, **options: Any) -> RawClient:
        return RawClient(self.address, **options)

    def level(self) -> Level:
        """What the server holds now."""
        return Level(**self._ask("level"))

    def counters(self) -> Level:
        """The same without a collection: quick, and its memory says little."""
        return Level(**self._ask("counters"))

    def forget_peak(self) -> None:
        """Let peak_rss_kib be the highest from now on."""
        self._ask("forget peak")

    def answer_sleeping(self) -> None:
        """End the calls of Sleep that wait."""
        self._ask("answer")

    def wait_until_idle(self, beside: int = 0) -> Level:
        """Wait until there are no connections but *beside* others, quiet ones; return what is held then."""
        found = self.counters()

        def is_idle() -> bool:
            nonlocal found
            found = self.counters()
            # One of the others may be in the midst of a call, whose answer is a few bytes.
            return found.connections <= beside and found.open_calls <= beside and found.buffered_bytes < 1000

        wait_for(is_idle, lambda: str(found))
        return self.level()

    def stop(self) -> None:
        """Drain it; it must end well."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(20) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _ask(self, what: str) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        assert line, "the server has ended"
        answer: dict[str, int] = json.loads(line)
        return answer


@contextlib.contextmanager
def serving_apart(**options: Any) -> Iterator[H2Process]:
    """Run a server in a process of its own for the block."""
    server = H2Process(**options)
    try:
        yield server
    finally:
        server.stop()


def main() -> None:
    import resource

    options = json.loads(sys.argv[1])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(options.pop("open_files", most), most), most))
    if options.pop("loop", "uvloop") == "asyncio":
        sys.modules["uvloop"] = None  # type: ignore[assignment]
    logging.getLogger().addHandler(logging.StreamHandler())  # To standard error, for who reads a failure.
    inside = _Inside(options)
    print(inside.running.address, flush=True)
    for line in sys.stdin:
        print(json.dumps(inside.answer(line.strip())), flush=True)
    inside.running.server.drain(0.5)


class _Inside(logging.Handler):
    """The server in its own process; as a handler of logs it counts what is no peer's fault."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(logging.ERROR)
        logging.getLogger().addHandler(self)
        self._errors = 0
        # Opened now: there may be no file left when it is asked for.
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self.running = started(**options)

    def emit(self, record: logging.LogRecord) -> None:
        self._errors += 1

    def answer(self, question: str) -> dict[str, int]:
        sleeping = self.running.api.sleeping
        if question == "answer":
            for call in sleeping:
                call.reply(b"late")
                call.finish()
            sleeping.clear()
        elif question == "forget peak":
            Path("/proc/self/clear_refs").write_text("5")
        elif question == "level":
            sleeping[:] = [call for call in sleeping if not call.is_cancelled()]
            gc.collect()
            with contextlib.suppress(AttributeError, OSError):  # What glibc keeps for later is not held.
                ctypes.CDLL(None).malloc_trim(0)
        return {} if question in ("answer", "forget peak") else self._level()

    def _level(self) -> dict[str, int]:
        server = self.running.server
        lines = os.pread(self._status, 1 << 16, 0).decode().splitlines()
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        try:
            open_files = len(os.listdir("/proc/self/fd"))
        except OSError:  # There is none left to look with.
            open_files = -1
        return {
            "rss_kib": int(status["VmRSS"].split()[0]),
            "peak_rss_kib": int(status["VmHWM"].split()[0]),
            "connections": len(server.connections),
            "open_calls": server.open_calls,
            "open_streams": server.open_streams,
            "buffered_bytes": server.buffered_bytes,
            "timed_calls": len(server.timed_calls),
            "open_files": open_files,
            "errors": self._errors,
        }


if __name__ == "__main__":
    main()
