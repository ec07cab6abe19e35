"""ModelHistory: what was counted is never forgotten, and holds no model in memory."""

import gc
import threading
import weakref

import numpy as np
import pytest
from support.jobs import job_of

from nncore import Layer, Mlp
from nnserver.batcher import Batcher
from nnserver.engine import Engine, Lane
from nnserver.errors import Status
from nnserver.metrics.model_history import ModelHistory
from nnserver.repository import Repository
from nnserver.served_model import ServedModel
from nnserver.statistics import ModelStatistics

OK = ("predict", Status.OK)


def loaded(name="iris", version="1"):
    mlp = Mlp([Layer(np.eye(1, dtype=np.float32))])
    batcher = Batcher(name, statistics=ModelStatistics(is_detailed=True))
    return ServedModel(name, version, mlp, Lane(batcher, lambda x: x.copy(), 1, mlp.dtype))


@pytest.fixture
def engine():
    engine = Engine(threads=1)
    yield engine
    engine.close()


def run(engine, model, requests=1):
    for _ in range(requests):
        engine.submit(model.lane, job_of(1))
    engine.run_waiting()


def answered(history, key=("iris", "1")):
    return history.details()[key].outcomes.get(OK, 0)


def test_a_reload_goes_on_counting(engine):
    repository = Repository()
    history = ModelHistory(repository)
    for expected in range(1, 5):
        repository.put([loaded()])
        run(engine, repository.get("iris"))
        assert answered(history) == expected
    details = history.details()["iris", "1"]
    assert (sum(details.queue.counts), sum(details.compute.counts)) == (4, 4)
    assert (details.batch_rows.sum, sum(details.batch_rows.counts)) == (4, 4)


def test_an_unload_takes_nothing_away(engine):
    """Nor does its model stay in memory: only its numbers do."""
    repository = Repository([loaded()])
    history = ModelHistory(repository)
    run(engine, repository.get("iris"), requests=3)
    gone = weakref.ref(repository.get("iris"))
    gc.disable()
    try:
        repository.remove("iris")
        assert gone() is None
    finally:
        gc.enable()
    assert answered(history) == 3
    assert history.batchers() == {}


def test_what_is_finished_after_an_unload_is_counted(engine):
    """A request that was queued before: its model is followed until it is answered."""
    repository = Repository([loaded()])
    history = ModelHistory(repository)
    model = repository.get("iris")
    engine.submit(model.lane, job_of(1))
    repository.remove("iris")
    assert [batcher.in_flight() for batcher in history.batchers()["iris", "1"]] == [1]
    engine.run_waiting()
    del model
    assert answered(history) == 1


def test_versions_are_apart_and_a_kept_version_is_counted_once(engine):
    first, second = loaded(version="1"), loaded(version="2")
    repository = Repository([first])
    history = ModelHistory(repository)
    run(engine, first)
    repository.put([first, second])
    run(engine, first)
    run(engine, second)
    assert answered(history, ("iris", "1")) == 2
    assert answered(history, ("iris", "2")) == 1


def test_counts_never_go_down_while_models_come_and_go(engine):
    """A thread reads without pause; every count it sees is at least the one before, and the last is all."""
    repository = Repository([loaded()])
    history = ModelHistory(repository)
    is_over = threading.Event()
    seen = []

    def read():
        while not is_over.is_set():
            seen.append(answered(history))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(300):
            run(engine, repository.get("iris"))
            if i % 3 == 2:
                repository.remove("iris")
            repository.put([loaded()])
    finally:
        is_over.set()
        reader.join()
    assert seen == sorted(seen)
    assert answered(history) == 300
