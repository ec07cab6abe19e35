"""Compiled code comes from the cache where it can, is compiled where it cannot, and is never another's."""

import errno
import hashlib
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import types
from support import processes

import nncore
from nncore import compilation
from nncore.compilation import compile_for, kernel

DIGITS = Path(nncore.__file__).parents[1] / "server" / "nnserver" / "models" / "digits.safetensors"
SIGNATURE = (types.float64,)


def triple(x):
    return 3.0 * x


def negative(x):
    return -x


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder for this process; the folder itself is not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NNCORE_CACHE_DIR", str(folder))
    monkeypatch.setattr(compilation, "_not_kept", {})
    return folder


def compiled(function=triple):
    """*function*, as a process that has not seen it yet compiles or loads it; and whether it was loaded."""
    dispatcher = compile_for(kernel(function), SIGNATURE)
    assert dispatcher(2.5) == function(2.5)
    return sum(dispatcher.stats.cache_hits.values()) == 1


def only_file(cache):
    (file,) = cache.rglob("*.code")
    return file


def test_code_is_compiled_once(cache):
    """The second time it is loaded; the file is not written again."""
    assert not compiled()
    before = processes.files(cache)
    assert compiled()
    assert processes.files(cache) == before
    assert compilation.cache_content().files == 1
    assert compilation.cache_content().nbytes == only_file(cache).stat().st_size
    assert compilation.not_kept() == {}


def signed(payload):
    return hashlib.sha256(payload).digest() + payload


DAMAGES = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "half its hash": lambda content: content[:16],
    "nothing but its hash": lambda content: content[:32],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut by a byte": lambda content: content[:-1],
    "a byte too long": lambda content: content + b"\0",
    "a flipped bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "garbage": lambda content: os.urandom(len(content)),
    "zeros": lambda content: bytes(len(content)),
    "no pickle, well signed": lambda content: signed(b"garbage"),
    "another pickle, well signed": lambda content: signed(pickle.dumps(None)),
    "half a pickle, well signed": lambda content: signed(content[32 : len(content) // 2]),
    "another machine's, well signed": lambda content: signed(
        pickle.dumps(("0" * 64, pickle.loads(content[32:])[1]))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_compiled_again(cache, damage):
    """Whatever is wrong with a file, the answer is right and the file is whole afterwards."""
    compiled()
    file = only_file(cache)
    file.write_bytes(damage(file.read_bytes()))
    assert not compiled()
    assert compiled()


def test_another_function_s_file_is_not_loaded(cache):
    """A file that is renamed is taken for what it says it is, not for what it is called."""
    compiled(negative)
    other = only_file(cache)
    compiled(triple)
    (own,) = set(cache.rglob("*.code")) - {other}
    shutil.copy(other, own)
    # Same signature, same machine: only the name is left to tell them apart.
    assert not compiled(triple)
    assert compiled(negative)


def failing(number):
    def fail(*arguments, **settings):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("nncore.compilation.os.replace", errno.ENOSPC),
        ("nncore.compilation.os.replace", errno.EROFS),
        ("nncore.compilation.tempfile.mkstemp", errno.EROFS),
        ("nncore.compilation.Path.mkdir", errno.EACCES),
    ],
)
def test_where_nothing_can_be_written_code_is_compiled(cache, monkeypatch, caplog, where, number):
    """A full or read-only disk: no error, no remains; the log and not_kept() say why."""
    monkeypatch.setattr(where, failing(number))
    with caplog.at_level(logging.INFO, "nncore.compilation"):
        assert not compiled()
        assert not compiled()
    assert processes.files(cache.parent) == {}
    assert set(compilation.not_kept().values()) == {os.strerror(number)}
    assert os.strerror(number) in caplog.text


def test_a_folder_below_a_file_is_no_folder(cache, monkeypatch):
    """Such a path can be neither read nor made, by root either."""
    cache.write_text("")
    monkeypatch.setenv("NNCORE_CACHE_DIR", str(cache / "below"))
    assert not compiled()
    assert not compiled()
    (reason,) = compilation.not_kept().values()
    assert reason in (os.strerror(errno.ENOTDIR), os.strerror(errno.EEXIST))


def test_a_full_cache_that_cannot_be_written_to_is_read(cache, monkeypatch):
    """As in a container's read-only image."""
    compiled()
    for where in ("os.replace", "tempfile.mkstemp", "Path.mkdir"):
        monkeypatch.setattr(f"nncore.compilation.{where}", failing(errno.EROFS))
    assert compiled()
    assert compilation.not_kept() == {}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_others_can_read_what_is_kept_and_not_write_it(cache):
    """What root compiles at the build of an image serves whichever user runs it."""
    mask = os.umask(0)
    try:
        compiled()
    finally:
        os.umask(mask)
    file = only_file(cache)
    assert [oct(path.stat().st_mode & 0o777) for path in (cache, file.parent, file)] == [
        "0o755",
        "0o755",
        "0o644",
    ]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(cache, mode):
    """Neither loaded from nor written to, be it the cache or the folder in it."""
    compiled()
    for folder in (only_file(cache).parent, cache):
        folder.chmod(mode)
        before = processes.files(cache)
        assert not compiled()
        assert processes.files(cache) == before
        (reason,) = compilation.not_kept().values()
        assert reason == f"others than its owner can write to {cache}"
        folder.chmod(0o755)
    assert compiled()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a folder away")
def test_another_user_s_folder_is_not_used(cache, monkeypatch):
    """But root's is, by everybody."""
    compiled()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert compiled()
    os.chown(cache, 54321, -1)
    assert not compiled()


def test_sources_that_are_younger_than_this_process_are_not_its_own(cache, monkeypatch):
    """Code of an edited source would be kept under the new source's name."""
    monkeypatch.setattr(compilation, "_IMPORTED_AT", 0.0)
    compilation._stamp.cache_clear()
    try:
        assert not compiled()
        assert not compiled()
    finally:
        compilation._stamp.cache_clear()
    assert processes.files(cache.parent) == {}
    assert set(compilation.not_kept().values()) == {"nncore's sources are not those that were imported"}


def test_folders_of_other_versions_are_kept_within_reason(cache):
    """The newest eight of those beside the one in use; other things in the folder are left alone."""
    for age in range(12):
        (cache / f"{age:016x}").mkdir(parents=True)
        os.utime(cache / f"{age:016x}", (1e9 - age, 1e9 - age))
    (cache / "notes").mkdir()
    compiled()
    kept = {folder.name for folder in cache.iterdir()} - {only_file(cache).parent.name, "notes"}
    assert kept == {f"{age:016x}" for age in range(8)}
    assert (cache / "notes").is_dir()


@pytest.mark.parametrize("bits", ["64", "1024", "wide"])
def test_a_wrong_width_is_refused_by_name(cache, monkeypatch, bits):
    monkeypatch.setenv("NNCORE_VECTOR_BITS", bits)
    with pytest.raises(
        nncore.ArgumentError, match=f"NNCORE_VECTOR_BITS is '{bits}'; expected 128, 256 or 512"
    ):
        compiled()


def test_a_kernel_with_a_closure_is_refused():
    """Its name would stand for more than one function."""
    factor = 2.0
    with pytest.raises(TypeError, match="has a closure"):
        kernel(lambda x: factor * x)


def test_a_call_converts_to_what_was_asked_for(cache):
    """A writeable array is passed as the read-only one that the kernel was compiled for."""
    read_only = types.Array(types.float64, 1, "C", readonly=True)
    dispatcher: Any = compile_for(kernel(first_of), (read_only,))
    assert dispatcher(np.array([7.0])) == 7.0
    assert len(dispatcher.signatures) == 1
    with pytest.raises(TypeError):
        dispatcher(np.array([7]))


def test_a_second_signature_does_not_disturb_the_first(cache, monkeypatch):
    """While one is compiled, calls of the other are answered as ever: they compile nothing."""
    double, single = (types.Array(number, 1, "C", readonly=True) for number in (types.float64, types.float32))
    function = kernel(first_of)
    of_double: Any = compile_for(function, (double,))
    answers = []

    def call_meanwhile(*arguments):
        answers.append(of_double(np.array([7.0])))

    monkeypatch.setattr(compilation.KernelCache, "load_overload", call_meanwhile)
    of_single: Any = compile_for(function, (single,))
    assert answers == [7.0]
    assert of_single(np.array([5.0], np.float32)) == 5.0
    assert [len(found.signatures) for found in (of_double, of_single)] == [1, 1]


def first_of(x):
    return x[0]


# Whole processes


ANSWER = f"""
import sys
import numpy as np
import nncore

mlp = nncore.load({str(DIGITS)!r})
x = np.random.default_rng(0).uniform(0, 16, (50, 64)).astype(np.float32)
y = [mlp.forward(x), mlp.forward(x[:3]), mlp.forward(x, threads=2), mlp.predict_proba(x)]
print(b"".join(part.tobytes() for part in y).hex())
"""
# Numba imports these in order to compile; the second only if SciPy is there.
LOADED_ONLY = (
    ANSWER
    + """
assert not {"numba.np.arraymath", "scipy.linalg"} & sys.modules.keys()
"""
)


@pytest.fixture(scope="module")
def answer():
    """What ANSWER prints, computed here."""
    mlp = nncore.load(DIGITS)
    x = np.random.default_rng(0).uniform(0, 16, (50, 64)).astype(np.float32)
    y = mlp.forward(x)
    return b"".join(part.tobytes() for part in (y, y[:3], y, mlp.predict_proba(x))).hex()


@pytest.fixture(scope="module")
def filled(tmp_path_factory, answer):
    """A cache that two processes have filled, which found it empty at the same time."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    together = [processes.start(ANSWER, folder) for _ in range(2)]
    assert [processes.finish(process) for process in together] == [answer] * 2
    return folder


def test_processes_that_fill_a_cache_together_leave_it_whole(filled, answer):
    """Each has answered right; another loads all that it needs and writes nothing."""
    before = processes.files(filled)
    assert not [name for name in before if not name.endswith(".code")]
    assert processes.run(LOADED_ONLY, filled) == answer
    assert processes.files(filled) == before


def test_a_start_from_the_cache_imports_nothing_that_only_compiling_needs(filled, answer):
    """That is most of the time of a start; nor is it needed for float64 models and single outputs."""
    code = "import nncore; nncore.warm()\n"
    processes.run(code, filled)
    assert processes.run(code + LOADED_ONLY, filled) == answer


def test_no_damage_to_the_cache_reaches_an_answer(filled, answer, tmp_path):
    """Every file of a real cache damaged in another way: all are compiled again."""
    damaged = tmp_path / "cache"
    shutil.copytree(filled, damaged)
    damages = [
        damage for damage in DAMAGES.values() if damage is not DAMAGES["another machine's, well signed"]
    ]
    for index, file in enumerate(sorted(damaged.rglob("*.code"))):
        file.write_bytes(damages[index % len(damages)](file.read_bytes()))
    assert processes.run(ANSWER, damaged) == answer
    assert processes.run(LOADED_ONLY, damaged) == answer


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names processors of x86-64")
def test_another_processor_s_code_is_not_loaded(filled, tmp_path):
    """After a move to an older processor every function is compiled for it; the old code stays as it was."""
    moved = tmp_path / "cache"
    shutil.copytree(filled, moved)
    before = processes.files(moved)
    older = {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse2,+ssse3,+sse4.1,+sse4.2,+popcnt"}
    processes.run(ANSWER, moved, **older)
    after = processes.files(moved)
    assert before.items() <= after.items()
    names = [sorted(Path(name).name.rpartition("-")[0] for name in listing) for listing in (before, after)]
    assert set(names[0]) == set(names[1])
    processes.run(LOADED_ONLY, moved, **older)
    assert processes.files(moved) == after


def test_an_edited_source_is_compiled_though_its_date_is_old(tmp_path):
    """In a copy of nncore one constant of a formula is changed: neither copy loads the other's code."""
    code = "import nncore, numpy as np; print(nncore.relu6(np.float32(9)), nncore.__file__)"
    cache = tmp_path / "cache"
    installed = {}
    for name in ("old", "new"):
        package = tmp_path / name / "nncore"
        shutil.copytree(Path(nncore.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        installed[name] = {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    source = tmp_path / "new" / "nncore" / "formulas.py"
    text, date = source.read_text(), source.stat()
    assert text.count("minimum(maximum(x, 0.0), 6.0)") == 1
    source.write_text(text.replace("minimum(maximum(x, 0.0), 6.0)", "minimum(maximum(x, 0.0), 7.0)"))
    os.utime(source, ns=(date.st_atime_ns, date.st_mtime_ns))
    for _ in ("cold", "warm"):
        for name, expected in (("old", "6.0"), ("new", "7.0")):
            assert processes.run(code, cache, **installed[name]).split() == [
                expected,
                str(tmp_path / name / "nncore" / "__init__.py"),
            ]
    assert len(list(cache.iterdir())) == 2


def test_nothing_is_written_beside_the_sources(tmp_path):
    """An installation that is read-only, without a folder for the cache: code is compiled, and it works."""
    package = tmp_path / "site" / "nncore"
    shutil.copytree(Path(nncore.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = processes.files(package)
    (tmp_path / "file").write_text("")
    code = "import nncore, numpy as np; print(nncore.relu6(np.float32(9)))"
    settings = {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    assert processes.run(code, tmp_path / "file" / "cache", **settings) == "6.0"
    assert processes.files(package) == before
