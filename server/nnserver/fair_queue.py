"""
Jobs of several connections in, the same jobs out: all at once, or the connections taking turns by rows.

Who takes everything that waits needs no turns, and pays for none: jobs lie in order of arrival until somebody
wants a part of them. Then they are sorted by origin, each once, and start-time fair queueing (Goyal, Vin and
Cheng, 1996) says whose turn it is: the origin that has been served the fewest rows while it waited. What is
served to two origins that both wait differs by no more rows than the largest job of each has.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnserver.batcher import Job


# Origins for which nothing waits, before those that nothing is to be known of any more are forgotten.
_MOST_IDLE = 64


class Share:
    """What waits of one origin."""

    __slots__ = ("is_listed", "jobs", "nbytes", "rows", "tag")

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.rows = 0
        self.nbytes = 0
        # Rows served to it and, while it did not wait, to those that did: the least has the next turn.
        self.tag = 0
        self.is_listed = False


class FairQueue:
    """Jobs that wait. Not thread-safe."""

    def __init__(self) -> None:
        # In order of arrival, not sorted yet: whoever puts a job appends it here.
        self.arrived: deque[Job] = deque()
        # How many are sorted.
        self.sorted = 0
        self._shares: dict[Hashable, Share] = {}
        # A heap of (tag, number, share) with an entry for each share that waits.
        self._turns: list[tuple[int, int, Share]] = []
        self._numbers = itertools.count()
        # The tag of the job that was taken last.
        self._served = 0

    def __len__(self) -> int:
        return len(self.arrived) + self.sorted

    def pop_all(self) -> list[Job]:
        """Remove and return all jobs: in order of arrival, or of turns if there were any."""
        if self.sorted:
            jobs = []
            while (job := self.head()) is not None:
                jobs.append(job)
                self.pop()
            return jobs
        jobs = list(self.arrived)
        self.arrived.clear()
        if self._shares:
            self._forget_turns()
        return jobs

    def head(self) -> Job | None:
        """Return the job whose turn it is; None if there is none."""
        if self.arrived:
            self._sort()
        turns = self._turns
        while turns:
            share = turns[0][2]
            if share.jobs:
                return share.jobs[0]
            share.is_listed = False  # Its jobs were shed.
            heapq.heappop(turns)
        self._forget_turns()
        return None

    def pop(self, is_served: bool = True) -> None:
        """Remove the job that head() has returned; one that is not served costs its origin nothing."""
        tag, _, share = self._turns[0]
        job = share.jobs.popleft()
        self._count(share, job, -1)
        if is_served:
            self._served = tag
            share.tag = tag + job.form.rows
        if share.jobs:
            heapq.heapreplace(self._turns, (share.tag, next(self._numbers), share))
        else:
            share.is_listed = False
            heapq.heappop(self._turns)

    def rows_before(self, origin: Hashable, rows: int) -> tuple[int, int]:
        """Return how many rows of *origin* wait, and how many in all before a new job of *rows* of it."""
        self._sort()
        own = self._share_of(origin).rows
        return own, sum(min(share.rows, own + rows) for share in self._shares.values())

    def shed_for(self, origin: Hashable, amount: int, held: Callable[[Share], int]) -> Job | None:
        """
        Remove and return the newest job of the origin that holds most, to make room for *origin*'s.

        held: what a share holds of that of which there is too much; amount: what *origin* would hold more.
        None if that origin would be left with less than *origin* has then.
        """
        self._sort()
        own = held(self._share_of(origin)) + amount
        share = max(self._shares.values(), key=held)
        if not share.jobs:
            return None
        before = held(share)
        job = share.jobs.pop()
        self._count(share, job, -1)
        if held(share) >= own:
            return job
        assert before >= held(share)
        share.jobs.append(job)
        self._count(share, job, 1)
        return None

    def _sort(self) -> None:
        """Give every job that has arrived to its origin's share."""
        arrived = self.arrived
        while arrived:
            job = arrived.popleft()
            share = self._share_of(job.caller.origin)
            share.jobs.append(job)
            self._count(share, job, 1)
            if not share.is_listed:
                # Not less than the others have got: who comes late has no claim on what went before.
                share.tag = max(share.tag, self._served)
                share.is_listed = True
                heapq.heappush(self._turns, (share.tag, next(self._numbers), share))

    def _share_of(self, origin: Hashable) -> Share:
        share = self._shares.get(origin)
        if share is None:
            if len(self._shares) > max(_MOST_IDLE, 2 * len(self._turns)):
                self._shares = {
                    known: share
                    for known, share in self._shares.items()
                    if share.is_listed or share.tag > self._served
                }
            share = self._shares[origin] = Share()
        return share

    def _count(self, share: Share, job: Job, sign: int) -> None:
        self.sorted += sign
        share.rows += sign * job.form.rows
        share.nbytes += sign * job.form.nbytes

    def _forget_turns(self) -> None:
        """Nothing waits: from here on all are equal, and connections that have gone are let go."""
        if self._shares:
            self._shares.clear()
            self._turns.clear()
            self._served = 0
