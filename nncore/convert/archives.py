"""A zip archive's members -> bytes, of a bounded size: nothing is unpacked to disk, no bomb goes off."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nncore.errors import ConversionError

# Text that describes a model; a million nodes fit.
MAX_TEXT_BYTES = 64 << 20
MAX_NUMBER_BYTES = 8 << 30
# Weights hardly compress: beyond this ratio and size a member is taken for a bomb.
_MAX_RATIO = 100
_SUSPICIOUS_BYTES = 64 << 20


class Archive:
    """An open zip archive."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._archive = archive
        self._name = name

    def names(self) -> list[str]:
        """The members."""
        return self._archive.namelist()

    def read(self, member: str, limit: int = MAX_TEXT_BYTES) -> bytes:
        """The bytes of *member*, at most *limit*. Raises ConversionError."""
        try:
            info = self._archive.getinfo(member)
        except KeyError:
            raise ConversionError(f"{self._name} has no {member!r} in it") from None
        is_bomb = info.file_size > _SUSPICIOUS_BYTES and info.file_size > _MAX_RATIO * info.compress_size
        if info.file_size > limit or is_bomb:
            raise ConversionError(
                f"{self._name}: {member!r} unpacks from {info.compress_size:,} to {info.file_size:,} bytes;"
                f" expected at most {limit:,}, and no more than {_MAX_RATIO} times"
            )
        try:
            with self._archive.open(info) as stream:
                content = stream.read(info.file_size + 1)
        except Exception as error:  # zipfile's, zlib's and those of other compressions have no common base
            raise ConversionError(f"{self._name}: {member!r} cannot be read: {error}") from None
        if len(content) != info.file_size:
            raise ConversionError(f"{self._name}: {member!r} is not of the size that the archive says")
        return content


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """The zip archive *path*. Raises ConversionError if it is none, OSError from the disk."""
    with open(path, "rb") as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise ConversionError(f"{path.name} is not a zip archive: {error}") from None
        with archive:
            yield Archive(archive, path.name)
