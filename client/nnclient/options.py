"""Keyword arguments -> Options: what a client is told once, checked, and as the gRPC core wants it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nnclient.errors import InvalidInput
from nnclient.retry import RetryPolicy
from nnclient.tokens import token_metadata

DEFAULT_TARGET = "127.0.0.1:50051"

# The largest request message by default. Larger arrays are split between rows: one message of
# 1 MiB already amortises the cost of a call, and several overlap with the server's computing.
DEFAULT_MESSAGE_BYTES = 1 << 20
# Rows in one message at most, so that a narrow input to a wide model does not ask for one huge answer:
# 4096 rows of 1000 float32 outputs are just below nnserver's default limit.
MAX_ROWS_PER_MESSAGE = 4096

Metadata = Mapping[str, str] | Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Options:
    """
    Everything a client is told when it is made. Raises InvalidInput for what cannot work.

    target: HOST:PORT, unix:PATH or another gRPC name (dns:///…, ipv4:…).
    credentials: grpc.ChannelCredentials for TLS; None for a plain connection.
    metadata: sent with every call; keys are made lower-case. A token goes with them.
    timeout_s: time for a call that gives none itself; None for no limit.
    message_bytes: the largest request message; arrays are split between rows to stay below.
    keepalive_s: after so long without traffic during a call the connection is probed; None never.
    """

    target: str = DEFAULT_TARGET
    credentials: Any = None
    # Not shown: it holds the token.
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    timeout_s: float | None = 60.0
    message_bytes: int = DEFAULT_MESSAGE_BYTES
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    # A little more than the 5 minutes that gRPC servers allow by default; faster probes are
    # answered with GOAWAY (too_many_pings).
    keepalive_s: float | None = 330.0

    @classmethod
    def make(
        cls,
        *,
        metadata: Metadata = (),
        token: str | None = None,
        allow_insecure_token: bool = False,
        **fields: Any,
    ) -> Options:
        """Return options with *metadata* in any of its forms, and *token* among it."""
        pairs = metadata.items() if isinstance(metadata, Mapping) else metadata
        found = [(key.lower(), value) for key, value in pairs]
        if token is not None:
            if any(key == "authorization" for key, _ in found):
                raise InvalidInput("metadata has an authorization already; expected that or a token")
            target: str = fields.get("target", DEFAULT_TARGET)
            is_encrypted = fields.get("credentials") is not None
            found.append(token_metadata(token, target, is_encrypted, allow_insecure_token))
        return cls(metadata=tuple(found), **fields)

    def __post_init__(self) -> None:
        check_target(self.target)
        check_timeout(self.timeout_s)
        if self.message_bytes < 1024:
            raise InvalidInput(f"message_bytes is {self.message_bytes}; expected at least 1024")
        if self.keepalive_s is not None and self.keepalive_s <= 0:
            raise InvalidInput(f"keepalive_s is {self.keepalive_s}; expected more than 0, or None")

    def open_channel(self, grpc_module: Any) -> Any:
        """Return a channel of *grpc_module*: grpc, or grpc.aio."""
        if self.credentials is None:
            return grpc_module.insecure_channel(self.target, options=self.channel_arguments())
        return grpc_module.secure_channel(self.target, self.credentials, options=self.channel_arguments())

    def channel_arguments(self) -> list[tuple[str, Any]]:
        """Return the settings of the gRPC core's channel."""
        arguments: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.service_config", self.retry.service_config()),
            # Larger requests are sent but once, whatever the retry policy says; by default, above 256 KiB.
            ("grpc.per_rpc_retry_buffer_size", 2 * self.message_bytes),
            # The core's own pauses between attempts to connect start at 1 s and grow to 120 s,
            # in which every call fails at once: a server that is back would not be seen for long.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # A connection of its own for each client, instead of one shared by all of the process.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.primary_user_agent", f"nnclient/{_version()}"),
        ]
        if self.keepalive_s is not None:
            arguments += [
                ("grpc.keepalive_time_ms", round(self.keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", 20_000),
            ]
        if is_loopback(self.target):
            # http_proxy in the environment is for other machines.
            arguments.append(("grpc.enable_http_proxy", 0))
        return arguments


def check_target(target: str) -> None:
    """Raise InvalidInput for a target that gRPC would misread: without a port, or a URL."""
    if re.match(r"(https?|grpcs?)://", target):
        bare = target.split("://", 1)[1]
        raise InvalidInput(f"target is {target!r}; write it as HOST:PORT, here {bare!r}")
    scheme = target.partition(":")[0]
    if scheme in ("unix", "unix-abstract", "dns", "ipv4", "ipv6", "xds", "vsock"):
        return
    match = re.fullmatch(r"(\[[^\]]+\]|[^:/\s]+):(\d+)", target)
    if match is None or not 0 < int(match[2]) < 65536:
        raise InvalidInput(
            f"target is {target!r}; expected HOST:PORT with a port in 1 to 65535, "
            f"such as {DEFAULT_TARGET}, or unix:PATH"
        )


def check_timeout(timeout_s: float | None) -> None:
    """Raise InvalidInput unless *timeout_s* is None or a positive number of seconds."""
    if timeout_s is not None and not timeout_s > 0:
        raise InvalidInput(f"timeout_s is {timeout_s}; expected more than 0, or None for no limit")


def check_errors(errors: str) -> None:
    """Raise InvalidInput unless *errors* is a way to treat the error of a batch."""
    if errors not in ("raise", "return"):
        raise InvalidInput(f"errors is {errors!r}; expected 'raise' or 'return'")


def is_loopback(target: str) -> bool:
    """Return whether *target* is this machine by one of its usual names."""
    return re.match(r"localhost:|127\.|\[::1\]:|unix", target) is not None


def _version() -> str:
    from nnclient import __version__

    return __version__
