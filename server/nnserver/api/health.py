"""grpc.health.v1.Health: whether the server, a service or a model is ready, asked once or watched."""

from __future__ import annotations

import threading
from collections.abc import Callable

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2 as pb

from nnserver.call import Call, Method, single
from nnserver.errors import InvalidArgument, NotFound

SERVICE = "grpc.health.v1.Health"

_SERVING = pb.HealthCheckResponse.SERVING
_NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


class HealthApi:
    """
    Health of "" (the server) and of every name for which *is_known* holds.

    SERVING until *drain*, NOT_SERVING from then on; watchers hear of it.
    """

    def __init__(self, is_known: Callable[[str], bool]) -> None:
        self._is_known = is_known
        self._is_draining = False
        self._lock = threading.Lock()
        self._watchers: set[_Watcher] = set()

    def methods(self) -> dict[str, Method]:
        """Return the service's methods by path."""
        check = single(f"/{SERVICE}/Check", self._check)
        watch = Method(f"/{SERVICE}/Watch", lambda call: _Watcher(self, call), server_streams=True)
        return {check.path: check, watch.path: watch}

    def drain(self) -> None:
        """Report NOT_SERVING from now on."""
        with self._lock:
            self._is_draining = True
        self.refresh()

    def refresh(self) -> None:
        """Tell watchers what has changed: *is_known* may answer differently from now on."""
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.send_status()

    def status(self, name: str) -> pb.HealthCheckResponse.ServingStatus:
        """Return the status of the server (""), a service or a model."""
        if name and not self._is_known(name):
            return _SERVICE_UNKNOWN
        return _NOT_SERVING if self._is_draining else _SERVING

    def is_serving(self) -> bool:
        """Whether the server takes requests."""
        return not self._is_draining

    def add(self, watcher: _Watcher) -> None:
        with self._lock:
            self._watchers.add(watcher)

    def remove(self, watcher: _Watcher) -> None:
        with self._lock:
            self._watchers.discard(watcher)

    def _check(self, call: Call, message: bytes) -> None:
        status = self.status(_service_name(message))
        if status == _SERVICE_UNKNOWN:
            raise NotFound("no service or model of this name; use the empty name for the whole server")
        call.answer(pb.HealthCheckResponse(status=status).SerializeToString())


class _Watcher:
    """One Watch call: the status now, then every change of it."""

    def __init__(self, api: HealthApi, call: Call) -> None:
        self._api = api
        self._call = call
        self._name: str | None = None
        self._lock = threading.Lock()
        self._last: int | None = None
        call.request(1)

    def on_message(self, message: bytes) -> None:
        try:
            self._name = _service_name(message)
        except InvalidArgument as error:
            self._call.fail(error)
            return
        self._api.add(self)
        self.send_status()

    def send_status(self) -> None:
        with self._lock:
            status = self._api.status(self._name or "")
            if status != self._last:
                self._last = status
                self._call.reply(pb.HealthCheckResponse(status=status).SerializeToString())

    def on_half_close(self) -> None:
        pass

    def on_cancel(self) -> None:
        self._api.remove(self)

    def on_drain(self) -> None:
        self._api.remove(self)
        self._call.finish()


def _service_name(message: bytes) -> str:
    try:
        return str(pb.HealthCheckRequest.FromString(message).service)
    except DecodeError:
        raise InvalidArgument("the message's bytes are not a grpc.health.v1.HealthCheckRequest") from None
