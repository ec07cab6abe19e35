"""An Outcome -> text for people and logs, or JSON; and whether the generator was the bottleneck."""

from __future__ import annotations

import math
from typing import Any

from nnclient import __version__
from nnclient.load.generator import Outcome
from nnclient.load.plan import usable_cores
from nnclient.load.traffic import MOST_OUTSTANDING
from nnclient.text_table import format_table

PERCENTILES = (50.0, 90.0, 99.0, 99.9)

# Above this share of its CPU, what is measured is this process rather than the server.
_BUSY = 0.9
# Requests sent later than this, at the 99th percentile, make an open loop a different one.
_LATE_S = 0.002


def bottleneck_of(outcome: Outcome) -> str | None:
    """Return why the numbers are the generator's rather than the server's, or None if they are not."""
    tally, plan = outcome.tally, outcome.plan
    if tally.loop_cpu > _BUSY or tally.cpu > _BUSY * usable_cores():
        return (
            f"the load generator was busy {max(tally.loop_cpu, tally.cpu / plan.processes):.0%} of the time, "
            "so the server may be faster than this; try more --processes, on cores the server does not use"
        )
    lag_s = tally.lag.percentile_s(99)
    if lag_s > _LATE_S:
        return (
            f"1 % of the requests were sent {lag_s * 1e3:.1f} ms or more after they were due, and latency "
            "counts from then: the generator is short of CPU (try more --processes), "
            f"or {MOST_OUTSTANDING:,} requests were unanswered"
        )
    return None


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return the report as what json.dump takes; units end the names. NaN becomes None."""
    plan, tally, seconds = outcome.plan, outcome.tally, outcome.plan.duration_s
    milliseconds = {f"p{percent:g}": tally.latency.percentile_s(percent) * 1e3 for percent in PERCENTILES}
    milliseconds |= {"max": tally.latency.percentile_s(100) * 1e3, "mean": tally.latency.mean_s() * 1e3}
    return {
        "nnclient": __version__,
        "target": plan.target,
        "model": plan.model,
        "model_version": outcome.model.version,
        "output": plan.output,
        "mode": plan.mode,
        "loop": "closed" if plan.rate_per_s is None else "open",
        "concurrency": plan.concurrency if plan.rate_per_s is None else None,
        "rate_per_s": plan.rate_per_s,
        "rows_per_request": plan.rows,
        "processes": plan.processes,
        "warmup_s": plan.warmup_s,
        "measured_s": seconds,
        "requests_per_s": tally.answered / seconds,
        "rows_per_s": tally.answered * plan.rows / seconds,
        "answered": tally.answered,
        "latency_ms": {name: None if math.isnan(value) else value for name, value in milliseconds.items()},
        "errors": dict(tally.errors.most_common()),
        "error_examples": tally.examples,
        "generator": {
            "loop_cpu": tally.loop_cpu,
            "cpu": tally.cpu,
            "lag_p99_ms": tally.lag.percentile_s(99) * 1e3 if tally.lag.count else None,
            "bottleneck": bottleneck_of(outcome),
        },
    }


def as_text(outcome: Outcome) -> str:
    """Return the report for reading: no colours, no boxes, at home in a log."""
    plan, tally, seconds = outcome.plan, outcome.tally, outcome.plan.duration_s
    loop = (
        f"closed loop, {plan.concurrency} in flight"
        if plan.rate_per_s is None
        else f"open loop, {plan.rate_per_s:,.6g} requests/s due"
    )
    rows = "1 row" if plan.rows == 1 else f"{plan.rows:,} rows"
    what = f"{plan.mode}, {rows} a request, {plan.output}"
    summary = [
        ["model", f"{plan.model} ({outcome.model.architecture}) at {plan.target}"],
        ["traffic", f"{what}; {loop}"],
        ["measured", f"{seconds:g} s after {plan.warmup_s:g} s of warm-up"],
        ["requests/s", f"{tally.answered / seconds:,.0f}"],
        ["rows/s", f"{tally.answered * plan.rows / seconds:,.0f}"],
        ["errors", _errors(outcome)],
        ["generator", _generator(outcome)],
    ]
    names = [*(f"p{percent:g}" for percent in PERCENTILES), "max"]
    values = [
        *(tally.latency.percentile_s(percent) for percent in PERCENTILES),
        tally.latency.percentile_s(100),
    ]
    latency = format_table(
        ["latency", *names],
        [["ms", *(f"{value * 1e3:.3f}" for value in values)]],
        right=range(1, len(names) + 1),
    )
    width = max(len(name) for name, _ in summary)
    lines = [f"{name:<{width}}  {text}" for name, text in summary]
    lines[5:5] = ["", latency, ""]
    lines += [f"  {status}: {text}" for status, text in tally.examples.items()]
    warning = bottleneck_of(outcome)
    if warning:
        lines += ["", f"warning: {warning}"]
    return "\n".join(lines)


def _errors(outcome: Outcome) -> str:
    errors = outcome.tally.errors
    return ", ".join(f"{count:,} {status}" for status, count in errors.most_common()) or "none"


def _generator(outcome: Outcome) -> str:
    plan, tally = outcome.plan, outcome.tally
    processes = "1 process" if plan.processes == 1 else f"{plan.processes} processes"
    text = f"{processes}, CPU {tally.cpu / plan.processes:.0%}"
    if plan.rate_per_s:
        text += f"; requests sent {tally.lag.percentile_s(99) * 1e3:.2f} ms late at p99"
    return text
