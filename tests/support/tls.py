"""Names in, certificates out: an authority of the test's own, made with the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """Signs certificates; *certificate* is its own, in *folder*."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.certificate = folder / "authority.pem"
        self._key = folder / "authority.key"
        _openssl(
            *("req", "-x509", *_NEW_KEY, "-days", "2", "-subj", "/CN=authority"),
            *("-keyout", str(self._key), "-out", str(self.certificate)),
        )

    def sign(self, name: str, days: int = 2) -> tuple[Path, Path]:
        """Return files with the certificate and key of *name*; with *days* below 0 it has expired."""
        certificate, key, asked = (self._folder / f"{name}.{end}" for end in ("pem", "key", "csr"))
        names = self._folder / f"{name}.names"
        names.write_text(f"subjectAltName=DNS:{name},IP:127.0.0.1\n")
        _openssl("req", *_NEW_KEY, "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(asked))
        _openssl(
            *("x509", "-req", "-in", str(asked), "-CA", str(self.certificate), "-CAkey", str(self._key)),
            *("-CAcreateserial", "-days", str(days), "-extfile", str(names), "-out", str(certificate)),
        )
        return certificate, key


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
