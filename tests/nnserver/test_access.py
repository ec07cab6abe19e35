"""Gates: scopes, rates and streams, without a transport and on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.calls import FakeCall

from nnserver import access as module
from nnserver.access import Access
from nnserver.app import App
from nnserver.call import Call, Caller, Method, single
from nnserver.config import Config
from nnserver.errors import PermissionDenied, RateExceeded, Status, Unauthenticated
from nnserver.guarded_stream import GuardedStream
from nnserver.identities import Identities, hash_of, make_token, parse_identities

PREDICT = "/nnproto.v1.Inference/Predict"
STREAM = "/nnproto.v1.Inference/PredictStream"
LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"
HEALTH = "/grpc.health.v1.Health/Check"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class People:
    """Identities with tokens, by name."""

    def __init__(self, **entries: dict[str, Any]) -> None:
        self.tokens: dict[str, str] = {}
        tables = {}
        for name, entry in entries.items():
            self.tokens[name], hash_ = make_token()
            tables[name] = {"tokens": [hash_], **entry}
        self.identities: Identities = parse_identities(tables, "here")

    def caller(self, name: str) -> Caller:
        return Caller((f"Bearer {self.tokens[name]}",))


class Listening:
    """An api's side of a stream: wants *window* messages, and one more for each that came."""

    def __init__(self, call: Call, window: int) -> None:
        self.call = call
        self.messages: list[bytes] = []
        self.heard: list[str] = []
        call.request(window)

    def on_message(self, message: bytes) -> None:
        self.on_messages((message,))

    def on_messages(self, messages: Sequence[bytes]) -> None:
        self.messages += messages
        self.call.request(len(messages))

    def on_half_close(self) -> None:
        self.heard.append("half-close")

    def on_cancel(self) -> None:
        self.heard.append("cancel")

    def on_drain(self) -> None:
        self.heard.append("drain")


def guarded(access: Access, window: int = 4) -> dict[str, Method]:
    methods = [single(path, lambda call, message: call.answer(message)) for path in (PREDICT, LOAD, HEALTH)]
    methods.append(
        Method(STREAM, lambda call: Listening(call, window), client_streams=True, server_streams=True)
    )
    return access.guard({method.path: method for method in methods})


def refusal(method: Method, caller: Caller) -> BaseException | None:
    return method.refusal(FakeCall(caller=caller))


def test_every_method_that_is_served_has_a_scope() -> None:
    """A new method is to be given one where scopes are defined; else it is the administrators' alone."""
    served = App(Config())._transport.methods  # type: ignore[attr-defined]
    assert {path.decode() for path in served} <= set(module._SCOPES)


def test_who_may_what() -> None:
    people = People(user={"scopes": ["infer"]}, operator={"scopes": ["admin", "read"]})
    methods = guarded(Access(people.identities))
    user, operator = people.caller("user"), people.caller("operator")
    assert refusal(methods[PREDICT], user) is None
    assert refusal(methods[STREAM], user) is None
    assert refusal(methods[LOAD], operator) is None
    for method, caller, text in [
        (LOAD, user, f"'user' has no scope 'admin', which {LOAD} needs"),
        (PREDICT, operator, f"'operator' has no scope 'infer', which {PREDICT} needs"),
    ]:
        found = refusal(methods[method], caller)
        assert isinstance(found, PermissionDenied)
        assert str(found) == text


def test_health_is_for_everybody() -> None:
    """Its methods have no gate: they cost what they cost without identities."""
    assert guarded(Access(People(user={"scopes": ["infer"]}).identities))[HEALTH].gate is None


def test_a_method_without_a_scope_needs_admin() -> None:
    people = People(user={"scopes": ["infer", "read"]}, operator={"scopes": ["admin"]})
    method = Access(people.identities).guard({"/new/Method": Method("/new/Method", FakeCall)})["/new/Method"]
    assert isinstance(refusal(method, people.caller("user")), PermissionDenied)
    assert refusal(method, people.caller("operator")) is None


def test_wrong_credentials_are_nobody_s_and_are_not_shown() -> None:
    people = People(user={"scopes": ["infer"]})
    method = guarded(Access(people.identities))[PREDICT]
    token = people.tokens["user"]
    wrong = [
        (),
        ("",),
        (token,),
        ("Bearer",),
        ("Bearer ",),
        (f"Basic {token}",),
        (f"Bearer {token}x",),
        (f"Bearer  {token}",),
        (f"Bearer {token}", f"Bearer {token}"),
    ]
    for authorization in wrong:
        found = refusal(method, Caller(authorization))
        assert isinstance(found, Unauthenticated), authorization
        assert found.status is Status.UNAUTHENTICATED
        assert token not in str(found)
    assert refusal(method, Caller((f"bearer {token}",))) is None  # RFC 7235: schemes have no case.


def test_a_wrong_token_is_not_made_good_by_a_certificate() -> None:
    identities = parse_identities({"front": {"certificates": ["CN:front"], "scopes": ["infer"]}}, "here")
    method = guarded(Access(identities))[PREDICT]
    certificate = frozenset({"CN:front"})
    assert refusal(method, Caller(certificate=certificate)) is None
    assert isinstance(refusal(method, Caller(("Bearer x",), certificate)), Unauthenticated)
    found = refusal(method, Caller(certificate=frozenset({"CN:other"})))
    assert str(found) == "the client's certificate has no name that is known here, or too many"


def test_a_caller_is_looked_into_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more when the identities were replaced."""
    people = People(user={"scopes": ["infer"]})
    access = Access(people.identities)
    method = guarded(access)[PREDICT]
    looked: list[Caller] = []
    identify = module._identify

    def look(identities: Identities, caller: Caller) -> Any:
        looked.append(caller)
        return identify(identities, caller)

    monkeypatch.setattr(module, "_identify", look)
    caller = people.caller("user")
    for _ in range(10):
        assert refusal(method, caller) is None
    assert len(looked) == 1
    access.replace(people.identities)
    for _ in range(10):
        assert refusal(method, caller) is None
    assert len(looked) == 2


def test_a_rate_is_its_identity_s_whatever_the_connection() -> None:
    people = People(user={"scopes": ["infer"], "requests_per_s": 2, "burst": 3}, other={"scopes": ["infer"]})
    clock = Clock()
    method = guarded(Access(people.identities, clock))[PREDICT]
    for _ in range(3):
        assert refusal(method, people.caller("user")) is None
    found = refusal(method, people.caller("user"))
    assert isinstance(found, RateExceeded)
    assert found.retry_after_s == pytest.approx(0.5)
    assert str(found) == "2 requests a second are allowed here, 3 at once; the next in 0.500 s"
    assert refusal(method, people.caller("other")) is None
    clock.now += 0.5
    assert refusal(method, people.caller("user")) is None


def test_a_reload_gives_nobody_a_fresh_burst_and_changes_rates() -> None:
    people = People(user={"scopes": ["infer"], "requests_per_s": 2, "burst": 1})
    clock = Clock()
    access = Access(people.identities, clock)
    method = guarded(access)[PREDICT]
    assert refusal(method, people.caller("user")) is None
    access.replace(people.identities)
    assert isinstance(refusal(method, people.caller("user")), RateExceeded)
    faster = People(user={"scopes": ["infer"], "requests_per_s": 20, "burst": 5})
    access.replace(faster.identities)
    assert refusal(method, faster.caller("user")) is None
    assert isinstance(refusal(method, people.caller("user")), Unauthenticated)


class Stream:
    """A PredictStream of *name*, behind its gate."""

    def __init__(self, access: Access, caller: Caller, window: int = 4) -> None:
        self.call = FakeCall(caller=caller)
        method = guarded(access, window)[STREAM]
        self.refusal = method.refusal(self.call)
        listener = method.start(self.call)
        assert isinstance(listener, GuardedStream)
        self.listener = listener
        self.inner = listener._listener

    def send(self, n: int) -> None:
        self.listener.on_messages([b"x"] * n)


def test_a_stream_passes_everything_through() -> None:
    people = People(user={"scopes": ["infer"]})
    stream = Stream(Access(people.identities), people.caller("user"))
    assert stream.call.demand == 4
    stream.listener.on_message(b"one")
    stream.listener.on_messages([b"two", b"three"])
    assert stream.inner.messages == [b"one", b"two", b"three"]
    assert stream.call.demand == 7
    inner = stream.inner.call
    inner.reply(b"a")
    inner.reply_all([b"b", b"c"])
    inner.add_metadata(trailing=(("x", "y"),))
    assert stream.call.replies == [b"a", b"b", b"c"]
    assert stream.call.trailing == (("x", "y"),)
    assert (inner.method, inner.peer, inner.metadata, inner.deadline, inner.origin) == (
        stream.call.method,
        stream.call.peer,
        stream.call.metadata,
        stream.call.deadline,
        stream.call.origin,
    )
    stream.listener.on_half_close()
    stream.listener.on_drain()
    stream.listener.on_cancel()
    assert stream.inner.heard == ["half-close", "drain", "cancel"]
    assert not inner.is_cancelled()
    inner.finish()
    assert stream.call.is_finished


def test_a_revoked_token_ends_its_stream_at_the_next_message() -> None:
    people = People(user={"scopes": ["infer"]})
    access = Access(people.identities)
    stream = Stream(access, people.caller("user"))
    stream.send(1)
    access.replace(People(user={"scopes": ["infer"]}).identities)
    stream.send(2)
    assert stream.inner.messages == [b"x"]
    assert isinstance(stream.call.error, Unauthenticated)
    assert stream.inner.heard == ["cancel"]
    stream.send(1)
    stream.listener.on_half_close()
    stream.listener.on_cancel()
    assert stream.inner.messages == [b"x"]
    assert stream.inner.heard == ["cancel"]


def test_a_lost_scope_ends_a_stream_too() -> None:
    people = People(user={"scopes": ["infer"]})
    access = Access(people.identities)
    stream = Stream(access, people.caller("user"))
    hash_ = f"sha256:{hash_of(people.tokens['user']).hex()}"
    access.replace(parse_identities({"user": {"tokens": [hash_], "scopes": ["read"]}}, "here"))
    stream.send(1)
    assert isinstance(stream.call.error, PermissionDenied)


class ByHand:
    """Alarms that the test rings."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Any]] = []

    def after(self, seconds: float, action: Any) -> None:
        self.due.append((seconds, action))

    def ring(self, clock: Clock) -> None:
        (seconds, action), *self.due = self.due
        clock.now += seconds + 1e-9
        action()

    def close(self) -> None:
        pass


def paced(rate: float, burst: int, window: int) -> tuple[Stream, Clock, ByHand]:
    people = People(user={"scopes": ["infer"], "requests_per_s": rate, "burst": burst})
    clock, alarms = Clock(), ByHand()
    access = Access(people.identities, clock)
    access._alarms = alarms  # type: ignore[assignment]
    return Stream(access, people.caller("user"), window), clock, alarms


def test_a_stream_is_read_from_no_faster_than_its_rate() -> None:
    """A client that sends as soon as it is let gets burst + rate * time messages through, and no error."""
    stream, clock, alarms = paced(rate=10, burst=5, window=64)
    assert stream.refusal is None  # Which took one.
    sent, began = 0, clock.now
    for _ in range(100):
        asked = stream.call.demand - sent
        if asked:
            stream.send(asked)
            sent += asked
        elif alarms.due:
            alarms.ring(clock)
    elapsed = clock.now - began
    assert elapsed > 4
    assert 4 + 10 * elapsed - 2 <= sent <= 4 + 10 * elapsed + 1e-6
    assert stream.call.error is None
    assert len(stream.inner.messages) == sent


def test_idle_streams_use_nothing_up() -> None:
    """A stream is asked for what the burst allows, and only what has come is charged."""
    stream, _, alarms = paced(rate=10, burst=5, window=64)
    assert stream.call.demand == 4
    assert not alarms.due  # The next message that comes asks again.
    stream.send(1)
    assert stream.call.demand == 4
    assert stream.inner.messages == [b"x"]


def test_a_stream_that_has_ended_is_not_waited_for() -> None:
    stream, clock, alarms = paced(rate=10, burst=2, window=64)
    stream.send(stream.call.demand)
    assert len(alarms.due) == 1
    stream.listener.on_cancel()
    alarms.ring(clock)
    assert not alarms.due


def test_the_method_of_a_stream_may_take_messages_one_by_one() -> None:
    people = People(user={"scopes": ["infer"]})
    seen: list[bytes] = []

    class OneByOne:
        def __init__(self, call: Call) -> None:
            call.request(2)

        def on_message(self, message: bytes) -> None:
            seen.append(message)

    access = Access(people.identities)
    method = access.guard({STREAM: Method(STREAM, OneByOne, client_streams=True)})[STREAM]  # type: ignore[arg-type]
    listener: Any = method.start(FakeCall(caller=people.caller("user")))
    assert isinstance(listener, GuardedStream)
    listener.on_messages([b"a", b"b"])
    assert seen == [b"a", b"b"]
