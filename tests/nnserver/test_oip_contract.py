"""The .proto of the Open Inference Protocol: names and numbers that others' clients are compiled against."""

import subprocess
import sys

import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2

from nnproto.oip import inference_pb2 as pb
from nnserver.api.oip import POOL, SERVICE
from nnserver.api.reflection import ReflectionApi

# Message: its fields and their numbers, as the protocol's text has them.
CONTRACT = {
    "ModelInferRequest": {
        **{"model_name": 1, "model_version": 2, "id": 3, "parameters": 4, "inputs": 5, "outputs": 6},
        "raw_input_contents": 7,
    },
    "ModelInferRequest.InferInputTensor": {
        **{"name": 1, "datatype": 2, "shape": 3, "parameters": 4, "contents": 5},
    },
    "ModelInferRequest.InferRequestedOutputTensor": {"name": 1, "parameters": 2},
    "ModelInferResponse": {
        **{"model_name": 1, "model_version": 2, "id": 3, "parameters": 4, "outputs": 5},
        "raw_output_contents": 6,
    },
    "ModelInferResponse.InferOutputTensor": {
        **{"name": 1, "datatype": 2, "shape": 3, "parameters": 4, "contents": 5},
    },
    "InferParameter": {
        **{"bool_param": 1, "int64_param": 2, "string_param": 3, "double_param": 4, "uint64_param": 5},
    },
    "InferTensorContents": {
        **{"bool_contents": 1, "int_contents": 2, "int64_contents": 3, "uint_contents": 4},
        **{"uint64_contents": 5, "fp32_contents": 6, "fp64_contents": 7, "bytes_contents": 8},
    },
    "ModelStreamInferResponse": {"error_message": 1, "infer_response": 2},
    "ServerLiveResponse": {"live": 1},
    "ServerReadyResponse": {"ready": 1},
    "ModelReadyRequest": {"name": 1, "version": 2},
    "ModelReadyResponse": {"ready": 1},
    "ServerMetadataResponse": {"name": 1, "version": 2, "extensions": 3},
    "ModelMetadataRequest": {"name": 1, "version": 2},
    "ModelMetadataResponse": {"name": 1, "versions": 2, "platform": 3, "inputs": 4, "outputs": 5},
    "ModelMetadataResponse.TensorMetadata": {"name": 1, "datatype": 2, "shape": 3},
    "RepositoryIndexRequest": {"repository_name": 1, "ready": 2},
    "RepositoryIndexResponse.ModelIndex": {"name": 1, "version": 2, "state": 3, "reason": 4},
    "RepositoryModelLoadRequest": {"repository_name": 1, "model_name": 2, "parameters": 3},
    "RepositoryModelUnloadRequest": {"repository_name": 1, "model_name": 2, "parameters": 3},
}
METHODS = [
    *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"),
    *("ModelStreamInfer", "ModelConfig", "ModelStatistics"),
    *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
]


@pytest.mark.parametrize("name", CONTRACT)
def test_fields_have_the_contracts_names_and_numbers(name):
    message = POOL.FindMessageTypeByName(f"inference.{name}")
    assert {field.name: field.number for field in message.fields} == CONTRACT[name]


def test_the_service_has_the_contracts_methods():
    """Each takes NAMERequest and gives NAMEResponse; only the stream streams."""
    service = POOL.FindServiceByName(SERVICE)
    assert [method.name for method in service.methods] == METHODS
    for method in service.methods:
        stem = "ModelInfer" if method.name == "ModelStreamInfer" else method.name
        assert method.input_type.full_name == f"inference.{stem}Request"
        assert method.output_type.full_name == f"inference.{method.name}Response"
        streams = method.name == "ModelStreamInfer"
        assert (method.client_streaming, method.server_streaming) == (streams, streams)


def test_the_types_are_not_in_the_default_pool():
    assert pb.ModelInferRequest.DESCRIPTOR.file.pool is POOL
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")


# What tritonclient does when it is imported: the same names, other files and fields, in the default pool.
TRITON = """
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference", syntax="proto3")
message = file.message_type.add(name="ModelInferRequest")
message.field.add(name="model_name", number=1, type=9, label=1)
message.field.add(name="other", number=99, type=9, label=1)
file.service.add(name="GRPCInferenceService")
descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
"""
OURS = """
from nnserver.api.oip import POOL, SERVICE
from nnserver.api.reflection import ReflectionApi
from nnproto.oip import inference_pb2 as pb
from grpc_reflection.v1alpha import reflection_pb2
"""
CHECK = """
from google.protobuf import descriptor_pool
assert pb.ModelInferRequest.FromString(pb.ModelInferRequest(id="a").SerializeToString()).id == "a"
theirs = descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
assert "other" in theirs.fields_by_name
api = ReflectionApi([SERVICE], POOL, descriptor_pool.Default())
answer = api.answer(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
assert b"ModelStatistics" in answer.file_descriptor_response.file_descriptor_proto[0]
"""


@pytest.mark.parametrize("order", [(TRITON, OURS), (OURS, TRITON)], ids=["theirs first", "ours first"])
def test_another_file_may_register_the_same_names(order):
    """In a process of its own, in either order: both work, and reflection tells of ours."""
    code = "".join((*order, CHECK))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reflection_describes_the_service():
    """By the name of the service, of a method and of a message; the file has no imports."""
    api = ReflectionApi([SERVICE], POOL, descriptor_pool.Default())
    for symbol in (SERVICE, f"{SERVICE}.ModelInfer", "inference.ModelConfig", "nnproto.v1.PredictRequest"):
        answer = api.answer(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
        assert answer.WhichOneof("message_response") == "file_descriptor_response", symbol
        assert len(answer.file_descriptor_response.file_descriptor_proto) == 1
