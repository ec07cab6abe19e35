"""Addresses as a user may write them, and sockets that others have left behind or still use."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nnserver.errors import ConfigError
from nnserver.transport.sockets import bind, printable_address, require_free, unlink


def closed(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def test_port_0_is_printed_as_the_one_chosen() -> None:
    sockets = bind("127.0.0.1:0")
    assert printable_address("127.0.0.1:0", sockets[0]) == f"127.0.0.1:{sockets[0].getsockname()[1]}"
    closed(sockets)


def test_every_address_of_a_name_gets_the_same_port() -> None:
    sockets = bind("localhost:0")
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    closed(sockets)


def test_a_port_in_use_is_refused_not_shared() -> None:
    """SO_REUSEPORT is off: a second server must not take half of the connections."""
    sockets = bind("127.0.0.1:0")
    sockets[0].listen()
    address = printable_address("127.0.0.1:0", sockets[0])
    assert sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
    with pytest.raises(ConfigError, match=f"cannot listen on {address}: Address already in use"):
        bind(address)
    closed(sockets)


def test_a_port_is_shared_by_those_who_say_so() -> None:
    """With reuse_port on both sides, two listen on one port; who does not say so is refused."""
    first = bind("127.0.0.1:0", reuse_port=True)
    first[0].listen()
    address = printable_address("127.0.0.1:0", first[0])
    second = bind(address, reuse_port=True)
    second[0].listen()
    with pytest.raises(ConfigError, match="Address already in use"):
        bind(address)
    closed([*first, *second])


@pytest.mark.parametrize(
    "listen",
    [
        "no.such.host.invalid:1",
        "192.0.2.1:1",
        "x" * 70 + ":1",
        "unix:/no/such/folder/s",
        f"unix:/{'x' * 200}",
    ],
)
def test_an_address_that_cannot_be_had_is_named(listen: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on "):
        bind(listen)


def test_a_zero_byte_in_a_path_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen on "):
        bind(f"unix:{tmp_path}/a\0b")


def test_a_socket_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/s"
    first = bind(listen)
    first[0].listen()
    closed(first)
    assert (tmp_path / "s").is_socket()
    closed(bind(listen))


def test_a_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/s"
    first = bind(listen)
    first[0].listen()
    with pytest.raises(ConfigError, match="Address already in use"):
        bind(listen)
    closed(first)


def test_a_server_too_busy_to_answer_keeps_its_socket(tmp_path: Path) -> None:
    """With its backlog full, a live server refuses a probe with another error than a dead one."""
    listen = f"unix:{tmp_path}/s"
    first = bind(listen)
    first[0].listen(0)
    waiting = []
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        waiting.append(sock)
        if sock.connect_ex(f"{tmp_path}/s"):
            break
    with pytest.raises(ConfigError, match="Address already in use"):
        bind(listen)
    assert (tmp_path / "s").is_socket()
    closed([*first, *waiting])


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ConfigError, match="Address already in use"):
        bind(f"unix:{tmp_path}/s")
    assert (tmp_path / "s").read_text() == "precious"


def test_require_free_leaves_nothing_behind(tmp_path: Path) -> None:
    require_free(f"unix:{tmp_path}/s")
    assert not (tmp_path / "s").exists()
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    require_free("127.0.0.1:0")
    assert not files or len(os.listdir("/proc/self/fd")) == files


def test_unlink_is_content_with_what_is_gone(tmp_path: Path) -> None:
    unlink(f"unix:{tmp_path}/s")
    unlink("127.0.0.1:1")
