"""Our .proto beside the published ones, which tritonclient and KServe ship compiled: nothing differs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from nnproto.oip import inference_pb2

PROGRAM = """
import {first}
import {second}
import numpy as np
import tritonclient.grpc as triton
from nnserver.app import App
from nnserver.config import Config

app = App(Config(listen="127.0.0.1:0", transport="{transport}"))
client = triton.InferenceServerClient(app.start())
tensor = triton.InferInput("inputs", [1, 2], "FP64")
tensor.set_data_from_numpy(np.array([[1.0, 0.5]]))
result = client.infer("primer", [tensor])
print([f"{{value:.8f}}" for value in result.as_numpy("outputs")[0]])
client.close()
app.drain()
"""


def messages(of: Any) -> Iterator[Descriptor]:
    """All messages of a file or a message, those inside others as well."""
    inner = getattr(of, "message_types_by_name", None) or {m.name: m for m in getattr(of, "nested_types", ())}
    for message in inner.values():
        yield message
        yield from messages(message)


def shape(field: FieldDescriptor) -> tuple[Any, ...]:
    of = field.message_type or field.enum_type
    oneof = field.containing_oneof
    return (field.number, field.type, field.is_repeated, of and of.full_name, oneof and oneof.name)


def their_files(client: str) -> list[Any]:
    if client == "tritonclient":
        from tritonclient.grpc import model_config_pb2, service_pb2

        return [service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR]
    # Compiled for the default pool, where tritonclient's names are: read from its serialized form instead.
    code = (
        "from kserve.protocol.grpc import grpc_predict_v2_pb2 as m; print(m.DESCRIPTOR.serialized_pb.hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    from google.protobuf import descriptor_pool

    pool = descriptor_pool.DescriptorPool()
    return [pool.AddSerializedFile(bytes.fromhex(done.stdout.split()[-1]))]


@pytest.mark.parametrize("client", ["tritonclient", "kserve"])
def test_every_message_field_and_method_of_ours_is_theirs(client: str) -> None:
    files = their_files(client)
    theirs = {message.full_name: message for file in files for message in messages(file)}
    ours = {message.full_name: message for message in messages(inference_pb2.DESCRIPTOR)}
    shared = ours.keys() & theirs.keys()
    # KServe has the core and the repository's methods; Triton has everything.
    assert len(shared) >= (len(ours) if client == "tritonclient" else 20)
    if client == "kserve":
        # Its model_name is field 1, where Triton, which came first, has repository_name.
        shared -= {"inference.RepositoryModelLoadRequest", "inference.RepositoryModelUnloadRequest"}
    for name in shared:
        their_fields = {field.name: shape(field) for field in theirs[name].fields}
        for field in ours[name].fields:
            # What one of them has and the other does not, like double_param, is no contradiction.
            if client == "tritonclient" or field.name in their_fields:
                assert shape(field) == their_fields[field.name], (name, field.name)
    (their_service,) = (s for file in files for s in file.services_by_name.values())
    for method in inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        their_method = their_service.methods_by_name.get(method.name)
        if client == "tritonclient" or their_method:
            assert their_method.input_type.full_name == method.input_type.full_name
            assert their_method.output_type.full_name == method.output_type.full_name
            assert their_method.client_streaming == method.client_streaming


def test_every_enumeration_of_ours_is_theirs() -> None:
    from tritonclient.grpc import model_config_pb2

    ours = inference_pb2.DESCRIPTOR.enum_types_by_name["DataType"]
    theirs = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"]
    assert dict(ours.values_by_name).keys() == dict(theirs.values_by_name).keys()
    assert all(
        ours.values_by_name[name].number == value.number for name, value in theirs.values_by_name.items()
    )


@pytest.mark.parametrize("transport", ["h2", "grpcio"])
@pytest.mark.parametrize(
    "order", [("tritonclient.grpc", "nnserver.app"), ("nnserver.app", "tritonclient.grpc")]
)
def test_server_and_client_live_in_one_process(order: tuple[str, str], transport: str) -> None:
    """Imported in either order, the client asks the server and prints the primer's digits."""
    program = PROGRAM.format(first=order[0], second=order[1], transport=transport)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['0.31682708', '0.69627909']"
