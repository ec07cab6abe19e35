"""Tokens: where they go, where they must not, and that nothing shows them."""

from __future__ import annotations

import argparse
from pathlib import Path

import grpc
import pytest

from nnclient import AsyncClient, Client, InvalidInput
from nnclient.load.plan import LoadPlan
from nnclient.options import Options
from nnclient.tokens import is_this_machine, token_of

TOKEN = "nns_secret"
TLS = grpc.ssl_channel_credentials()


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:1",
        "127.5.0.1:1",
        "localhost:1",
        "[::1]:1",
        "unix:/run/x",
        "unix-abstract:x",
        "ipv4:127.0.0.1:1",
    ],
)
def test_to_this_machine_a_token_needs_no_tls(target: str) -> None:
    assert Options.make(target=target, token=TOKEN).metadata == (("authorization", f"Bearer {TOKEN}"),)


@pytest.mark.parametrize(
    "target",
    [
        "example.org:1",
        "10.0.0.1:1",
        "127.example.org:1",
        "localhost.example.org:1",
        "dns:///localhost:1",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "[::2]:1",
    ],
)
def test_to_another_machine_it_goes_over_tls_only(target: str) -> None:
    assert not is_this_machine(target)
    for client in (Client, AsyncClient):
        with pytest.raises(InvalidInput, match=r"would travel to .* in clear text; use TLS") as caught:
            client(target, token=TOKEN)
        assert TOKEN not in str(caught.value)
    assert Options.make(target=target, token=TOKEN, credentials=TLS).metadata
    assert Options.make(target=target, token=TOKEN, allow_insecure_token=True).metadata


@pytest.mark.parametrize("token", ["", "two words", "x\n", "ü", "x\0"])
def test_what_is_no_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(InvalidInput, match=r"^the token is empty or has characters in it that no token has"):
        Options.make(token=token)


def test_a_token_and_an_authorization_exclude_each_other() -> None:
    with pytest.raises(InvalidInput, match="metadata has an authorization already"):
        Options.make(token=TOKEN, metadata={"Authorization": "Bearer other"})


def test_nothing_prints_it() -> None:
    """Options and plans end up in logs and tracebacks."""
    assert TOKEN not in repr(Options.make(token=TOKEN))
    assert TOKEN not in repr(LoadPlan(target="localhost:1", model="m", token=TOKEN))


def test_the_file_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert token_of(argparse.Namespace(token_file=None)) is None
    monkeypatch.setenv("NNCLIENT_TOKEN", "nns_other")
    assert token_of(argparse.Namespace(token_file=None)) == "nns_other"
    assert token_of(argparse.Namespace(token_file=str(file))) == TOKEN
    file.write_text("\n")
    with pytest.raises(InvalidInput, match="has no token in it"):
        token_of(argparse.Namespace(token_file=str(file)))
