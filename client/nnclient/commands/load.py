"""`nnclient load` -> a server under load, measured; the report as text and JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nnclient.answer_files import replaced_when_whole
from nnclient.interrupt import cleaned_up_on_interrupt
from nnclient.load.generator import generate_load
from nnclient.load.plan import LoadPlan, default_processes
from nnclient.load.report import as_json, as_text
from nnclient.tls import tls_files_of
from nnclient.tokens import token_of


def run(args: argparse.Namespace) -> int:
    """Carry out the plan of *args*; return 1 if an answer was wrong or there was none."""
    plan = LoadPlan(
        target=args.target,
        tls=tls_files_of(args),
        token=token_of(args),
        allow_insecure_token=args.allow_insecure_token,
        model=args.model,
        version=args.model_version,
        output=args.output,
        top_k=args.top_k,
        mode=args.mode,
        concurrency=args.concurrency,
        rate_per_s=args.rate,
        rows=args.rows,
        warmup_s=args.warmup_s,
        duration_s=args.duration_s,
        timeout_s=args.timeout_s,
        processes=args.processes or default_processes(args.concurrency, args.rate),
        data=args.data,
    )
    with _bar(plan.warmup_s, plan.duration_s) as progress:
        outcome = generate_load(plan, progress)
    if args.json == "-":
        print(json.dumps(as_json(outcome), indent=2))
    else:
        print(as_text(outcome))
    if args.json not in (None, "-"):
        with replaced_when_whole(Path(args.json), "w") as stream:
            json.dump(as_json(outcome), stream, indent=2)
            stream.write("\n")
    is_right = outcome.tally.answered and not outcome.tally.errors["WRONG_ANSWER"]
    return 0 if is_right else 1


@contextlib.contextmanager
def _bar(warmup_s: float, duration_s: float) -> Iterator[Callable[[float, int], None]]:
    """Give what to call with the seconds gone and the answers so far; a bar if someone is looking."""
    if not sys.stderr.isatty():
        yield lambda seconds, answered: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    whole_s = warmup_s + duration_s
    bar = Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:g} s"),
        TextColumn("{task.fields[rate]}"),
        console=Console(stderr=True),
        transient=True,
    )
    with cleaned_up_on_interrupt(bar.stop), bar:
        task = bar.add_task("warm-up", total=whole_s, rate="")

        def show(seconds: float, answered: int) -> None:
            measured_s = min(seconds, whole_s) - warmup_s
            bar.update(
                task,
                description="warm-up" if measured_s < 0 else "measuring",
                completed=max(0.0, min(seconds, whole_s)),
                # The first reports come before there is much to divide by.
                rate=f"{answered / measured_s:,.0f} requests/s" if measured_s > 0.4 else "",
            )

        yield show
