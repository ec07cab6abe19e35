"""Settings of a client -> options of the channel, or what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nnclient import InvalidInput, RetryPolicy
from nnclient.options import Options


@pytest.mark.parametrize(
    "target",
    [
        "localhost:1",
        "127.0.0.1:65535",
        "[::1]:50051",
        "unix:/run/nn.sock",
        "dns:///host:443",
        "ipv4:1.2.3.4:5",
    ],
)
def test_targets_of_grpc_are_accepted(target: str) -> None:
    """Host and port, sockets and gRPC's own names."""
    assert Options(target).target == target


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("localhost", "expected HOST:PORT"),
        ("", "expected HOST:PORT"),
        ("host:0", "port in 1 to 65535"),
        ("host:65536", "port in 1 to 65535"),  # gRPC would take it modulo 65536
        ("host:http", "expected HOST:PORT"),
        ("http://host:1", "write it as HOST:PORT, here 'host:1'"),
        ("grpc://host:1", "here 'host:1'"),
    ],
)
def test_targets_that_grpc_would_misread_are_refused(target: str, text: str) -> None:
    """A missing port would become 443, a URL a host name: better said at once."""
    with pytest.raises(InvalidInput, match=text):
        Options(target)


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_s": 0.0},
        {"timeout_s": -1.0},
        {"timeout_s": float("nan")},
        {"message_bytes": 10},
        {"keepalive_s": 0.0},
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any]) -> None:
    """The message names the setting."""
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        Options(**settings)


@pytest.mark.parametrize(
    "policy",
    [
        {"attempts": 0},
        {"attempts": 6},
        {"initial_backoff_s": 0.0},
        {"initial_backoff_s": 3.0, "max_backoff_s": 2.0},
        {"multiplier": 0.5},
    ],
)
def test_retry_policies_out_of_bounds_are_refused(policy: dict[str, Any]) -> None:
    """What the gRPC core would refuse or cut is refused here."""
    with pytest.raises(InvalidInput):
        RetryPolicy(**policy)


def test_metadata_may_be_a_mapping_or_pairs_with_any_case() -> None:
    """gRPC wants lower-case keys; users write Authorization."""
    expected = (("authorization", "Bearer x"),)
    assert Options.make(metadata={"Authorization": "Bearer x"}).metadata == expected
    assert Options.make(metadata=[("AUTHORIZATION", "Bearer x")]).metadata == expected


def test_loopback_is_not_sent_through_a_proxy() -> None:
    """http_proxy in the environment is for other machines than this one."""
    assert ("grpc.enable_http_proxy", 0) in Options("localhost:1").channel_arguments()
    assert ("grpc.enable_http_proxy", 0) not in Options("example.org:1").channel_arguments()


def test_every_request_fits_the_cores_retry_buffer() -> None:
    """A request above the core's buffer would never be sent again."""
    arguments = dict(Options(message_bytes=5 << 20).channel_arguments())
    assert arguments["grpc.per_rpc_retry_buffer_size"] > 5 << 20


def test_service_config_retries_unary_calls_only() -> None:
    """Streams are taken up again by the client, which knows what is unanswered."""
    config = json.loads(RetryPolicy(attempts=3).service_config())
    (method_config,) = config["methodConfig"]
    names = {name["method"] for name in method_config["name"]}
    assert names == {"Predict", "Differentiate", "ListModels", "GetModel"}
    assert method_config["retryPolicy"]["maxAttempts"] == 3
    assert method_config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert json.loads(RetryPolicy(attempts=1).service_config()) == {"methodConfig": []}
