"""
Which transport, address and certificates in, a server of TestService out, until SIGTERM.

    python -m interop.server --transport h2 --listen 127.0.0.1:0
"""

from __future__ import annotations

import argparse
import signal
import threading

from interop.service import methods

from nnserver.transport.grpcio_server import GrpcioOptions, GrpcioServer
from nnserver.transport.h2_server import H2Options, H2Server
from nnserver.transport.tls import TlsFiles


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--transport", choices=("h2", "grpcio"), required=True)
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--tls-certificate")
    parser.add_argument("--tls-key")
    parser.add_argument("--tls-client-ca", default="")
    options = parser.parse_args()
    tls = None
    if options.tls_certificate:
        tls = TlsFiles(options.tls_certificate, options.tls_key, options.tls_client_ca)
    server = _server(options.transport, options.listen, tls)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    print(f"interop ready on {server.start()}; {options.transport}", flush=True)
    ended.wait()
    server.drain(grace_s=10.0)


def _server(transport: str, listen: str, tls: TlsFiles | None) -> H2Server | GrpcioServer:
    size, streams, calls = 16 << 20, 256, 1024
    if transport == "h2":
        return H2Server(methods(), lambda: None, H2Options(listen, size, streams, calls, tls=tls))
    options = GrpcioOptions(listen, size, 8, streams, calls, tls=tls)
    return GrpcioServer(methods(), lambda: None, options)


if __name__ == "__main__":
    main()
