"""`nnserver warm` fills the cache; a server that starts afterwards compiles nothing."""

import re
import subprocess
import sys

import numpy as np
import pytest
from support import processes
from support.models import random_mlp
from support.server import NNSERVER, ServerProcess

from nnclient import Client
from nncore import Layer, LayerNorm, Mlp

LINE = re.compile(
    r"nnserver \S+ warm after [0-9.]+ s; ([0-9]+) kernels, ([0-9.]+) MB, in (\S+)\n",
)

# nnserver, and when it has ended, whether it has compiled: Numba imports these only then.
SERVER = """
import sys
from nnserver.cli import main
status = main()
compiled = {"numba.np.arraymath", "scipy.linalg"} & sys.modules.keys()
print(f"compiled: {bool(compiled)}")
sys.exit(status)
"""


def run(cache, *arguments, **settings):
    """(exit status, standard output, standard error) of `nnserver warm` with *arguments*."""
    done = subprocess.run(
        [NNSERVER, "warm", *map(str, arguments)],
        env=processes.environment(cache, **settings),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def said(line):
    """The number of kernels, their megabytes and their folder, as *line* has them."""
    match = LINE.fullmatch(line)
    assert match is not None, line
    return match.groups()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models that want every kernel, and a file of settings that names it."""
    folder = tmp_path_factory.mktemp("models")
    random_mlp(0, (5, 20, 3), "swish").save(folder / "several.safetensors")
    random_mlp(1, (5, 4, 1), "gelu", dtype="float64").save(folder / "single64.safetensors")
    random_mlp(2, (5, 1)).save(folder / "single.safetensors")
    random_mlp(3, (5, 4, 2), "tanh", dtype="float64").save(folder / "several64.safetensors")
    normal = LayerNorm(np.ones(4, np.float32), activation="elu")
    last = Layer(np.ones((4, 3), np.float32), None, "log_softmax")
    Mlp([Layer(np.ones((5, 4), np.float32)), normal, last]).save(folder / "normal.safetensors")
    (folder / "settings.toml").write_text(f'models = ["{folder}"]\n')
    return folder


@pytest.fixture(scope="module")
def warm_cache(tmp_path_factory, models):
    """A cache that `nnserver warm` has filled, and what it printed."""
    cache = tmp_path_factory.mktemp("cache") / "nncore"
    status, out, errors = run(cache, "--config", models / "settings.toml")
    assert (status, errors) == (0, "")
    return cache, out


def test_it_says_where_the_cache_lies_and_how_large_it_is(warm_cache):
    cache, out = warm_cache
    count, megabytes, folder = said(out)
    files = list(cache.rglob("*.code"))
    assert {str(file.parent) for file in files} == {folder}
    assert len(files) == int(count) > 20
    assert float(megabytes) == pytest.approx(sum(file.stat().st_size for file in files) / 1e6, abs=0.051)


def test_a_second_time_there_is_nothing_to_do(warm_cache, models):
    cache, out = warm_cache
    before = processes.files(cache)
    status, again, errors = run(cache, "--config", models / "settings.toml")
    assert (status, errors) == (0, "")
    assert said(again) == said(out)
    assert processes.files(cache) == before


@pytest.mark.parametrize("transport", ["h2", "grpcio"])
def test_a_server_with_a_warm_cache_compiles_nothing(warm_cache, models, transport):
    """Neither at its start nor for the first requests of each kind, of one row or of many."""
    cache, _ = warm_cache
    before = processes.files(cache)
    server = ServerProcess(
        *("--transport", transport, "--config", str(models / "settings.toml")),
        env=processes.environment(cache),
        command=(sys.executable, "-c", SERVER),
    )
    try:
        with Client(server.address) as client:
            for name in ("several", "single", "several64", "single64", "normal"):
                for rows in (1, 7, 500):
                    for dtype in ("float32", "float64"):
                        x = np.ones((rows, 5), dtype)
                        assert len(client.predict(name, x)) == rows
                        assert len(client.predict(name, x, output="probabilities")) == rows
                        assert len(client.predict(name, x, output="labels").indices) == rows
                        assert len(list(client.stream(name, [x, x]))) == 2
    finally:
        assert server.stop() == 0
    assert server.errors == ""
    assert server.out.splitlines()[-1] == "compiled: False"
    assert processes.files(cache) == before


def test_a_folder_that_cannot_be_used_is_an_error_that_says_so(tmp_path):
    """One line, with the reason and what to do."""
    (tmp_path / "file").write_text("")
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    for cache, reason in (
        (tmp_path / "file" / "cache", "File exists"),
        (open_to_all, "others can write"),
    ):
        status, out, errors = run(cache)
        assert (status, out) == (1, "")
        assert errors.startswith("nnserver: error: ")
        assert errors.count("\n") == 1
        for text in (str(cache), reason, "set NNCORE_CACHE_DIR to a folder"):
            assert text in errors


@pytest.mark.parametrize(
    ("arguments", "settings", "text"),
    [
        (("nowhere.safetensors",), {}, "nowhere.safetensors"),
        (("--config", "nowhere.toml"), {}, "cannot read the configuration file nowhere.toml"),
        ((), {"NNCORE_VECTOR_BITS": "99"}, "NNCORE_VECTOR_BITS is '99'; expected 128, 256 or 512"),
        ((), {"NNSERVER_LISTEN": "nonsense"}, "listen is 'nonsense'"),
    ],
)
def test_what_a_server_could_not_start_with_is_an_error_here(tmp_path, arguments, settings, text):
    status, out, errors = run(tmp_path / "cache", *arguments, **settings)
    assert (status, out) == (1, "")
    assert errors.startswith("nnserver: error: ")
    assert errors.count("\n") == 1
    assert text in errors


def test_help_says_what_it_does_and_wrong_flags_exit_with_2(tmp_path):
    status, out, _ = run(tmp_path, "--help")
    assert status == 0
    for text in ("usage: nnserver warm", "--config", "NNCORE_CACHE_DIR", "RUN nnserver warm"):
        assert text in out
    assert run(tmp_path, "--wram")[0] == 2
