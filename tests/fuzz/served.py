"""A limit in, the methods of the real services out, over a small model: what a client of theirs may break."""

from __future__ import annotations

from support.serving import echoed

from nnserver.api.health import HealthApi
from nnserver.api.inference import InferenceApi, InferenceLimits
from nnserver.api.oip import OipApi
from nnserver.batcher import QueueLimits
from nnserver.call import Methods
from nnserver.catalog import Catalog
from nnserver.engine import Engine
from nnserver.repository import Repository

# They are answered by threads of their own.
_IN_THREADS = ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")


class Served:
    """nnproto.v1, the Open Inference Protocol and health, over the model "iris" of 3 inputs and outputs."""

    def __init__(self, max_message_bytes: int) -> None:
        model = echoed(3)
        # A kernel that takes no time: every batch is as large as it can be, and runs in the caller.
        model.lane.batcher.clock = lambda: 0.0
        repository = Repository([model])
        engine = Engine(threads=1)
        limits = InferenceLimits(max_message_bytes, 4)
        health = HealthApi(lambda name: name in ("", "iris"))
        catalog = Catalog((), QueueLimits(), repository)
        oip = OipApi(repository, engine, limits, catalog, is_ready=lambda: True).methods()
        self.after_messages = engine.run_waiting
        self.methods: Methods = {
            **InferenceApi(repository, engine, limits).methods(),
            **{path: method for path, method in oip.items() if not path.endswith(_IN_THREADS)},
            **health.methods(),
        }
