"""`nnserver --check`: one line a thing, status 0 or 2, and nothing served."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.identities import TokenFile
from support.server import NNSERVER
from support.tls import Authority

import nncore
from nnserver.check import check


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_what_is_fit_is_said_to_be(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = authority.sign("localhost")
    file = TokenFile(tmp_path / "tokens.toml")
    token = file.add("alice", "infer", "read")
    nncore.Mlp([nncore.Layer(np.eye(2, dtype=np.float32))]).save(tmp_path / "eye.safetensors")
    config = tmp_path / "server.toml"
    config.write_text(
        f"models = ['{tmp_path}/eye.safetensors']\ntls_certificate = '{certificate}'\ntls_key = '{key}'\n"
    )
    assert check(["--check", "--config", str(config), "--tokens", str(file.path)], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "settings      ok: serves on 127.0.0.1:50051 by h2"
    assert re.fullmatch(
        rf"certificates  ok: {certificate}, valid until \w{{3}} .+ GMT; clients show none", lines[2]
    )
    assert lines[3:] == [
        "tokens        ok: alice (infer read)",
        "models        ok: eye 1",
    ]
    assert token not in "".join(lines)


def test_one_fault_does_not_hide_the_next(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, _ = authority.sign("localhost")
    _, other_key = authority.sign("other")
    tokens = tmp_path / "tokens.toml"
    tokens.touch(0o644)
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense" * 10)
    arguments = ["--tls-certificate", str(certificate), "--tls-key", str(other_key), "--tokens", str(tokens)]
    assert check([str(tmp_path), *arguments], {}) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(
        f"certificates  error: tls_certificate {certificate} and tls_key {other_key} are "
    )
    assert lines[3].startswith(f"tokens        error: tokens {tokens} can be read or written by others; ")
    assert lines[4].startswith("models        error: ")
    assert "bad.safetensors" in lines[4]


def test_a_certificate_that_has_expired_is_not_fit(
    authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = authority.sign("old", days=-1)
    assert check(["--tls-certificate", str(certificate), "--tls-key", str(key)], {}) == 2
    printed = capsys.readouterr().out
    assert f"certificates  error: tls_certificate {certificate}: certificate has expired" in printed


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--listen", "nonsense"], "listen is 'nonsense'; expected HOST:PORT or unix:PATH"),
        (["--config", "nowhere.toml"], "cannot read the configuration file nowhere.toml"),
        (["--model-control", "--listen", "0.0.0.0:1"], "model_control lets whoever reaches 0.0.0.0:1 load"),
    ],
)
def test_wrong_settings_are_named(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(argv, {}) == 2
    assert capsys.readouterr().out.startswith(f"settings      error: {text}")


def test_the_command_serves_nothing(tmp_path: Path) -> None:
    """It leaves no socket behind, and its status says what it found."""
    listen = f"unix:{tmp_path}/socket"
    for more, status in [((), 0), (("nowhere.safetensors",), 2)]:
        done = subprocess.run(
            [NNSERVER, "--check", "--listen", listen, *more], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status
        assert done.stderr == ""
        assert "models " in done.stdout
    assert os.listdir(tmp_path) == []
