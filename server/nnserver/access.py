"""
Methods in, methods that ask who calls out: the scope that each needs, and the rate that each caller has.

    call.caller -> identity -> scope -> rate -> the method

A caller is looked into once: what was found out stays with it until the identities are replaced. Streams
are asked about again with each message, which costs a comparison: a token that is revoked ends its streams.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from nnserver.alarms import Alarms
from nnserver.call import Call, Caller, Method, Methods
from nnserver.errors import PermissionDenied, RateExceeded, ServerError, Unauthenticated
from nnserver.guarded_stream import GuardedStream
from nnserver.identities import ADMIN, INFER, READ, Identities, Identity
from nnserver.token_bucket import TokenBucket

logger = logging.getLogger(__name__)

_OWN = "/nnproto.v1.Inference/"
_OIP = "/inference.GRPCInferenceService/"

# None: for everybody. What is not here needs ADMIN: a method that was forgotten is locked, not open.
_SCOPES: dict[str, str | None] = {
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": READ,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": READ,
    f"{_OWN}Predict": INFER,
    f"{_OWN}PredictStream": INFER,
    f"{_OWN}Differentiate": INFER,
    f"{_OWN}DifferentiateStream": INFER,
    f"{_OWN}ListModels": READ,
    f"{_OWN}GetModel": READ,
    # The protocol's own health checks.
    f"{_OIP}ServerLive": None,
    f"{_OIP}ServerReady": None,
    f"{_OIP}ModelReady": None,
    f"{_OIP}ServerMetadata": READ,
    f"{_OIP}ModelMetadata": READ,
    f"{_OIP}ModelConfig": READ,
    f"{_OIP}ModelStatistics": READ,
    f"{_OIP}ModelInfer": INFER,
    f"{_OIP}ModelStreamInfer": INFER,
    f"{_OIP}RepositoryIndex": READ,
    f"{_OIP}RepositoryModelLoad": ADMIN,
    f"{_OIP}RepositoryModelUnload": ADMIN,
}

_NO_CREDENTIALS = Unauthenticated(
    "this server asks who calls: send the metadata 'authorization: Bearer TOKEN', or, if it asks for one, "
    "a client certificate that it knows"
)
_NO_BEARER = Unauthenticated("the metadata 'authorization' is not one 'Bearer TOKEN'")
_UNKNOWN_TOKEN = Unauthenticated("the token is not known here; it may have been replaced")
_UNKNOWN_CERTIFICATE = Unauthenticated("the client's certificate has no name that is known here, or too many")


@dataclass(frozen=True, slots=True)
class _Rules:
    """Who may call, and what is left of their rates, by name."""

    identities: Identities
    buckets: dict[str, TokenBucket]


@dataclass(frozen=True, slots=True)
class Grant:
    """What *rules* say of a caller: who it is, or why it is nobody."""

    rules: _Rules
    identity: Identity | None
    refusal: ServerError | None
    bucket: TokenBucket | None


class Access:
    """Lets those in whom *identities* has, as far as their scopes and rates go. From any thread."""

    def __init__(self, identities: Identities, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._alarms = Alarms()
        self._rules = _Rules(Identities(), {})
        self.replace(identities)

    def guard(self, methods: Methods) -> dict[str, Method]:
        """Return *methods*, each behind its gate."""
        return {path: self._guarded(method) for path, method in methods.items()}

    def replace(self, identities: Identities) -> None:
        """
        Go by *identities* from now on.

        Who has the same rate as before has as much left of it. Calls that have begun go on; streams, up to
        their next message.
        """
        before = self._rules.buckets
        buckets: dict[str, TokenBucket] = {}
        for identity in identities:
            if identity.requests_per_s is not None:
                bucket = TokenBucket(identity.requests_per_s, identity.burst, self._clock)
                old = before.get(identity.name)
                is_same = old is not None and (old.per_s, old.burst) == (bucket.per_s, bucket.burst)
                buckets[identity.name] = old if old is not None and is_same else bucket
        self._rules = _Rules(identities, buckets)

    def close(self) -> None:
        """Let go of streams that are held back."""
        self._alarms.close()

    def grant(self, caller: Caller) -> Grant:
        """Return what *caller* is, by what it has shown."""
        rules = self._rules
        known: Grant | None = caller.grant
        if known is not None and known.rules is rules:
            return known
        identity, refusal = _identify(rules.identities, caller)
        bucket = None if identity is None else rules.buckets.get(identity.name)
        caller.grant = grant = Grant(rules, identity, refusal, bucket)
        return grant

    def refusal(self, caller: Caller, method: str, scope: str) -> ServerError | None:
        """Return why *caller* may not call *method*, which needs *scope*, at any rate."""
        grant = self.grant(caller)
        identity = grant.identity
        if identity is None:
            return grant.refusal
        if scope not in identity.scopes:
            return PermissionDenied(f"'{identity.name}' has no scope '{scope}', which {method} needs")
        return None

    def _guarded(self, method: Method) -> Method:
        path = method.path
        scope = _SCOPES.get(path, ADMIN)
        if scope is None:
            return method

        def gate(call: Call) -> ServerError | None:
            caller = call.caller
            refusal = self.refusal(caller, path, scope)
            if refusal is not None:
                return refusal
            bucket = self.grant(caller).bucket
            if bucket is None or not (wait_s := bucket.take()):
                return None
            return RateExceeded(
                f"{bucket.per_s:g} requests a second are allowed here, {bucket.burst} at once; "
                f"the next in {wait_s:.3f} s",
                wait_s,
            )

        if not method.client_streams:
            return replace(method, gate=gate)
        return replace(
            method,
            gate=gate,
            start=lambda call: GuardedStream(
                call,
                method,
                refusal=lambda: self.refusal(call.caller, path, scope),
                bucket=lambda: self.grant(call.caller).bucket,
                alarms=self._alarms,
            ),
        )


def _identify(identities: Identities, caller: Caller) -> tuple[Identity | None, ServerError | None]:
    """Return who *caller* is; or None, and why. A token goes before a certificate."""
    if caller.authorization:
        scheme, _, token = caller.authorization[0].partition(" ")
        if len(caller.authorization) > 1 or scheme.lower() != "bearer" or not token:
            return None, _NO_BEARER
        identity = identities.of_token(token)
        return identity, None if identity else _UNKNOWN_TOKEN
    if caller.certificate:
        identity = identities.of_certificate(caller.certificate)
        return identity, None if identity else _UNKNOWN_CERTIFICATE
    return None, _NO_CREDENTIALS
