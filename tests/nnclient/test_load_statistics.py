"""Histogram, arrivals, plan and tally: the load test's numbers are what they say."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnclient import InvalidInput
from nnclient.load.arrivals import poisson_arrivals
from nnclient.load.histogram import Histogram
from nnclient.load.plan import LoadPlan, default_processes
from nnclient.load.tally import Tally, Window

DURATIONS = st.lists(st.floats(1e-6, 900), min_size=1, max_size=300)
PERCENTS = st.one_of(st.sampled_from([50.0, 90.0, 99.0, 99.9, 100.0]), st.floats(0.01, 100))


def histogram_of(durations: list[float]) -> Histogram:
    histogram = Histogram()
    for duration in durations:
        histogram.record(duration)
    return histogram


@settings(deadline=None, max_examples=150)
@given(durations=DURATIONS, percent=PERCENTS)
def test_percentiles_are_within_one_percent(durations: list[float], percent: float) -> None:
    """Of the exact one: the least duration that at least so many do not exceed."""
    exact = np.percentile(durations, percent, method="inverted_cdf")
    assert histogram_of(durations).percentile_s(percent) == pytest.approx(exact, rel=0.01)


@settings(deadline=None, max_examples=50)
@given(parts=st.lists(DURATIONS, min_size=1, max_size=4))
def test_adding_is_recording_together(parts: list[list[float]]) -> None:
    """Processes count apart and are reported as one."""
    total = Histogram()
    for part in parts:
        total.add(histogram_of(part))
    together = histogram_of(list(itertools.chain(*parts)))
    assert (total.counts, total.count, total.max_s) == (together.counts, together.count, together.max_s)
    assert total.mean_s() == pytest.approx(together.mean_s())


def test_the_maximum_is_exact_and_the_extremes_are_kept() -> None:
    """No percentile exceeds the maximum; durations out of range are counted at the ends."""
    histogram = histogram_of([0.123456789, 0.1])
    assert histogram.percentile_s(100) == 0.123456789
    assert histogram.percentile_s(99.999) <= 0.123456789
    extremes = histogram_of([0.0, -1e-9, 1e-12, 1e9])
    assert extremes.count == 4
    assert extremes.percentile_s(50) <= 1e-6
    assert extremes.percentile_s(100) == 1e9


def test_99_9_percent_of_a_thousand_is_the_999th() -> None:
    """Not the 1000th, by a rounding error of 99.9 / 100 * 1000."""
    histogram = histogram_of([1.0] * 999 + [100.0])
    assert histogram.percentile_s(99.9) == pytest.approx(1.0, rel=0.01)


def test_of_nothing_there_are_no_percentiles() -> None:
    """NaN, and no division by zero."""
    assert math.isnan(Histogram().percentile_s(50))
    assert math.isnan(Histogram().mean_s())


def test_arrivals_are_poisson() -> None:
    """Gaps of mean 1 / rate that are exponential, by their mean, deviation and median."""
    times = np.array(list(itertools.islice(poisson_arrivals(50.0, start=7.0, seed=1), 20_000)))
    gaps = np.diff(times, prepend=7.0)
    # Standard error of the mean of 20,000 exponential gaps: 0.7 %.
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)
    assert np.median(gaps) == pytest.approx(math.log(2) / 50, rel=0.04)
    assert (gaps > 0).all()


def test_arrivals_repeat_by_seed() -> None:
    """The same seed sends at the same times; another does not."""

    def first(seed: int) -> list[float]:
        return list(itertools.islice(poisson_arrivals(1.0, 0.0, seed), 5))

    assert first(1) == first(1)
    assert first(1) != first(2)


PLAN: dict[str, Any] = {"target": "h:1", "model": "m"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"rows": 0},
        {"processes": 0},
        {"duration_s": 0.0},
        {"timeout_s": math.nan},
        {"warmup_s": -1.0},
        {"rate_per_s": 0.0},
        {"rate_per_s": math.nan},
        {"concurrency": 2, "processes": 3},
    ],
)
def test_plans_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    """With the setting's name."""
    with pytest.raises(InvalidInput, match=next(iter(wrong)).removesuffix("_per_s")):
        LoadPlan(**PLAN, **wrong)


@settings(deadline=None, max_examples=50)
@given(concurrency=st.integers(1, 100), processes=st.integers(1, 16))
def test_shares_add_up(concurrency: int, processes: int) -> None:
    """Every request in flight and every request a second belongs to one process."""
    processes = min(processes, concurrency)
    closed = LoadPlan(**PLAN, concurrency=concurrency, processes=processes)
    shares = [closed.share(worker) for worker in range(processes)]
    assert sum(share.concurrency for share in shares) == concurrency
    assert len({share.seed for share in shares}) == processes
    opened = LoadPlan(**PLAN, rate_per_s=1000.0, processes=processes)
    assert sum(opened.share(worker).rate_per_s or 0 for worker in range(processes)) == pytest.approx(1000)
    assert pickle.loads(pickle.dumps(shares[0])) == shares[0]


def test_processes_by_default_leave_half_of_the_cores_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one, at most eight, and never more than are in flight."""
    for cores, expected in ((1, 1), (2, 1), (8, 4), (64, 8)):
        monkeypatch.setattr("nnclient.load.plan.usable_cores", lambda cores=cores: cores)
        assert default_processes(32, None) == expected
    assert default_processes(3, None) == 3
    assert default_processes(3, 1000.0) == 8


def test_what_counts_is_the_window() -> None:
    """Latency and errors by when a request was due, throughput by when the answer came."""
    window, tally = Window(0.0, 10.0, 20.0), Tally()
    tally.note_answer(window, due=9.0, now=11.0)  # due in the warm-up, answered in the window
    tally.note_answer(window, due=12.0, now=12.5)
    tally.note_answer(window, due=19.0, now=25.0)  # due in the window, answered after it
    tally.note_answer(window, due=20.0, now=20.1)
    assert tally.answered == 2
    assert tally.latency.count == 2
    assert tally.latency.max_s == 6.0
    tally.note_error(window, 5.0, "UNAVAILABLE", "starting")
    tally.note_error(window, 15.0, "UNAVAILABLE", "gone")
    tally.note_lag(window, 5.0, 6.0)
    tally.note_lag(window, 15.0, 15.25)
    assert tally.errors == {"UNAVAILABLE": 1}
    assert tally.examples == {"UNAVAILABLE": "starting"}
    assert (tally.lag.count, tally.lag.max_s) == (1, 0.25)


def test_tallies_add_up() -> None:
    """Counts and CPU are summed; of the event loops, the busiest counts."""
    one, other = Tally(answered=3, loop_cpu=0.5, cpu=0.6), Tally(answered=4, loop_cpu=0.9, cpu=1.0)
    one.errors["UNAVAILABLE"] = 1
    other.errors.update({"UNAVAILABLE": 2, "INTERNAL": 1})
    other.examples["INTERNAL"] = "oh"
    one.add(other)
    assert (one.answered, one.errors, one.examples) == (
        7,
        {"UNAVAILABLE": 3, "INTERNAL": 1},
        {"INTERNAL": "oh"},
    )
    assert (one.loop_cpu, one.cpu) == (0.9, 1.6)
