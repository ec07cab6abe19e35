"""ModelMetadata, ModelConfig, ModelStatistics and the server's own metadata, live and ready."""

import dataclasses

import numpy as np
import pytest
from support.models import random_mlp
from support.oip import OipServer, request_for
from support.serving import echoed, served

import nnserver
from nnproto.oip import inference_pb2 as pb
from nnserver.api.oip import EXTENSIONS
from nnserver.batcher import QueueLimits
from nnserver.errors import InvalidArgument, NotFound
from nnserver.model_settings import ModelSettings, VersionPolicy


def metadata(server, name="iris", version=""):
    request = pb.ModelMetadataRequest(name=name, version=version)
    return server.ask("ModelMetadata", request, pb.ModelMetadataResponse)


def config(server, name="iris", version=""):
    return server.ask(
        "ModelConfig", pb.ModelConfigRequest(name=name, version=version), pb.ModelConfigResponse
    ).config


def statistics(server, **request):
    asked = pb.ModelStatisticsRequest(**request)
    return list(server.ask("ModelStatistics", asked, pb.ModelStatisticsResponse).model_stats)


def is_ready(server, name, version=""):
    request = pb.ModelReadyRequest(name=name, version=version)
    return server.ask("ModelReady", request, pb.ModelReadyResponse).ready


def versions_of(*versions):
    return [dataclasses.replace(echoed(3), version=version) for version in versions]


def tensors(specs):
    return [(spec.name, spec.datatype, list(spec.shape)) for spec in specs]


def test_the_metadata_of_a_model_with_labels():
    response = metadata(OipServer(served(random_mlp(0, [4, 8, 3], labels=["a", "b", "c"]))))
    assert (response.name, list(response.versions), response.platform) == ("iris", ["1"], "nnserve_mlp")
    assert tensors(response.inputs) == [("inputs", "FP32", [-1, 4])]
    assert tensors(response.outputs) == [
        ("outputs", "FP32", [-1, 3]),
        ("probabilities", "FP32", [-1, 3]),
        ("labels", "BYTES", [-1, 1]),
    ]


def test_the_metadata_of_a_float64_model_without_labels():
    response = metadata(OipServer(served(random_mlp(0, [4, 3], dtype="float64"))))
    assert tensors(response.inputs) == [("inputs", "FP64", [-1, 4])]
    assert tensors(response.outputs) == [("outputs", "FP64", [-1, 3])]


def test_versions_are_numbers_in_ascending_order():
    assert list(metadata(OipServer(*versions_of("10", "9")), version="9").versions) == ["9", "10"]


def test_the_configuration():
    """As Triton would write it: extents without the rows, batching without delay, one answer a request."""
    mlp = random_mlp(0, [4, 8, 3], labels=["a", "b", "c"])
    response = config(OipServer(served(mlp, limits=QueueLimits(max_batch_rows=77))))
    assert (response.name, response.platform, response.backend) == ("iris", "nnserve_mlp", "nnserve")
    assert response.max_batch_size == 77
    assert [(spec.name, spec.data_type, list(spec.dims)) for spec in response.input] == [
        ("inputs", pb.TYPE_FP32, [4])
    ]
    assert [(spec.name, spec.data_type, list(spec.dims)) for spec in response.output] == [
        ("outputs", pb.TYPE_FP32, [3]),
        ("probabilities", pb.TYPE_FP32, [3]),
        ("labels", pb.TYPE_STRING, [1]),
    ]
    assert response.HasField("dynamic_batching")
    assert response.dynamic_batching.max_queue_delay_microseconds == 0
    assert not response.model_transaction_policy.decoupled
    assert response.parameters["layers"].string_value == "4-8-3"
    assert response.parameters["activations"].string_value == "relu identity"
    assert response.version_policy.latest.num_versions == 1


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        (VersionPolicy(), "all"),
        (VersionPolicy(latest=3), "latest"),
        (VersionPolicy(specific=(1, 7)), "specific"),
    ],
)
def test_the_version_policy_is_told(policy, kind):
    model = dataclasses.replace(echoed(3), settings=ModelSettings(version_policy=policy))
    told = config(OipServer(model)).version_policy
    assert told.WhichOneof("policy_choice") == kind
    assert told.latest.num_versions == (policy.latest or 0)
    assert tuple(told.specific.versions) == policy.specific


def test_the_shape_that_an_input_had_is_told():
    """Of a model that was converted from one of images, say; rows are flat all the same."""
    model = served(random_mlp(0, [6, 2], input_shape=(2, 3)))
    told = config(OipServer(model))
    assert told.parameters["input_shape"].string_value == "2x3"
    assert list(told.input[0].dims) == [6]
    assert "input_shape" not in config(OipServer(echoed(3))).parameters


def test_a_limit_beyond_32_bits_is_told_as_the_largest_there_is():
    model = served(random_mlp(0, [2, 1]), limits=QueueLimits(max_batch_rows=2**40))
    assert config(OipServer(model)).max_batch_size == 2**31 - 1


def test_statistics_count_what_was_answered():
    """Requests, rows and executions, by version; of one version, one model, or all."""
    server = OipServer(*versions_of("1", "2"), served(random_mlp(0, [3, 1]), "rose"))
    server.let_jobs_wait()
    for rows in (2, 3):
        server.start("ModelInfer", request_for(np.zeros((rows, 3)), model_version="2").SerializeToString())
    server.engine.run_waiting()
    (of_version,) = statistics(server, name="iris", version="2")
    assert (of_version.name, of_version.version) == ("iris", "2")
    assert (of_version.inference_count, of_version.execution_count) == (5, 1)
    stats = of_version.inference_stats
    assert [
        duration.count
        for duration in (
            stats.success,
            stats.queue,
            stats.compute_input,
            stats.compute_infer,
            stats.compute_output,
        )
    ] == [2] * 5
    assert stats.fail.count == 0
    assert stats.success.ns >= stats.queue.ns + stats.compute_infer.ns > 0
    assert of_version.last_inference > 1_600_000_000_000
    assert [(batch.batch_size, batch.compute_infer.count) for batch in of_version.batch_stats] == [(5, 1)]
    assert of_version.memory_usage[0].byte_size == server.repository.get("iris").mlp.nbytes
    assert [(s.name, s.version) for s in statistics(server, name="iris")] == [("iris", "1"), ("iris", "2")]
    assert [(s.name, s.version) for s in statistics(server)] == [("iris", "1"), ("iris", "2"), ("rose", "1")]
    assert statistics(server)[0].execution_count == 0


@pytest.mark.parametrize(
    "ask", [metadata, config, lambda server, *of: statistics(server, name=of[0], version=of[1])]
)
def test_an_unknown_model_or_version_is_not_found(ask):
    server = OipServer(echoed(3))
    with pytest.raises(NotFound, match="unknown model 'rose'"):
        ask(server, "rose", "")
    with pytest.raises(NotFound, match="has no version '7'"):
        ask(server, "iris", "7")


def test_bytes_that_are_no_request_are_refused():
    """By every method, by the name of its own request."""
    server = OipServer(echoed(3))
    for path in server.methods:
        name = path.rpartition("/")[2]
        if name == "ModelStreamInfer":
            continue
        call = server.start(name, b"\xff")
        call.wait_for_end()
        assert isinstance(call.error, InvalidArgument), name
        assert str(call.error).endswith(f"are not a inference.{name}Request")


def test_readiness_is_of_the_server_and_of_each_model():
    """An unknown model is not ready, which is no error: clients wait for one in this way."""
    server = OipServer(*versions_of("1", "2"))
    assert server.ask("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse).live
    assert server.ask("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse).ready
    assert is_ready(server, "iris")
    assert is_ready(server, "iris", "2")
    assert not is_ready(server, "iris", "3")
    assert not is_ready(server, "rose")
    server.is_ready = False
    assert server.ask("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse).live
    assert not server.ask("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse).ready
    assert not is_ready(server, "iris")


def test_the_server_names_itself_and_its_extensions():
    response = OipServer().ask("ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
    assert (response.name, response.version) == ("nnserve", nnserver.__version__)
    assert tuple(response.extensions) == EXTENSIONS
    assert {"classification", "statistics", "model_configuration", "model_repository"} <= set(EXTENSIONS)
