"""
Minutes in, a report out: mixed traffic with faults injected, every request accounted for.

    make soak                                       an hour: half of it on each transport
    make soak ARGS="--minutes 20 --transport h2"    twenty minutes of one

Clients ask both services questions of all sizes, unary and on streams, and compare each answer with what
its own rows must give, bit for bit; some of them cancel, or have no time. Meanwhile peers are killed, talk
nonsense and read nothing, and models are replaced, half written, unloaded and loaded. What the server's
process holds is looked at after a warm-up and at the end, when it is idle, and must be the same.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.server import ServerProcess

from soak.clients import LOST_S, Client, Gate
from soak.ledger import Ledger
from soak.nuisances import Nuisance
from soak.questions import MAX_MESSAGE_BYTES, save_models

CLIENTS = 6
# Part of the time in which threads are started, pools filled and forms of requests learned.
WARM_UP = 0.25
# What malloc and the interpreter may keep beyond the level after the warm-up: fragments, which do not add up.
GROWTH_KIB = 24 << 10
# grpcio keeps the threads of its pools: as many as there were calls at once, ever; a leak would be thousands.
GROWTH_THREADS = {"h2": 2, "grpcio": 40}
# A file more: the log's, or one that was just opened when they were counted.
GROWTH_FILES = 1


@dataclass(frozen=True, slots=True)
class Level:
    """What the server's process holds."""

    rss_kib: int
    threads: int
    files: int

    def __str__(self) -> str:
        return f"{self.rss_kib / 1024:.1f} MiB, {self.threads} threads, {self.files} files"


class Soak:
    """One run against a server of its own: starts it, has it asked and harmed, and finds what is wrong."""

    def __init__(self, transport: str, seconds: float, seed: int, folder: Path) -> None:
        self.transport = transport
        self._seconds = seconds
        self._folder = folder
        self.ledger = Ledger()
        save_models(folder)
        flags = ["--transport", transport, "--max-message-bytes", str(MAX_MESSAGE_BYTES)]
        # No bound by time: on a busy machine it would refuse requests whose clients have time.
        flags += ["--model-control", "--reload", "--reload-interval-s", "0.25", "--max-queue-ms", "0"]
        self._log = folder / "log"
        self._server = ServerProcess(str(folder), *flags, log=self._log)
        self._gate = Gate()
        address = self._server.address
        self._clients = [Client(address, folder, self.ledger, self._gate, seed + i) for i in range(CLIENTS)]
        self._seed = seed
        self.warm = self.end = self.peak = Level(0, 0, 0)
        self.harms: dict[str, int] = {}
        self.problems: list[str] = []

    def run(self) -> None:
        """Soak; afterwards *problems* says what is wrong, and the rest of the attributes what was done."""
        for client in self._clients:
            client.start()
        self._go_on(self._seconds * WARM_UP)
        self.warm = self._idle_level(None)
        self._go_on(self._seconds * (1 - WARM_UP))
        self.end = self._idle_level(self.warm)
        for client in self._clients:
            client.stop()
        self._gate.open()
        for client in self._clients:
            client.join(2 * LOST_S)
        status = self._server.stop()
        self.judge(status)

    def close(self) -> None:
        """End the server, if it still runs."""
        self._server.stop()

    def _go_on(self, seconds: float) -> None:
        """Let all clients ask, and do harm, for so long."""
        nuisance = Nuisance(self._server.address, self._folder, self._seed + len(self.harms))
        nuisance.start()
        self._gate.open()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.ledger.wrongs:
            time.sleep(min(1.0, max(end - time.monotonic(), 0)))
            self.peak = max(self.peak, self._level(), key=lambda level: level.rss_kib)
        nuisance.stop()
        self._gate.close()
        for harm, times in nuisance.done.items():
            self.harms[harm] = self.harms.get(harm, 0) + times
        if nuisance.fault is not None:
            self.problems.append(f"a nuisance failed: {nuisance.fault!r}")

    def _level(self) -> Level:
        server = self._server
        return Level(server.status("VmRSS"), server.status("Threads"), server.open_files())

    def _idle_level(self, like: Level | None) -> Level:
        """What is held when nothing is asked: once what was left behind is gone, or after a while."""
        end = time.monotonic() + 30
        level = self._level()
        while time.monotonic() < end:
            time.sleep(0.5)
            before, level = level, self._level()
            is_still = level.files == before.files and level.threads == before.threads
            if is_still and (like is None or level.files <= like.files):
                break
        return level

    def judge(self, status: int) -> None:
        """Find what is wrong, once the server has exited with *status*."""
        self.problems += self.ledger.wrongs
        self.problems += [f"{client.name}: {client.fault!r}" for client in self._clients if client.fault]
        if any(client.is_alive() for client in self._clients):
            self.problems.append("a client waits for ever")
        if self.ledger.lost:
            self.problems.append(f"{self.ledger.lost} requests were lost")
        if status:
            self.problems.append(f"the server exited with status {status}")
        if self.end.rss_kib > self.warm.rss_kib + GROWTH_KIB:
            self.problems.append(f"memory grew from {self.warm} to {self.end}")
        if self.end.threads > self.warm.threads + GROWTH_THREADS[self.transport]:
            self.problems.append(f"threads grew from {self.warm} to {self.end}")
        if self.end.files > self.warm.files + GROWTH_FILES:
            self.problems.append(f"files grew from {self.warm} to {self.end}")
        # The half-written model is to be told of; nothing else is. gRPC's core tells of nonsense as it likes.
        known = re.compile(r"model not loaded|^E\d{4} .* hpack_parser\.cc:")
        unexpected = [
            line for line in self._log.read_text(errors="replace").splitlines() if not known.search(line)
        ]
        if unexpected:
            self.problems.append("the server logged: " + "\n".join(unexpected[:40]))

    def report(self) -> Iterator[str]:
        """Lines for people."""
        ledger = self.ledger
        yield f"{self.transport}: {self._seconds / 60:.1f} minutes, {CLIENTS} clients"
        yield (
            f"  {ledger.made:,} requests: {ledger.answered:,} answered with their own rows' bits "
            f"({ledger.rows:,} rows), {ledger.failed:,} failed with a status, {ledger.lost} lost"
        )
        yield from (f"    {line}" for line in ledger.table())
        yield "  injected: " + ", ".join(
            f"{times} times {harm}" for harm, times in sorted(self.harms.items())
        )
        yield f"  after the warm-up: {self.warm}"
        yield f"  at the end:        {self.end}"
        yield f"  at the peak:       {self.peak.rss_kib / 1024:.1f} MiB"
        yield from (f"  WRONG: {problem}" for problem in self.problems)


def soak(transport: str, seconds: float, seed: int = 0) -> Soak:
    """Run one and return it; *problems* is empty if all was well."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = Soak(transport, seconds, seed, folder)
        stack.callback(run.close)
        run.run()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="in all (default: %(default)s)")
    parser.add_argument(
        "--transport", choices=("h2", "grpcio"), help="this one alone (default: one after the other)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is asked (default: %(default)s)")
    args = parser.parse_args()
    transports = [args.transport] if args.transport else ["h2", "grpcio"]
    problems = 0
    for transport in transports:
        run = soak(transport, args.minutes * 60 / len(transports), args.seed)
        print("\n".join(run.report()), flush=True)
        problems += len(run.problems)
    print("all accounted for" if not problems else f"{problems} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
