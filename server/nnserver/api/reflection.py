"""grpc.reflection: symbol or file name -> descriptors, so that grpcurl and its like need no .proto."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import lru_cache

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection_pb2 as pb

from nnserver.call import Call, Method
from nnserver.errors import InvalidArgument, Status

# v1 has v1alpha's messages under another package name: the bytes are the same.
SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


class ReflectionApi:
    """
    Reflection of *services* (full names), their files and everything those import.

    pools: where the services' types are; the first that has a name is asked.
    """

    def __init__(self, services: Iterable[str], *pools: DescriptorPool) -> None:
        self._services = sorted({*services, *SERVICES})
        self._own_pools = pools

    def methods(self) -> dict[str, Method]:
        """Return the methods of both versions of the service by path."""
        paths = [f"/{service}/ServerReflectionInfo" for service in SERVICES]
        return {
            path: Method(path, lambda call: _Reflection(self, call), client_streams=True, server_streams=True)
            for path in paths
        }

    def answer(self, request: pb.ServerReflectionRequest) -> pb.ServerReflectionResponse:
        """Answer one question; what is not known is an error inside the answer."""
        response = pb.ServerReflectionResponse(valid_host=request.host, original_request=request)
        question = request.WhichOneof("message_request")
        try:
            if question == "list_services":
                for name in self._services:
                    response.list_services_response.service.add(name=name)
            elif question == "file_by_filename":
                _add_files(response, self._file_by_name(request.file_by_filename))
            elif question == "file_containing_symbol":
                _add_files(response, self._file_with(request.file_containing_symbol))
            else:
                # Extensions do not exist in proto3 services; an empty answer would claim otherwise.
                raise KeyError(question)
        except KeyError:
            response.error_response.error_code = Status.NOT_FOUND
            response.error_response.error_message = "not found"
        return response

    def _file_by_name(self, name: str) -> FileDescriptor:
        return self._first(lambda pool: pool.FindFileByName(name))

    def _file_with(self, symbol: str) -> FileDescriptor:
        try:
            return self._first(lambda pool: pool.FindFileContainingSymbol(symbol))
        except KeyError:
            # A pool has symbols of everything but methods.
            name, _, method = symbol.rpartition(".")
            return self._first(
                lambda pool: pool.FindServiceByName(name).methods_by_name[method].containing_service.file
            )

    def _first(self, find: Callable[[DescriptorPool], FileDescriptor]) -> FileDescriptor:
        """Return what the first pool finds that has it; raises KeyError if none has."""
        for pool in (*self._own_pools, _v1_pool()):
            with contextlib.suppress(KeyError):
                return find(pool)
        raise KeyError


class _Reflection:
    """One ServerReflectionInfo stream: a question, its answer, and so on."""

    def __init__(self, api: ReflectionApi, call: Call) -> None:
        self._api = api
        self._call = call
        call.request(1)

    def on_message(self, message: bytes) -> None:
        try:
            request = pb.ServerReflectionRequest.FromString(message)
        except DecodeError:
            self._call.fail(InvalidArgument("the message's bytes are not a ServerReflectionRequest"))
            return
        self._call.reply(self._api.answer(request).SerializeToString())
        self._call.request(1)

    def on_half_close(self) -> None:
        self._call.finish()

    def on_cancel(self) -> None:
        pass

    def on_drain(self) -> None:
        self._call.finish()


@lru_cache(maxsize=1)
def _v1_pool() -> DescriptorPool:
    """Return a pool with the file of grpc.reflection.v1, which grpcio-reflection does not ship."""
    from google.protobuf import descriptor_pb2, text_format  # Late: few servers are ever asked.

    v1alpha = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    v1 = descriptor_pb2.FileDescriptorProto()
    text_format.Parse(text_format.MessageToString(v1alpha).replace("v1alpha", "v1"), v1)
    # A pool of its own: the default one may get the same file from elsewhere.
    pool = DescriptorPool()
    pool.AddSerializedFile(v1.SerializeToString())
    return pool


def _add_files(response: pb.ServerReflectionResponse, file: FileDescriptor) -> None:
    """Add *file* and all that it imports, each once, as serialized FileDescriptorProtos."""
    seen: dict[str, FileDescriptor] = {}
    queue = [file]
    while queue:
        descriptor = queue.pop(0)
        if descriptor.name not in seen:
            seen[descriptor.name] = descriptor
            queue.extend(descriptor.dependencies)
    response.file_descriptor_response.file_descriptor_proto.extend(f.serialized_pb for f in seen.values())
