"""Served model -> what the Open Inference Protocol says of it: metadata, configuration, statistics."""

from __future__ import annotations

import nncore
from nnproto.oip import inference_pb2 as pb
from nnserver.api.oip_answers import BYTES, listed_outputs
from nnserver.api.oip_tensors import INPUT, OIP_NAMES
from nnserver.model_settings import LABELS
from nnserver.repository import Repository, ServedModel
from nnserver.statistics import Duration

PLATFORM = "nnserve_mlp"
BACKEND = "nnserve"

_CONFIG_TYPES = {"FP32": pb.TYPE_FP32, "FP64": pb.TYPE_FP64, BYTES: pb.TYPE_STRING}


def model_metadata(repository: Repository, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
    """Return the names, types and shapes of a model's tensors."""
    model = repository.get(request.name, request.version)
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[version.version for version in repository.versions(model.name)],
        platform=PLATFORM,
        inputs=[tensor(name=INPUT, datatype=OIP_NAMES[model.mlp.dtype], shape=(-1, model.mlp.n_in))],
        outputs=[
            tensor(name=name, datatype=datatype, shape=(-1, width))
            for name, datatype, width in _outputs(model)
        ],
    )


def model_config(repository: Repository, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
    """Return a model's configuration, as Triton would write it."""
    model = repository.get(request.name, request.version)
    mlp = model.mlp
    config = pb.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=BACKEND,
        # Larger requests are taken, too, each as a batch of its own.
        max_batch_size=min(model.lane.batcher.limits.max_batch_rows, 2**31 - 1),
        input=[pb.ModelInput(name=INPUT, data_type=_CONFIG_TYPES[OIP_NAMES[mlp.dtype]], dims=[mlp.n_in])],
        output=[
            pb.ModelOutput(name=name, data_type=_CONFIG_TYPES[datatype], dims=[width])
            for name, datatype, width in _outputs(model)
        ],
        instance_group=[pb.ModelInstanceGroup(name=model.name, count=1, kind=pb.ModelInstanceGroup.KIND_CPU)],
        dynamic_batching=pb.ModelDynamicBatching(),
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
        parameters={name: pb.ModelParameter(string_value=text) for name, text in _facts(mlp).items()},
    )
    policy = model.settings.version_policy
    if policy.latest is not None:
        config.version_policy.latest.num_versions = policy.latest
    elif policy.specific:
        config.version_policy.specific.versions.extend(policy.specific)
    else:
        config.version_policy.all.SetInParent()
    return pb.ModelConfigResponse(config=config)


def model_statistics(
    repository: Repository, request: pb.ModelStatisticsRequest
) -> pb.ModelStatisticsResponse:
    """Return the statistics of one version, of all versions of a model, or of all models."""
    if not request.name:
        models = list(repository)
    elif request.version:
        models = [repository.get(request.name, request.version)]
    else:
        models = repository.versions(repository.get(request.name).name)
    return pb.ModelStatisticsResponse(model_stats=map(_statistics, models))


def _outputs(model: ServedModel) -> list[tuple[str, str, int]]:
    """Name, datatype and width of each output that a request which names none is answered with."""
    numbers = (OIP_NAMES[model.mlp.dtype], model.mlp.n_out)
    return [(name, *((BYTES, 1) if name == LABELS else numbers)) for name in listed_outputs(model)]


def _facts(mlp: nncore.Mlp) -> dict[str, str]:
    """What a model is made of."""
    facts = {
        "layers": "-".join(str(n) for n in (mlp.n_in, *(layer.n_out for layer in mlp.layers))),
        "activations": " ".join(layer.activation for layer in mlp.layers),
        "parameter_count": str(mlp.parameter_count),
    }
    if mlp.input_shape is not None:
        facts["input_shape"] = "x".join(map(str, mlp.input_shape))
    return facts


def _statistics(model: ServedModel) -> pb.ModelStatistics:
    totals = model.lane.batcher.statistics.totals()
    return pb.ModelStatistics(
        name=model.name,
        version=model.version,
        last_inference=totals.last_inference_ms,
        inference_count=totals.rows,
        execution_count=totals.executions,
        inference_stats=pb.InferStatistics(
            success=_duration(totals.success),
            fail=_duration(totals.fail),
            queue=_duration(totals.queue),
            compute_input=_duration(totals.input),
            compute_infer=_duration(totals.infer),
            compute_output=_duration(totals.output),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=rows,
                compute_input=_duration(times.input),
                compute_infer=_duration(times.infer),
                compute_output=_duration(times.output),
            )
            for rows, times in totals.batches.items()
        ],
        memory_usage=[pb.MemoryUsage(type="CPU", byte_size=model.mlp.nbytes)],
    )


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
