"""
Paths in, the models on disk out: which files are models, what they are called, what is wrong with the rest.

A path is a model file, a folder of models, or one model's folder:

    NAME.safetensors, NAME.onnx             one version, "1"
    NAME/VERSION/model.safetensors, .onnx   VERSION: a whole number from 1
    NAME/config.toml                        optional; see model_settings

Hidden files and folders are left alone: what is still being written is often one, and so are the folders
through which Kubernetes swaps a volume's files. Links are followed as long as they stay in the folder that
was given; a path that is given is the operator's own word and may be a link to anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nnserver.errors import ConfigError
from nnserver.model_settings import MAX_VERSION

SUFFIXES = (".safetensors", ".onnx")
CONFIG_FILE = "config.toml"
BUNDLED = Path(__file__).parent / "models"

# Names travel in messages, logs and file names: no separators, controls or leading dots.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")

# What tells one state of a file from another: device, inode, size and time of the last change.
Stamp = tuple[int, ...]
Stamps = tuple[tuple[str, Stamp | None], ...]


@dataclass(frozen=True)
class ModelSource:
    """
    A model on disk: its files by version.

    folder: the model's own, NAME, if it has one.  config: the config.toml in it, if there is one.
    """

    name: str
    versions: Mapping[int, Path]
    folder: Path | None = None
    config: Path | None = None

    def stamps(self) -> Stamps:
        """Return the state of every file: equal as long as none is changed, added or taken away."""
        of_versions = [pair for version in sorted(self.versions) for pair in self.version_stamps(version)]
        return (*of_versions, *_stamps([self.config] if self.config else []))

    def version_stamps(self, version: int) -> Stamps:
        """Return the state of *version*: of its file, or of its folder, where weights may lie apart."""
        file = self.versions[version]
        if self.folder is None:
            return _stamps([file])
        try:
            return _stamps(sorted(file.parent.iterdir()))
        except OSError:
            return ()  # Taken away while we looked: to be told by whoever opens it.


@dataclass(frozen=True)
class Problem:
    """Why something that is called like a model is none."""

    # For the operator; names paths.
    text: str
    # For clients; does not.
    reason: str


@dataclass
class Found:
    """What there is: models by name, and why other names are none. A name is in one of the two."""

    sources: dict[str, ModelSource] = field(default_factory=dict)
    problems: dict[str, Problem] = field(default_factory=dict)

    def add(self, name: str, what: ModelSource | Problem) -> None:
        if isinstance(what, Problem):
            self.sources.pop(name, None)
            self.problems[name] = what
        else:
            self.sources[name] = what


# A name, where it stands, and what is there.
_Candidate = tuple[str, Path, ModelSource | Problem]


def find_models(paths: Iterable[str], may_be_gone: bool = False) -> Found:
    """
    Return what is under *paths*; under none, the models that come with the package.

    may_be_gone: whether a model file that is not there counts as none, not as a mistake.
    Raises ConfigError if a path is not there or is neither a folder nor a model file, OSError if a folder
    cannot be read.
    """
    found = Found()
    seen: dict[str, Path] = {}
    for name, path, source in _candidates(paths, may_be_gone):
        if name in seen:
            if not _is_same(seen[name], path):
                text = f"two models are named '{name}': {seen[name]} and {path}"
                found.add(name, Problem(text, "two models have this name"))
            continue
        seen[name] = path
        if not _NAME.fullmatch(name):
            reason = (
                f"{quoted(name)} cannot be a model's name; use letters, digits, '_', '-' and '.', at most "
                "128, the first a letter, digit or '_'"
            )
            source = Problem(f"{path}: {reason}", reason)
        found.add(name, source)
    return found


def stamp(file: Path) -> Stamp | None:
    """Return the state of *file*; None if it is not there or cannot be looked at."""
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _stamps(files: Iterable[Path]) -> Stamps:
    return tuple((str(file), stamp(file)) for file in files)


def quoted(text: str) -> str:
    """Return someone else's text fit for an error message: short, printable, in quotes."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _candidates(paths: Iterable[str], may_be_gone: bool) -> Iterator[_Candidate]:
    for path in [Path(path) for path in paths] or [BUNDLED]:
        if path.is_dir():
            if _is_model_folder(path):
                name = Path(os.path.abspath(path)).name
                yield name, path, _in_model_folder(name, path, _real(path))
            else:
                yield from _in_folder(path)
        elif not path.exists():
            if may_be_gone and path.suffix in SUFFIXES:
                continue
            raise ConfigError(f"there is no model file or folder {path}")
        elif path.suffix not in SUFFIXES:
            raise ConfigError(
                f"{path} is not a model file; expected NAME.safetensors or NAME.onnx (see `nncore --help`)"
            )
        else:
            yield path.stem, path, ModelSource(path.stem, {1: path})


def _in_folder(folder: Path) -> Iterator[_Candidate]:
    root = _real(folder)
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith("."):
            continue
        if path.suffix in SUFFIXES:
            yield path.stem, path, _leaving(path, root) or ModelSource(path.stem, {1: path})
        elif path.is_dir():
            try:
                if _is_model_folder(path):
                    yield name, path, _in_model_folder(name, path, root)
            except FileNotFoundError:
                continue  # Taken away while we looked.
            except OSError as error:
                # What cannot be read may be a model, unless its name says otherwise: "lost+found".
                if _NAME.fullmatch(name):
                    reason = f"its folder cannot be read: {error.strerror}"
                    yield name, path, Problem(f"{path}: {reason}", reason)


def _is_model_folder(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() or any(_versions(folder))


def _in_model_folder(name: str, folder: Path, root: Path) -> ModelSource | Problem:
    config = folder / CONFIG_FILE
    versions: dict[int, Path] = {}
    for version, file in _versions(folder):
        if version in versions:
            both = f"two models: {versions[version].name} and {file.name}"
            return Problem(f"{file.parent} has {both}", f"version {version} has {both}")
        versions[version] = file
    if not versions:
        reason = "no version with a model in it (1/model.safetensors or 1/model.onnx)"
        return Problem(f"{folder} has {reason}", f"there is {reason}")
    source = ModelSource(name, versions, folder, config if config.exists() else None)
    for file in (folder, *versions.values(), *([config] if source.config else [])):
        problem = _leaving(file, root)
        if problem:
            return problem
    return source


def _versions(folder: Path) -> Iterator[tuple[int, Path]]:
    for below in folder.iterdir():
        if _VERSION.fullmatch(below.name) and int(below.name) <= MAX_VERSION:
            for suffix in SUFFIXES:
                file = below / f"model{suffix}"
                if file.exists():
                    yield int(below.name), file


def _leaving(path: Path, root: Path) -> Problem | None:
    """Return what is wrong if *path* is, or goes through, a link that leads out of *root*."""
    if _real(path).is_relative_to(root):
        return None
    return Problem(f"{path} is a link that leads out of the folder {root}", "it is a link that leads out")


def _real(path: Path) -> Path:
    """Return *path* without links; unlike Path.resolve, of a circle of links, too."""
    return Path(os.path.realpath(path))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
