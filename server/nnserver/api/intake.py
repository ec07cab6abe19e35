"""Requests in, their jobs queued lane by lane out: what the api cannot read is refused, each for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nnserver.batcher import Caller, Job
from nnserver.engine import Engine, Lane
from nnserver.request_watch import RequestWatch


def queue_all(
    engine: Engine,
    watch: RequestWatch | None,
    kind: str,
    requests: Sequence[tuple[Caller, bytes]],
    job_of: Callable[[bytes, Caller, str], tuple[Lane, Job]],
) -> None:
    """
    Queue the rows of all *requests*, those for one lane at once; tell who waits what is wrong.

    job_of: returns what is to be done for a message of *kind*, and where; raises what is wrong with it.
    InferenceApi.predict_all is this loop without a call for each request: it is on the hottest way.
    """
    jobs: dict[Lane, list[Job]] = {}
    began = watch.clock() if watch else 0.0
    for caller, message in requests:
        try:
            lane, job = job_of(message, caller, kind)
        except Exception as error:
            if watch:
                watch.refused(kind, caller, error, began)
            caller.fail(error)
        else:
            jobs.setdefault(lane, []).append(job)
    if watch:
        watch.decoded(jobs, began, len(requests))
    for lane, together in jobs.items():
        engine.submit_all(lane, together)
