"""Names, scopes and rates in; tokens, and a file of identities for --tokens, out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nnserver.identities import line_of, make_token


class TokenFile:
    """A file of identities that a test adds to and takes from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, str] = {}

    def add(self, name: str, *scopes: str, rate: float | None = None, burst: int | None = None) -> str:
        """Add *name* and return its token."""
        token, hash_ = make_token()
        self._lines[name] = line_of(name, hash_, scopes, rate, burst)
        self._write()
        return token

    def add_certificate(self, name: str, certificate: str, *scopes: str) -> None:
        """Add *name*, which is known by a certificate."""
        listed = ", ".join(f'"{scope}"' for scope in scopes)
        self._lines[name] = f'{name} = {{ certificates = ["{certificate}"], scopes = [{listed}] }}'
        self._write()

    def remove(self, name: str) -> None:
        del self._lines[name]
        self._write()

    def _write(self) -> None:
        self.write("".join(f"{line}\n" for line in self._lines.values()))

    def write(self, text: str) -> None:
        """Put *text* in the file's place, at once, as an editor does."""
        new = self.path.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(text)
        os.replace(new, self.path)


def bearer(token: str) -> Any:
    """Metadata of a call that carries *token*."""
    return (("authorization", f"Bearer {token}"),)
