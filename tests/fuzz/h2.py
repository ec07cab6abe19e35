"""
Seeds in, a verdict out: mutated conversations against the h2 transport, in memory.

    make fuzz-h2                                    1,000,000 inputs, a process a core
    make fuzz-h2 ARGS="--inputs 5000 --seed 7"      the inputs of seeds 7 to 5006
    make fuzz-h2 ARGS="--replay FILE"               one that was saved

Input n is the same wherever and whenever it is made. What must hold of each: see trial.py.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from fuzz.conversations import recorded
from fuzz.mutations import Input, Mutator
from fuzz.trial import Failure, Trial, describe

# Looks for objects left alive, and at memory, every so many inputs.
LOOK_EVERY = 2000
WARM_UP_INPUTS = 10_000
# What the allocator may keep of the largest inputs; a leak of 100 bytes an input passes it in 300,000.
GROWTH_LIMIT_KIB = 32 << 10
# A worker that stays at one input for so long hangs.
HANG_S = 120.0


class Fuzzer:
    """Runs inputs in this process."""

    def __init__(self) -> None:
        conversations = recorded()
        self._mutator = Mutator(conversations)
        self._roomy, self._tight = Trial(conversations), Trial(conversations, is_tight=True)

    def close(self) -> None:
        self._tight.close()
        self._roomy.close()

    def input(self, seed: int) -> Input:
        return self._mutator.input(seed)

    def run(self, tried: Input) -> None:
        """Try both servers; raises what went wrong."""
        for trial in (self._roomy, self._tight):
            trial.run(tried)

    def check_nothing_is_left(self) -> None:
        self._roomy.check_nothing_is_left()


def run_seeds(first: int, inputs: int, note: memoryview | None, save: Path) -> str | None:
    """Run the inputs of seeds *first* onwards; return what failed, if any did."""
    fuzzer = Fuzzer()
    seed, tried, level = first, None, 0
    try:
        for seed in range(first, first + inputs):
            if note is not None:
                note[:8] = seed.to_bytes(8, "little")
            tried = fuzzer.input(seed)
            fuzzer.run(tried)
            if (seed - first + 1) % LOOK_EVERY == 0:
                fuzzer.check_nothing_is_left()
                if seed - first + 1 == WARM_UP_INPUTS:
                    level = _rss_kib()
                elif level and _rss_kib() > level + GROWTH_LIMIT_KIB:
                    raise Failure(
                        f"memory grew from {level} to {_rss_kib()} KiB since {WARM_UP_INPUTS} inputs"
                    )
    except Exception as error:
        what = str(error) if isinstance(error, Failure) else traceback.format_exc()
        return report(seed, tried, what, save)
    finally:
        fuzzer.close()
    return None


def report(seed: int, tried: Input | None, what: str, save: Path) -> str:
    """Save *tried* and return what to print."""
    command = f"make fuzz-h2 ARGS='--inputs 1 --seed {seed}'"
    lines = [f"seed {seed} failed: {what}", f"again: {command}"]
    if tried is not None:
        save.mkdir(parents=True, exist_ok=True)
        file = save / f"seed-{seed}.txt"
        file.write_text(repr((tried.name, tried.steps, tried.is_whole)) + "\n")
        lines += [f"saved: {file}; again: make fuzz-h2 ARGS='--replay {shlex.quote(str(file))}'"]
        lines += describe(tried)
    return "\n".join(lines)


def replay(file: Path) -> None:
    """Run a saved input; raises what went wrong."""
    name, steps, is_whole = ast.literal_eval(file.read_text())
    fuzzer = Fuzzer()
    try:
        fuzzer.run(Input(name, steps, is_whole))
        fuzzer.check_nothing_is_left()
    finally:
        fuzzer.close()


class Worker:
    """A process with seeds of its own, so that a crash in C costs a message and not the run."""

    def __init__(self, first: int, inputs: int, folder: Path, save: Path) -> None:
        self._note = folder / f"{first}.seed"
        self._note.write_bytes(bytes(8))
        self._output = (folder / f"{first}.out").open("w+")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "fuzz.h2", "--inputs", str(inputs), "--seed", str(first)),
                *("--save", str(save), "--note", str(self._note)),
            ],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            # Pytest finds this package without the environment; a process of its own does not.
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        self.first = first
        self._save = save
        self._last = (-1, time.monotonic())

    @property
    def seed(self) -> int:
        """The seed of the input that it is at, or was at last."""
        return int.from_bytes(self._note.read_bytes(), "little")

    def is_running(self) -> bool:
        if self._process.poll() is not None:
            return False
        seed, now = self.seed, time.monotonic()
        if seed != self._last[0]:
            self._last = (seed, now)
        elif now > self._last[1] + HANG_S:
            self._process.kill()
            self._process.wait()
        return True

    def verdict(self) -> str | None:
        """What failed, once it has ended."""
        self._output.seek(0)
        said = self._output.read()
        if self._process.returncode == 0:
            return None
        if self._process.returncode == 1 and said:
            return said
        return report(
            self.seed,
            None,
            f"the process ended with {self._process.returncode} (a crash or a hang)\n{said}",
            self._save,
        )

    def stop(self) -> None:
        """End it, if it still runs."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.stop()
        self._output.close()


def _run_workers(first: int, inputs: int, jobs: int, save: Path) -> str | None:
    share = -(-inputs // jobs)
    starts = range(first, first + inputs, share)
    with tempfile.TemporaryDirectory() as name:
        workers = [Worker(at, min(share, first + inputs - at), Path(name), save) for at in starts]
        try:
            running = list(workers)
            shown = time.monotonic()
            while running:
                time.sleep(0.2)
                for worker in list(running):
                    if not worker.is_running():
                        running.remove(worker)
                        found = worker.verdict()
                        if found is not None:
                            return found
                if time.monotonic() > shown + 30:
                    shown = time.monotonic()
                    done = sum(max(worker.seed - worker.first, 0) for worker in workers)
                    print(f"{done:,} inputs", flush=True)
        finally:
            for worker in workers:
                worker.close()
    return None


def _rss_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz-h2", description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: a core)")
    parser.add_argument("--save", type=Path, default=Path("build/fuzz"), help="where failing inputs go")
    parser.add_argument("--replay", type=Path, help="run the input that was saved in this file")
    parser.add_argument("--note", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay:
        replay(args.replay)
        print("it holds")
        return 0
    started = time.monotonic()
    if args.note or args.inputs == 1:
        import mmap

        note = None
        if args.note:
            with args.note.open("r+b") as file:
                note = memoryview(mmap.mmap(file.fileno(), 8))
        gc.freeze()
        found = run_seeds(args.seed, args.inputs, note, args.save)
    else:
        found = _run_workers(args.seed, args.inputs, args.jobs, args.save)
    if found:
        print(found)
        return 1
    if not args.note:
        took_s = time.monotonic() - started
        last = args.seed + args.inputs - 1
        print(f"{args.inputs:,} inputs, seeds {args.seed} to {last}: no crash, hang, leak or broken rule")
        print(f"{took_s:.0f} s, {args.inputs / took_s:,.0f} a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
