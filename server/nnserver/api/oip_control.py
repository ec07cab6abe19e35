"""Names of models in, the repository's state out, and changed: RepositoryIndex, ModelLoad, ModelUnload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from nnproto.oip import inference_pb2 as pb
from nnserver.api.inference import decode
from nnserver.call import Call
from nnserver.catalog import Catalog
from nnserver.errors import Draining, InvalidArgument, PermissionDenied

READY, UNAVAILABLE = "READY", "UNAVAILABLE"


class OipControl:
    """
    Lists the models of *catalog*; loads and unloads them if *may_change*.

    Loading takes as long as the disk does, so all of it happens in a thread of its own, one after the other.
    """

    def __init__(self, catalog: Catalog, may_change: bool) -> None:
        self._catalog = catalog
        self._may_change = may_change
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nnserver-control")

    def index(self, call: Call, message: bytes) -> None:
        """Answer a RepositoryIndex."""
        self._in_thread(call, message, self._index)

    def load(self, call: Call, message: bytes) -> None:
        """Answer a RepositoryModelLoad."""
        self._in_thread(call, message, self._load)

    def unload(self, call: Call, message: bytes) -> None:
        """Answer a RepositoryModelUnload."""
        self._in_thread(call, message, self._unload)

    def close(self) -> None:
        """Finish what is under way."""
        self._thread.shutdown(wait=True)

    def _in_thread(self, call: Call, message: bytes, answer: Callable[[bytes], bytes]) -> None:
        def run() -> None:
            if call.is_cancelled():
                return
            try:
                response = answer(message)
            except Exception as error:
                call.fail(error)
            else:
                call.answer(response)

        try:
            self._thread.submit(run)
        except RuntimeError:
            raise Draining("the server is draining; send the request to another") from None

    def _index(self, message: bytes) -> bytes:
        request = decode(pb.RepositoryIndexRequest, message)
        _check_repository(request.repository_name)
        index = pb.RepositoryIndexResponse()
        for entry in self._catalog.index():
            if entry.is_ready or not request.ready:
                state = READY if entry.is_ready else UNAVAILABLE
                index.models.add(name=entry.name, version=entry.version, state=state, reason=entry.reason)
        return index.SerializeToString()

    def _load(self, message: bytes) -> bytes:
        request = decode(pb.RepositoryModelLoadRequest, message)
        self._check(request.repository_name, request.model_name, request.parameters, known=())
        self._catalog.load(request.model_name)
        return pb.RepositoryModelLoadResponse().SerializeToString()

    def _unload(self, message: bytes) -> bytes:
        request = decode(pb.RepositoryModelUnloadRequest, message)
        # What tritonclient always sends; no model here depends on another.
        self._check(
            request.repository_name, request.model_name, request.parameters, known=("unload_dependents",)
        )
        self._catalog.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse().SerializeToString()

    def _check(
        self,
        repository: str,
        model: str,
        parameters: Mapping[str, pb.ModelRepositoryParameter],
        known: tuple[str, ...],
    ) -> None:
        if not self._may_change:
            raise PermissionDenied("models are not loaded or unloaded by clients here (model_control is off)")
        _check_repository(repository)
        if not model:
            raise InvalidArgument("no model was named")
        for name in parameters:
            if name not in known:
                raise InvalidArgument(
                    f"parameter {name[:80]!r} is not taken: configuration and files come from the repository"
                )


def _check_repository(name: str) -> None:
    if name:
        raise InvalidArgument(f"repository_name is {name[:80]!r}; there is one repository, without a name")
