"""Files of identities: what they say, and what is refused by name without showing a secret."""

from __future__ import annotations

import hmac
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nnserver.errors import ConfigError
from nnserver.identities import hash_of, line_of, make_token, parse_identities, read_identities
from nnserver.token_command import run

TOKEN, HASH = make_token()


def written(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "tokens.toml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_token_is_long_random_and_not_in_its_line() -> None:
    tokens = {make_token()[0] for _ in range(100)}
    assert len(tokens) == 100
    assert all(token.startswith("nns_") and len(token) == 47 for token in tokens)
    assert TOKEN not in line_of("alice", HASH, ["infer"], None, None)
    assert TOKEN.removeprefix("nns_") not in HASH


def test_a_line_says_what_it_was_made_of(tmp_path: Path) -> None:
    lines = [
        line_of("alice", HASH, ["infer", "read"], 1234567.5, 5_000_000),
        line_of("bob", make_token()[1], ["admin"], None, None),
        line_of("carol", make_token()[1], ["read"], 2, None),
    ]
    found = read_identities(written(tmp_path, "\n".join(lines)))
    alice = found.of_token(TOKEN)
    assert alice is not None
    assert (alice.name, alice.scopes) == ("alice", frozenset({"infer", "read"}))
    assert (alice.requests_per_s, alice.burst) == (1234567.5, 5_000_000)
    assert [(each.name, each.requests_per_s, each.burst) for each in found][1:] == [
        ("bob", None, 1),
        ("carol", 2, 2),
    ]


def test_another_token_is_nobody_s(tmp_path: Path) -> None:
    found = read_identities(written(tmp_path, line_of("alice", HASH, ["infer"], None, None)))
    for wrong in ("", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), HASH, "é\udcff", "\0" * 4000):
        assert found.of_token(wrong) is None


def test_hashes_are_compared_by_compare_digest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens whose hashes begin alike are told apart by it, and by nothing else."""
    found = parse_identities({"alice": {"tokens": [HASH], "scopes": ["infer"]}}, "here")
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert found.of_token(TOKEN) is None
    assert compared == [(hash_of(TOKEN), hash_of(TOKEN))]


def test_both_tokens_are_good_while_one_is_replaced() -> None:
    new, new_hash = make_token()
    found = parse_identities({"alice": {"tokens": [HASH, new_hash], "scopes": ["infer"]}}, "here")
    assert found.of_token(TOKEN) is found.of_token(new) is not None


def test_a_certificate_is_known_by_any_of_its_names() -> None:
    entry = {"certificates": ["CN:front", "URI:spiffe://prod/front"], "scopes": ["infer"]}
    other = {"certificates": ["DNS:back.internal"], "scopes": ["infer"]}
    found = parse_identities({"front": entry, "back": other}, "here")
    assert found.have_certificates
    for names in (
        {"CN:front"},
        {"URI:spiffe://prod/front", "DNS:x"},
        {"CN:front", "URI:spiffe://prod/front"},
    ):
        identity = found.of_certificate(names)
        assert identity is not None
        assert identity.name == "front"
    for names in ({"CN:other"}, {"DNS:front"}, set(), {"CN:front", "DNS:back.internal"}):
        assert found.of_certificate(names) is None


GOOD: dict[str, Any] = {"tokens": [HASH], "scopes": ["infer"]}


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"a b": GOOD}, "'a b' in FILE is no identity's name; expected letters, digits, - and _"),
        ({"alice": "x"}, "alice in FILE is 'x'; expected { tokens = […], scopes = […] }"),
        ({"alice": {**GOOD, "scope": 1}}, "identity alice in FILE has an unknown scope; known: tokens, "),
        ({"alice": {"scopes": ["infer"]}}, "identity alice in FILE has neither tokens nor certificates"),
        ({"alice": {"tokens": HASH, "scopes": []}}, "tokens of alice in FILE is not a list of texts"),
        (
            {"alice": {"tokens": [HASH]}},
            "identity alice in FILE has no scopes; expected some of infer, read,",
        ),
        ({"alice": {**GOOD, "scopes": ["all"]}}, "identity alice in FILE has the scope 'all'; expected some"),
        ({"alice": {**GOOD, "requests_per_s": 0}}, "requests_per_s of alice in FILE is 0; expected a number"),
        ({"alice": {**GOOD, "requests_per_s": float("nan")}}, "requests_per_s of alice in FILE is nan; exp"),
        ({"alice": {**GOOD, "requests_per_s": True}}, "requests_per_s of alice in FILE is True; expected"),
        ({"alice": {**GOOD, "burst": 2}}, "identity alice in FILE has a burst and no requests_per_s"),
        (
            {"alice": {**GOOD, "requests_per_s": 1, "burst": 0}},
            "burst of alice in FILE is 0; expected a whole",
        ),
        (
            {"alice": {"certificates": ["front"], "scopes": ["infer"]}},
            "identity alice in FILE has the certificate 'front'; expected CN:…, DNS:…, URI:… or EMAIL:…",
        ),
        ({"alice": GOOD, "bob": GOOD}, "identities alice and bob in FILE share a token"),
    ],
)
def test_a_wrong_entry_is_named(entries: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_identities(entries, "FILE")
    assert str(caught.value).startswith(text)


def test_a_token_in_place_of_its_hash_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_identities({"alice": {"tokens": [TOKEN], "scopes": ["infer"]}}, "FILE")
    assert str(caught.value).startswith("identity alice in FILE has a token that is not sha256: and 64 ")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o601, 0o620, 0o660])
def test_a_file_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path, line_of("alice", HASH, ["infer"], None, None), mode)
    with pytest.raises(ConfigError) as caught:
        read_identities(path)
    assert str(caught.value) == f"tokens {path} can be read or written by others; run `chmod 600 {path}`"


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_a_file_that_the_group_may_read_is_taken(tmp_path: Path, mode: int) -> None:
    """So a container's user is given a cluster's secrets."""
    assert len(read_identities(written(tmp_path, line_of("alice", HASH, ["infer"], None, None), mode))) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, line_of("alice", HASH, ["infer"], None, None))
    os.chown(path, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        read_identities(path)


def test_a_file_that_is_not_there_not_toml_or_empty_is_refused(tmp_path: Path) -> None:
    """An empty file, too: one that is cut short must not lock everybody out."""
    with pytest.raises(ConfigError, match=r"^cannot read tokens .*nowhere: No such file"):
        read_identities(str(tmp_path / "nowhere"))
    for text, reason in [
        ("alice = {", "is not TOML"),
        ("", "has no identity in it"),
        ("# none", "has no ident"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            read_identities(written(tmp_path, text))
    (tmp_path / "tokens.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_identities(str(tmp_path / "tokens.toml"))


def test_the_command_prints_a_token_and_the_line_that_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["nightly", "--scopes", "infer, read", "--requests-per-s", "0.5", "--burst", "3"]) == 0
    printed = capsys.readouterr()
    token, line = printed.out.splitlines()
    found = parse_identities(tomllib.loads(line), "the output")
    identity = found.of_token(token)
    assert identity is not None
    assert (identity.name, identity.scopes, identity.requests_per_s, identity.burst) == (
        "nightly",
        frozenset({"infer", "read"}),
        0.5,
        3,
    )
    assert token not in line
    assert token not in printed.err


@pytest.mark.parametrize(
    "argv", [["a.b"], ["alice", "--scopes", "all"], ["alice", "--burst", "3"], ["alice", "--scopes", ""]]
)
def test_the_command_makes_no_line_that_the_server_would_refuse(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError):
        run(argv)
    assert capsys.readouterr().out == ""
