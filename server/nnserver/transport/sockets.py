"""HOST:PORT or unix:PATH in, listening sockets out."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from nnserver.errors import ConfigError


def bind(listen: str, *, reuse_port: bool = False) -> list[socket.socket]:
    """
    Return sockets bound to every address that *listen* names, not yet listening.

    reuse_port: share the port with other sockets that were bound so. Unix sockets cannot be shared.
    Raises ConfigError, saying why the address cannot be had.
    """
    try:
        if listen.startswith("unix:"):
            return [_bind_unix(listen.removeprefix("unix:"))]
        return _bind_tcp(listen, reuse_port)
    except (OSError, ValueError) as error:  # A name that is no name, or holds a zero byte: ValueError.
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {listen}: {reason}") from error


def require_free(listen: str, *, reuse_port: bool = False) -> None:
    """Raise ConfigError, as bind does, if *listen* cannot be had; for who must bind by other means."""
    for sock in bind(listen, reuse_port=reuse_port):
        sock.close()
    unlink(listen)


def unlink(listen: str) -> None:
    """Remove the socket of a Unix address that is listened on no more; nothing to do for others."""
    if listen.startswith("unix:"):
        with contextlib.suppress(OSError):
            os.unlink(listen.removeprefix("unix:"))


def printable_address(listen: str, sock: socket.socket) -> str:
    """Return *listen* with the port that *sock* really has."""
    if listen.startswith("unix:"):
        return listen
    return f"{listen.rpartition(':')[0]}:{sock.getsockname()[1]}"


def _bind_tcp(listen: str, reuse_port: bool) -> list[socket.socket]:
    host, _, port = listen.rpartition(":")
    found = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
    )
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                # Its own family only: the IPv4 address, if it was meant, is in the list too.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if int(port) == 0 and len(sockets) > 1:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            sock.bind(address)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_over(path):
            os.unlink(path)
        sock.bind(path)
    except (OSError, ValueError):
        sock.close()
        raise
    return sock


def _is_left_over(path: str) -> bool:
    """Whether *path* is a socket that nobody listens on any more."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(Path(path).stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                # Not blocking: a server whose backlog is full is alive, and so is one that is not ours.
                probe.setblocking(False)
                return probe.connect_ex(path) == errno.ECONNREFUSED
    return False
