"""
A Python function -> machine code, from a cache of our own where it can be: Numba's options in one place.

Numba's own cache is not used: its key knows only the file in which a function stands, so that code built from
another file's formulas would be loaded stale; it writes beside the sources; and two processes that start
together can exchange the data files of two signatures. Here every piece of machine code is one file,

    <cache folder>/<stamp>/<function>-<key>.code

`stamp` is a hash of all sources of nncore and of everything else that shapes code but the machine; `key` is
a hash of the function's name, its signature, the CPU's name and its features. Files are written whole, then
renamed; they begin with their own hash and hold their key: a torn, renamed, foreign or outdated file is not
loaded, it is compiled again. Without a folder
that can be used (see `cache_folder`) code is compiled in each process, and `not_kept()` says why.

Nothing is read from the environment before the first compilation.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import platform
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite
import numba
import numpy as np
from numba.core.caching import _Cache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.runtime import nrt
from numba.core.serialize import dumps

from nncore import _IMPORTED_AT
from nncore.errors import ArgumentError
from nncore.lanes import Target

__all__ = [
    "CacheContent",
    "KernelCache",
    "c_callback",
    "cache_content",
    "cache_folder",
    "compile_for",
    "create_cache",
    "forced_vector_bits",
    "kernel",
    "not_kept",
    "target_of",
]

logger = logging.getLogger(__name__)

# Numba's own annotations cover its decorators, not its insides.
_numba: Any = numba
_CompileResult: Any = CompileResult
_dumps: Any = dumps
_runtime: Any = nrt.rtsys

Function = TypeVar("Function", bound=Callable[..., Any])

# error_model="numpy": a division by zero is an infinity, not a Python exception. No fastmath, not even
# "contract": Numba would put the flag on every instruction of a kernel, traced formulas included, and which
# products are fused would be LLVM's choice. `fma` is called by name where it is meant.
_OPTIONS = {"nogil": True, "error_model": "numpy"}

# Folders of other stamps that are left alone: other versions of nncore, or this one before an edit.
_KEPT_STAMPS = 8


def kernel(function: Function) -> Function:
    """
    Decorate *function* as a kernel: compiled for its argument types when first called, without the GIL.

    It must be a plain function of an nncore module, without closure: its name stands for it in the cache.
    """
    dispatcher: Any = _numba.njit(**_OPTIONS)(function)
    dispatcher._cache = KernelCache(function)
    return cast(Function, dispatcher)


# A kernel and a signature -> the function that has it alone.
_of_one_signature: dict[tuple[Any, tuple[Any, ...]], Any] = {}
_compiling = threading.Lock()


def compile_for(function: Function, signature: tuple[Any, ...]) -> Function:
    """
    Compile *function*, a `kernel`, for *signature*, or load it; return a function that takes this alone.

    A call of it never compiles another: Numba would do so for a writeable array, though that converts to a
    read-only one. Each signature has a dispatcher of its own: one that is told to compile a second does so
    for every call of the first that comes meanwhile from another thread, or fails it.
    """
    kernel_: Any = function
    with _compiling:
        found = _of_one_signature.get((function, signature))
        if found is None:
            found = kernel(kernel_.py_func)
            found.compile(signature)
            found.disable_compile()
            _of_one_signature[function, signature] = found
    return cast(Function, found)


def c_callback(function: Callable[..., None], signature: Any, name: str) -> Any:
    """
    Compile *function* as a C function, by way of the cache; `.address` is its entry point.

    name: what it is called in the cache; unlike `kernel`'s, *function* may have a closure, and then *name*
    must stand for all that it holds.
    """
    callback: Any = CFunc(
        function, (signature.args, signature.return_type), locals={}, options=dict(_OPTIONS)
    )
    callback._cache = KernelCache(function, name)
    callback.compile()
    return callback


def target_of(context: Any) -> Target:
    """
    The vectors that code compiled in *context*, a Numba target context, should use.

    NNCORE_VECTOR_BITS (128, 256 or 512) forces their width, up to what the machine has.
    """
    triple, _, features = context.codegen().magic_tuple()
    target = Target.from_features(triple, features)
    forced = forced_vector_bits()
    return target if forced is None else Target(min(forced, target.vector_bits), target.has_fma)


def forced_vector_bits() -> int | None:
    """What NNCORE_VECTOR_BITS says; None if it is unset or empty. Raises ArgumentError for other numbers."""
    forced = os.environ.get("NNCORE_VECTOR_BITS", "")
    if forced and forced not in ("128", "256", "512"):
        raise ArgumentError(f"NNCORE_VECTOR_BITS is {forced!r}; expected 128, 256 or 512")
    return int(forced) if forced else None


def cache_folder() -> Path:
    """
    The folder that holds compiled code: $NNCORE_CACHE_DIR, else "nncore" in the user's cache folder.

    Cached code is run, so the folder is used only if no one but its owner can write to it, and its owner is
    this user or root. It is created when first written to, so that others can read it: what root has compiled
    when a container's image was built serves whichever user runs it.
    """
    forced = os.environ.get("NNCORE_CACHE_DIR")
    if forced:
        return Path(forced).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nncore"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "nncore" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "nncore"


@dataclass(frozen=True)
class CacheContent:
    """What the cache holds for this process: code of these sources, versions and forced width."""

    folder: Path
    files: int
    nbytes: int


def cache_content() -> CacheContent:
    """Look into the cache. Raises OSError if it cannot be read; a folder that is not there is empty."""
    folder = _code_folder()
    sizes = [file.stat().st_size for file in folder.glob("*.code")]
    return CacheContent(folder, len(sizes), sum(sizes))


def create_cache() -> None:
    """Create the folders of the cache if they are not there. Raises OSError if they cannot be used."""
    folder = _code_folder()
    if not folder.is_dir():
        _create(folder)
    if not _is_private(folder):
        raise PermissionError(f"others than its owner can write to {folder.parent}")


# Function -> why its code is not in the cache.
_not_kept: dict[str, str] = {}


def not_kept() -> dict[str, str]:
    """The functions that this process has compiled and could not put into the cache, with the reasons."""
    return dict(_not_kept)


class KernelCache(_Cache):
    """The compiled code of one function: Numba's interface of a cache over the module docstring's files."""

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        """name: what the code is called; by default as the function, which then must have no closure."""
        if name is None:
            if function.__closure__:
                raise TypeError(f"{function.__qualname__} has a closure, which its name does not stand for")
            name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        self._name = name
        self._enabled = True

    @property
    def cache_path(self) -> str:
        """The folder of the cache, for Numba's statistics."""
        return str(cache_folder())

    def enable(self) -> None:
        """Use the cache (the default)."""
        self._enabled = True

    def disable(self) -> None:
        """Neither load nor save."""
        self._enabled = False

    def flush(self) -> None:
        """Remove every file of this function."""
        for file in _code_folder().glob(f"{self._name}-*.code"):
            file.unlink(missing_ok=True)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code for *sig* on this machine, or None if it has to be compiled."""
        # What machine code with arrays may call. Numba's own caches refresh the context here, which imports
        # all that Numba can compile, and SciPy: 270 ms of a start, for what loading code does not need.
        _runtime.initialize(target_context)
        if not self._enabled:
            return None
        forced_vector_bits()  # raises here, where Numba adds nothing to the message
        key = _key(self._name, sig, target_context.codegen())
        try:
            folder = _code_folder()
            if not _is_private(folder):
                return None
            content = self._file(folder, key).read_bytes()
            digest, payload = content[:32], content[32:]
            if hashlib.sha256(payload).digest() != digest:
                raise ValueError("damaged")
            stored_key, reduced = pickle.loads(payload)
            if stored_key != key:
                raise ValueError("other code than its name says")
            return _CompileResult._rebuild(target_context, *reduced)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with a cached file, compiling is the answer
            logger.info("cached code not used name=%s reason=%r", self._name, error)
            return None

    def save_overload(self, sig: Any, cres: Any) -> None:
        """Keep the code for *sig*. Where that is not possible, the next process compiles again."""
        if not self._enabled or cres.library.has_dynamic_globals or any(not f.can_cache for f in cres.lifted):
            return
        key = _key(self._name, sig, cres.library.codegen)
        try:
            create_cache()
            payload = _dumps((key, cres._reduce()))
            _write_whole(self._file(_code_folder(), key), hashlib.sha256(payload).digest() + payload)
        except OSError as error:
            _not_kept[self._name] = error.strerror or str(error)
            logger.info("compiled code not kept name=%s reason=%r", self._name, error)

    def _file(self, folder: Path, key: str) -> Path:
        return folder / f"{self._name}-{key[:32]}.code"


def _key(name: str, signature: Any, codegen: Any) -> str:
    """Stands for one signature of the function *name* on one kind of machine."""
    return hashlib.sha256(repr((name, str(signature), codegen.magic_tuple())).encode()).hexdigest()


def _code_folder() -> Path:
    """The folder of this process's stamp."""
    return cache_folder() / _stamp(forced_vector_bits())


@lru_cache(maxsize=4)
def _stamp(vector_bits: int | None) -> str:
    """
    Names all that shapes the code besides signature and machine: sources, versions, the forced width.

    Raises OSError if there are no sources, or if one was changed under this process: what it runs is then
    unknown, and saved under the new source's stamp the old code would be another process's.
    """
    digest = hashlib.sha256()
    # All of nncore, not a list of its kernels: a list can be forgotten, and these are a few hundred kB.
    package = Path(__file__).parent
    sources = sorted(package.rglob("*.py"))
    times = [source.stat() for source in sources]
    # st_ctime as well: installers that link files from a store of theirs keep the time of modification.
    if not sources or max(max(t.st_mtime, t.st_ctime) for t in times) > _IMPORTED_AT:
        raise OSError("nncore's sources are not those that were imported")
    for source in sources:
        name = source.relative_to(package).as_posix().encode()
        digest.update(name + b"\0" + hashlib.sha256(source.read_bytes()).digest())
    try:
        own_version = version("nnserve")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own_version = ""
    python = f"{platform.python_implementation()} {sys.version} {sys.abiflags}"
    libraries = f"{_numba.__version__} {llvmlite.__version__} {np.__version__}"
    config = _numba.config
    settings = f"{vector_bits} {config.OPT} {config.BOUNDSCHECK} {config.DEBUGINFO_DEFAULT}"
    digest.update(f"{own_version}\0{python}\0{libraries}\0{settings}".encode())
    return digest.hexdigest()[:16]


def _is_private(folder: Path) -> bool:
    """Whether only this user, or root, can have put files into *folder* (and into the one that holds it)."""
    if os.name != "posix":
        return True  # user folders are private by default there
    for part in (folder.parent, folder):
        info = part.stat()
        if info.st_uid not in (os.geteuid(), 0) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
    return True


def _create(folder: Path) -> None:
    """Create *folder* and the one that holds it; remove folders of stamps long unused."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    folder.parent.mkdir(mode=0o755, exist_ok=True)
    folder.mkdir(mode=0o755, exist_ok=True)
    stamps = [f for f in folder.parent.iterdir() if f.is_dir() and len(f.name) == len(folder.name)]
    stamps.sort(key=lambda f: f.stat().st_mtime, reverse=True)
    for old in stamps[_KEPT_STAMPS + 1 :]:
        shutil.rmtree(old, ignore_errors=True)


def _write_whole(path: Path, content: bytes) -> None:
    """Write *path* so that a reader sees all of *content* or none."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's is for this user alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
