"""inference.GRPCInferenceService: the methods of Open Inference Protocol v2 and of Triton's extensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

from nnproto.oip import inference_pb2 as pb
from nnserver import __version__
from nnserver.api.inference import InferenceLimits, decode
from nnserver.api.oip_control import OipControl
from nnserver.api.oip_infer import OipInference
from nnserver.api.oip_models import model_config, model_metadata, model_statistics
from nnserver.call import Call, Method, UnaryListener, unary
from nnserver.catalog import Catalog
from nnserver.engine import Engine
from nnserver.errors import NotFound
from nnserver.repository import Repository
from nnserver.request_watch import RequestWatch

SERVICE = "inference.GRPCInferenceService"

# For reflection: the service's types are in no other pool.
POOL = pb.DESCRIPTOR.pool

# Those of Triton's that are all here; "sequence", "trace", "logging" and shared memory are not.
EXTENSIONS = (
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)

Request = TypeVar("Request", bound=Message)


class OipApi:
    """
    The service over the models of *repository*, run by *engine*; *catalog* is where they come from.

    is_ready: whether the server takes requests.  may_change: whether clients load and unload models.
    watch: who wants to hear of requests, if anybody does.
    """

    def __init__(
        self,
        repository: Repository,
        engine: Engine,
        limits: InferenceLimits,
        catalog: Catalog,
        is_ready: Callable[[], bool],
        may_change: bool = False,
        watch: RequestWatch | None = None,
    ) -> None:
        self._repository = repository
        self._is_ready = is_ready
        self._inference = OipInference(repository, engine, limits, watch=watch)
        self._control = OipControl(catalog, may_change)

    def methods(self) -> dict[str, Method]:
        """Return the service's methods by path."""
        all_methods = (
            self._unary("ServerLive", pb.ServerLiveRequest, self._server_live),
            self._unary("ServerReady", pb.ServerReadyRequest, self._server_ready),
            self._unary("ServerMetadata", pb.ServerMetadataRequest, self._server_metadata),
            self._unary("ModelReady", pb.ModelReadyRequest, self._model_ready),
            self._unary("ModelMetadata", pb.ModelMetadataRequest, self._of_models(model_metadata)),
            self._unary("ModelConfig", pb.ModelConfigRequest, self._of_models(model_config)),
            self._unary("ModelStatistics", pb.ModelStatisticsRequest, self._of_models(model_statistics)),
            Method(
                _path("ModelInfer"),
                lambda call: UnaryListener(call, self._inference.infer),
                handle_all=self._inference.infer_all,
            ),
            Method(
                _path("ModelStreamInfer"),
                self._inference.start_stream,
                client_streams=True,
                server_streams=True,
            ),
            _single("RepositoryIndex", self._control.index),
            _single("RepositoryModelLoad", self._control.load),
            _single("RepositoryModelUnload", self._control.unload),
        )
        return {method.path: method for method in all_methods}

    def close(self) -> None:
        """Finish loads and unloads that are under way."""
        self._control.close()

    def _unary(self, name: str, kind: type[Request], answer: Callable[[Request], Message]) -> Method:
        return unary(_path(name), lambda message: answer(decode(kind, message)).SerializeToString())

    def _of_models(self, describe: Callable[[Repository, Request], Message]) -> Callable[[Request], Message]:
        return lambda request: describe(self._repository, request)

    def _server_live(self, request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def _server_ready(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._is_ready())

    def _server_metadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="nnserve", version=__version__, extensions=EXTENSIONS)

    def _model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        # Asking for a model that is not there is no mistake here: clients wait for one in this way.
        try:
            self._repository.get(request.name, request.version)
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._is_ready())


def _single(name: str, handler: Callable[[Call, bytes], None]) -> Method:
    """Return a method with one message each way, which *handler* answers now or later."""
    return Method(_path(name), lambda call: UnaryListener(call, handler))


def _path(name: str) -> str:
    return f"/{SERVICE}/{name}"
