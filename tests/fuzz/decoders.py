"""
Messages in, a verdict out: the decoders of both services, in this process, guided by coverage.

    make fuzz-decoders                                    10,000,000 inputs, a process a core
    make fuzz-decoders ARGS="--inputs 50000 --seed 7"     fewer, in another order
    make fuzz-decoders ARGS="--replay FILE"               one that was saved
    make fuzz-decoders ARGS="--merge"                     the corpus anew, from what was found

libFuzzer, by way of atheris, keeps inputs that reach branches of `nnserver.api` which none did before, and
changes those further: by our mutations, which know protobuf's format (decoder_inputs.py), and by its own.
What must hold of each input: see decoder_trial.py. What was worth keeping is in corpus.txt, an input a line;
`make test` runs it, and mutations of it, without atheris.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuzz.decoder_trial import Trial

Tracer = Callable[[FrameType, str, Any], Any]

CORPUS = Path(__file__).parent / "corpus.txt"
# Looks for objects left alive, and at memory, every so many inputs; first when forms and caches are full.
LOOK_EVERY = 5000
WARM_UP_INPUTS = 100_000
# Templates of requests fill up slowly; a leak of 100 bytes an input passes it in a million.
GROWTH_LIMIT_KIB = 96 << 10
# Objects of one type that may come to be: as many templates as are kept.
GROWTH_LIMIT_OBJECTS = 40_000
# libFuzzer ends an input that takes as long.
HANG_S = 30


def corpus() -> list[bytes]:
    """Inputs that each reach something which no other does."""
    return [bytes.fromhex(line) for line in CORPUS.read_text().split()]


class LeakCheck:
    """Looks at this process's memory and objects every now and then; raises Failure if they grow."""

    def __init__(self) -> None:
        self._inputs = 0
        self._level_kib = 0
        self._objects: Counter[str] = Counter()

    def note_input(self) -> None:
        self._inputs += 1
        if self._inputs % LOOK_EVERY or self._inputs < WARM_UP_INPUTS:
            return
        if not self._level_kib:
            self._level_kib, self._objects = rss_kib(), _live_objects()
        elif rss_kib() > self._level_kib + GROWTH_LIMIT_KIB:
            self._fail(f"memory grew from {self._level_kib} to {rss_kib()} KiB since {WARM_UP_INPUTS} inputs")
        elif self._inputs % (20 * LOOK_EVERY) == 0:
            grown = {
                name: n for name, n in (_live_objects() - self._objects).items() if n > GROWTH_LIMIT_OBJECTS
            }
            if grown:
                self._fail(f"objects stayed alive: {grown}")

    def _fail(self, what: str) -> None:
        from fuzz.decoder_trial import Failure

        raise Failure(what)


def rss_kib() -> int:
    """The memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def _live_objects() -> Counter[str]:
    gc.collect()
    return Counter(type(found).__name__ for found in gc.get_objects())


def run_guided(inputs: int, seed: int, note: Path, folders: list[str], save: Path) -> None:
    """Run libFuzzer in this process, which it ends."""
    import atheris  # It is in an environment of its own: see the Makefile.

    # What is imported here reports which branches it takes.
    with atheris.instrument_imports(include=["nnserver.api", "nnserver.repository"]):
        from fuzz.decoder_inputs import MOST_BYTES, Mutator
        from fuzz.decoder_trial import WAYS, Trial, seeds
    trial, leaks, mutator = Trial(), LeakCheck(), Mutator([*seeds(), *corpus()], WAYS)
    with note.open("r+b") as file:
        count = mmap.mmap(file.fileno(), 8)
    done = 0

    def run(data: bytes) -> None:
        nonlocal done
        trial.run(data)
        leaks.note_input()
        done += 1
        if not done % 100:
            count[:] = done.to_bytes(8, "little")

    def mutate(data: bytes, most_bytes: int, seed: int) -> bytes:
        changed = mutator.mutated(data, seed) if seed % 4 else atheris.Mutate(data, len(data) + 16)
        return changed[:most_bytes]

    options = {
        **{"runs": inputs, "seed": seed + 1, "max_len": MOST_BYTES + 1, "timeout": HANG_S},
        **{"rss_limit_mb": 2048, "artifact_prefix": f"{save}/", "print_final_stats": 1, "verbosity": 1},
    }
    atheris.Setup(
        [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), *folders],
        run,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def run_blind(trial: Trial, inputs: int, seed: int) -> str | None:
    """Run the corpus and *inputs* mutations of it, without coverage; return what failed, if any did."""
    from fuzz.decoder_inputs import Mutator
    from fuzz.decoder_trial import WAYS, seeds

    known = [*seeds(), *corpus()]
    mutator = Mutator(known, WAYS)
    for index in range(len(known) + inputs):
        tried = known[index] if index < len(known) else mutator.input(seed + index - len(known))
        try:
            trial.run(tried)
        except Exception as error:
            return f"input {tried.hex()} failed: {type(error).__name__}: {error}"
    return None


class Worker:
    """A process of libFuzzer's, so that a crash in C costs a message and not the run."""

    def __init__(self, index: int, inputs: int, seed: int, folder: Path, save: Path) -> None:
        self._note = folder / f"{index}.count"
        self._note.write_bytes(bytes(8))
        self._log = (folder / f"{index}.log").open("w+")
        arguments = [
            "--inputs",
            str(inputs),
            "--seed",
            str(seed),
            "--save",
            str(save),
            "--note",
            str(self._note),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.decoders", *arguments],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )

    @property
    def done(self) -> int:
        return int.from_bytes(self._note.read_bytes(), "little")

    def said(self, characters: int = 4000) -> str:
        self._log.seek(0)
        return self._log.read()[-characters:]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


def _run_workers(inputs: int, seed: int, jobs: int, save: Path) -> int:
    started = shown = time.monotonic()
    share = -(-inputs // jobs)
    with tempfile.TemporaryDirectory() as name:
        workers = [Worker(i, share, seed + i, Path(name), save) for i in range(jobs)]
        try:
            while any(worker.process.poll() is None for worker in workers):
                time.sleep(0.2)
                if any(worker.process.poll() for worker in workers):
                    break
                if time.monotonic() > shown + 30:
                    shown = time.monotonic()
                    print(f"{sum(worker.done for worker in workers):,} inputs", flush=True)
            done = sum(worker.done for worker in workers)
            failed = [worker for worker in workers if worker.process.poll()]
            for worker in failed:
                print(worker.said())
            if failed:
                print(f"an input failed after {done:,}, and is in {save}; again: --replay FILE")
                return 1
            covered = workers[0].said().rpartition(" cov: ")[2].split()[0]
        finally:
            for worker in workers:
                worker.close()
    took_s = time.monotonic() - started
    print(f"{done:,} inputs, {covered} branches of nnserver.api reached: no crash, hang, leak or broken rule")
    print(f"{took_s:.0f} s, {done / took_s:,.0f} a second")
    return 0


def merge(found: Path) -> int:
    """Write the corpus anew: of it and of what is in *found*, short ones first, what reaches anything new."""
    from fuzz.decoder_trial import Trial

    trial, reached, lines = Trial(), set[Arc](), []
    for data in sorted(
        {*corpus(), *(file.read_bytes() for file in found.iterdir())}, key=lambda data: (len(data), data)
    ):
        arcs = arcs_of(partial(trial.run, data))
        if not arcs <= reached:
            reached |= arcs
            lines.append(data.hex())
    trial.close()
    CORPUS.write_text("".join(f"{line}\n" for line in lines))
    return len(lines)


# A file, and two of its lines that were run one after the other.
Arc = tuple[str, int, int]


def arcs_of(call: Callable[[], None]) -> set[Arc]:
    """The steps from line to line that *call* takes in `nnserver.api`."""
    arcs: set[Arc] = set()

    def of_frame(frame: FrameType, event: str, _: object) -> Tracer | None:
        file = frame.f_code.co_filename
        if "/nnserver/api/" not in file:
            return None
        last = frame.f_lineno

        def of_line(frame: FrameType, event: str, _: object) -> Tracer:
            nonlocal last
            arcs.add((file, last, frame.f_lineno))
            last = frame.f_lineno
            return of_line

        return of_line

    sys.settrace(of_frame)
    try:
        call()
    finally:
        sys.settrace(None)
    return arcs


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz-decoders", description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first process (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: a core)")
    parser.add_argument(
        "--save", type=Path, default=Path("build/fuzz-decoders"), help="where inputs are kept"
    )
    parser.add_argument("--replay", type=Path, help="run the input that was saved in this file")
    parser.add_argument("--merge", action="store_true", help="write the corpus anew, from what was found")
    parser.add_argument("--note", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    found = args.save / "found"
    found.mkdir(parents=True, exist_ok=True)
    if args.note:
        run_guided(args.inputs, args.seed, args.note, [str(found)], args.save)
    elif args.merge:
        print(f"{merge(found)} inputs in {CORPUS}")
    elif args.replay:
        from fuzz.decoder_trial import Trial

        Trial().run(args.replay.read_bytes())
        print("it holds")
    else:
        return _run_workers(args.inputs, args.seed, args.jobs, args.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
