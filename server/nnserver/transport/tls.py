"""PEM files in, what each transport needs for TLS out."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnserver.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of the server; with *client_ca*, clients must show a certificate that it signed."""

    certificate: str
    key: str
    client_ca: str = ""


def ssl_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a context for HTTP/2 (ALPN h2, TLS 1.2 or newer); raises ConfigError for unfit files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # RFC 9113, 9.2.2: TLS 1.2 with forward secrecy and an AEAD only.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    # RFC 9113, 9.2.1: no renegotiation.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2"])
    _read(files.certificate, "tls_certificate")
    _read(files.key, "tls_key")
    try:
        context.load_cert_chain(files.certificate, files.key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"tls_certificate {files.certificate} and tls_key {files.key} are not a PEM certificate "
            f"and its unencrypted key: {error}"
        ) from None
    if files.client_ca:
        _read(files.client_ca, "tls_client_ca")
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"tls_client_ca {files.client_ca} holds no PEM certificates: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def valid_until(files: TlsFiles) -> str:
    """Return until when the server's certificate is valid; raises ConfigError if that is not now."""
    # Python reads a certificate's dates only of a peer: the server shakes hands with itself.
    server = ssl_context(TlsFiles(files.certificate, files.key))
    client = ssl.create_default_context(cafile=files.certificate)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (asking, answering, asking):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(f"tls_certificate {files.certificate}: {error.verify_message}") from None
    return str((asking.getpeercert() or {})["notAfter"])


class GrpcCredentials:
    """grpcio's server credentials of PEM files, which others may take the place of while it serves."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises ConfigError for unfit files."""
        import grpc

        # Of another configuration than the last one given, the core asks with each handshake.
        self._given = self._current = _grpc_configuration(files)
        self.credentials: Any = grpc.dynamic_ssl_server_credentials(
            self._current, self._newer, require_client_authentication=bool(files.client_ca)
        )

    def renew(self, files: TlsFiles) -> None:
        """Use *files* for new connections; raises ConfigError, and changes nothing, if they are unfit."""
        self._current = _grpc_configuration(files)

    def _newer(self) -> Any:
        """Return what is to be used from now on, if it is not in use."""
        current = self._current
        if current is self._given:
            return None
        self._given = current
        return current


def _grpc_configuration(files: TlsFiles) -> Any:
    import grpc

    ssl_context(files)  # grpcio says nothing of an unfit file until a client connects.
    return grpc.ssl_server_certificate_configuration(
        [(_read(files.key, "tls_key"), _read(files.certificate, "tls_certificate"))],
        root_certificates=_read(files.client_ca, "tls_client_ca") if files.client_ca else None,
    )


def certificate_names(peer: Mapping[str, Any] | None) -> frozenset[str]:
    """
    Return the names in a verified certificate, as `Caller` has them.

    peer: what ssl's getpeercert() tells.
    """
    if not peer:
        return frozenset()
    subject = [value for part in peer.get("subject", ()) for name, value in part if name == "commonName"]
    names = [("CN", value) for value in subject[:1]]
    kinds = {"DNS": "DNS", "URI": "URI", "email": "EMAIL"}
    names += [(kinds[kind], value) for kind, value in peer.get("subjectAltName", ()) if kind in kinds]
    return frozenset(f"{kind}:{value}" for kind, value in names)


def names_of_grpc(properties: Mapping[str, Iterable[bytes]]) -> frozenset[str]:
    """Return the same from *properties*, what grpcio's auth_context() tells."""
    kinds = {"x509_common_name": "CN", "peer_dns": "DNS", "peer_uri": "URI", "peer_email": "EMAIL"}
    return frozenset(
        f"{kind}:{value.decode('utf-8', 'replace')}"
        for name, kind in kinds.items()
        for value in properties.get(name, ())
    )


def _read(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {setting} {path}: {error.strerror}") from None
