"""
A file of identities in; who may call, what for and how often out. Tokens are made here, too.

    alice = { tokens = ["sha256:9f86d0…"], scopes = ["infer", "read"] }
    batch = { tokens = ["sha256:60303a…"], scopes = ["infer"], requests_per_s = 100, burst = 200 }

    [frontend]
    certificates = ["CN:frontend", "DNS:frontend.internal", "URI:spiffe://prod/frontend"]
    scopes = ["infer"]

A token is 256 random bits, so a plain hash of it is as good at rest as a slow one, and costs a microsecond.
An identity may have several tokens: while one is replaced, the old and the new are good.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nnserver.errors import ConfigError

INFER, READ, ADMIN = SCOPES = ("infer", "read", "admin")

# What keys without quotes are made of in TOML.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_CERTIFICATE = re.compile(r"(CN|DNS|URI|EMAIL):.+")
_KEYS = ("tokens", "certificates", "scopes", "requests_per_s", "burst")
# By so much of their hashes tokens are found. It is no secret which hashes begin alike: what a caller
# learned of one would be a guess at the hash, not at the token.
_INDEX_BYTES = 4
# For scanners that look for secrets in source code.
_TOKEN_PREFIX = "nns_"
_TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True)
class Identity:
    """Someone who may call; *requests_per_s* None: as often as they like."""

    name: str
    scopes: frozenset[str]
    requests_per_s: float | None = None
    burst: int = 1


class Identities:
    """Identities, found by what a caller shows."""

    def __init__(self) -> None:
        self._all: list[Identity] = []
        self._by_hash: dict[bytes, list[tuple[bytes, Identity]]] = {}
        self._by_certificate: dict[str, Identity] = {}

    def __iter__(self) -> Iterator[Identity]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def have_certificates(self) -> bool:
        """Whether any is known by its certificate."""
        return bool(self._by_certificate)

    def add(self, identity: Identity, hashes: Iterable[bytes], certificates: Iterable[str]) -> None:
        """Add one that is known by tokens of these *hashes* and by these *certificates*."""
        self._all.append(identity)
        for whole in hashes:
            self._by_hash.setdefault(whole[:_INDEX_BYTES], []).append((whole, identity))
        for certificate in certificates:
            self._by_certificate[certificate] = identity

    def of_token(self, token: str) -> Identity | None:
        """Return whose *token* it is."""
        found = None
        ours = hash_of(token)
        for whole, identity in self._by_hash.get(ours[:_INDEX_BYTES], ()):
            if hmac.compare_digest(whole, ours):
                found = identity
        return found

    def of_certificate(self, names: Iterable[str]) -> Identity | None:
        """Return whose certificate has these *names*; None, too, if they are names of several."""
        found = {self._by_certificate[name] for name in names if name in self._by_certificate}
        return found.pop() if len(found) == 1 else None


def make_token() -> tuple[str, str]:
    """Return a new token, and its hash as the file has it."""
    token = _TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    return token, f"sha256:{hash_of(token).hex()}"


def hash_of(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def line_of(
    name: str, hash_: str, scopes: Iterable[str], requests_per_s: float | None, burst: int | None
) -> str:
    """Return the line of a file for one identity with one token; raises ConfigError for what cannot be."""
    entry: dict[str, Any] = {"tokens": [hash_], "scopes": list(scopes)}
    if requests_per_s is not None:
        entry["requests_per_s"] = (
            int(requests_per_s) if float(requests_per_s).is_integer() else requests_per_s
        )
    if burst is not None:
        entry["burst"] = burst
    parse_identities({name: entry}, "the command line")
    # JSON's texts, numbers and lists are TOML's as well.
    return f"{name} = {{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in entry.items())} }}"


def read_identities(path: str) -> Identities:
    """Return the identities in the file at *path*; raises ConfigError, naming the entry that is wrong."""
    try:
        with open(path, "rb") as file:
            _refuse_shared(path, os.fstat(file.fileno()))
            text = file.read().decode()
    except OSError as error:
        raise ConfigError(f"cannot read tokens {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"tokens {path} is not UTF-8: {error.reason}") from None
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"tokens {path} is not TOML: {error}") from None
    if not found:
        # A file that is cut short must not lock everybody out of a server that runs.
        raise ConfigError(f"tokens {path} has no identity in it; `nnserver token NAME` makes one")
    return parse_identities(found, path)


def parse_identities(found: Mapping[str, Any], where: str) -> Identities:
    """Return the identities that *found*, the tables of the file *where*, describes; raises ConfigError."""
    identities = Identities()
    owners: dict[str, str] = {}
    for name, entry in found.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name[:80]!r} in {where} is no identity's name; expected letters, digits, - and _"
            )
        if not isinstance(entry, dict):
            raise ConfigError(f"{name} in {where} is {entry!r}; expected {{ tokens = […], scopes = […] }}")
        for key in entry:
            if key not in _KEYS:
                raise ConfigError(
                    f"identity {name} in {where} has an unknown {key}; known: {', '.join(_KEYS)}"
                )
        tokens = _texts(entry, "tokens", name, where)
        certificates = _texts(entry, "certificates", name, where)
        if not tokens and not certificates:
            raise ConfigError(f"identity {name} in {where} has neither tokens nor certificates")
        for token in tokens:
            if not _HASH.fullmatch(token):
                # Not shown: it may be a token that was put here in place of its hash.
                raise ConfigError(
                    f"identity {name} in {where} has a token that is not sha256: and 64 hexadecimal digits; "
                    "`nnserver token` prints the line"
                )
        for certificate in certificates:
            if not _CERTIFICATE.fullmatch(certificate):
                raise ConfigError(
                    f"identity {name} in {where} has the certificate {certificate!r}; expected CN:…, DNS:…, "
                    "URI:… or EMAIL:…"
                )
        for shown in (*tokens, *certificates):
            if owners.setdefault(shown, name) != name:
                what = "a token" if shown in tokens else f"the certificate {shown}"
                raise ConfigError(f"identities {owners[shown]} and {name} in {where} share {what}")
        hashes = [bytes.fromhex(token.removeprefix("sha256:")) for token in tokens]
        identities.add(_identity(name, entry, where), hashes, certificates)
    return identities


def _identity(name: str, entry: Mapping[str, Any], where: str) -> Identity:
    scopes = _texts(entry, "scopes", name, where)
    for scope in scopes:
        if scope not in SCOPES:
            raise ConfigError(
                f"identity {name} in {where} has the scope {scope!r}; expected some of {', '.join(SCOPES)}"
            )
    if not scopes:
        raise ConfigError(f"identity {name} in {where} has no scopes; expected some of {', '.join(SCOPES)}")
    rate = entry.get("requests_per_s")
    if rate is not None and not (type(rate) in (int, float) and 1e-3 <= rate <= 1e9):
        raise ConfigError(
            f"requests_per_s of {name} in {where} is {rate!r}; expected a number in [0.001, 1e9]"
        )
    burst = entry.get("burst")
    if burst is None:
        return Identity(name, frozenset(scopes), rate, max(1, round(rate or 1)))
    if type(burst) is not int or burst < 1:
        raise ConfigError(f"burst of {name} in {where} is {burst!r}; expected a whole number, at least 1")
    if rate is None:
        raise ConfigError(f"identity {name} in {where} has a burst and no requests_per_s")
    return Identity(name, frozenset(scopes), rate, burst)


def _texts(entry: Mapping[str, Any], key: str, name: str, where: str) -> list[str]:
    value = entry.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{key} of {name} in {where} is not a list of texts")
    return value


def _refuse_shared(path: str, found: os.stat_result) -> None:
    """Raise ConfigError if others could read the file or put identities of their own into it."""
    if not hasattr(os, "geteuid"):
        return
    # The group may read: so a container's user is given the secrets of a cluster.
    if found.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(f"tokens {path} can be read or written by others; run `chmod 600 {path}`")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"tokens {path} belongs to another user; expected this one or root")
