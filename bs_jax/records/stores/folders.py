"""Many run folders, read from this disk wherever they are stored."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bs_jax.records.stores import files

Stamp = list[list[Any]]


class Folders:
    """Folders on this disk.

    Args:
        path: the folder that holds them.
        wanted: names of the files that are read from each.

    Attributes:
        present: names of the folders.
    """

    def __init__(self, path: Path, wanted: Sequence[str]) -> None:
        self._path, self._wanted = path, frozenset(wanted)
        self.present = files.names(path)

    def stamp(self, name: str) -> Stamp:
        """Values that change when one of a folder's files does: name, times, size and inode."""
        with contextlib.suppress(OSError), os.scandir(self._path / name) as items:
            return sorted(
                [item.name, s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino]
                for item in items
                if item.name in self._wanted and (s := item.stat())
            )
        return []

    def fetch(self, names: Sequence[str]) -> None:
        """Make folders ready to be read at `folder`."""

    def folder(self, name: str) -> Path:
        """Where a fetched folder's files can be read."""
        return self._path / name

    def close(self) -> None:
        """Delete temporary copies."""


class _StoredFolders(Folders):
    """Folders in an object store: listed once, copied to this disk when they are wanted."""

    def __init__(self, path: Path, wanted: Sequence[str]) -> None:
        self._path = path
        self._stamps: dict[str, Stamp] = {}
        for key, stamp in files.stamps(path).items():
            name, _, file = key.partition("/")
            if name in ("", ".", ".."):
                continue
            known = self._stamps.setdefault(name, [])
            if file in wanted:
                known.append([file, *stamp])
        self.present = set(self._stamps)
        self._temporary = tempfile.TemporaryDirectory(prefix="bs_jax-")

    def stamp(self, name: str) -> Stamp:
        """Name, size and generation of every wanted file."""
        return sorted(self._stamps[name])

    def fetch(self, names: Sequence[str]) -> None:
        """Copy the wanted files of several folders, many at once."""
        wanted = [(name, stamp[0]) for name in names for stamp in self._stamps[name]]
        for name in names:
            self.folder(name).mkdir(exist_ok=True)

        def copy(item: tuple[str, str]) -> None:
            name, file = item
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                files.download(self._path / name / file, self.folder(name) / file)

        files.each(self._path, copy, wanted)

    def folder(self, name: str) -> Path:
        return Path(self._temporary.name) / name

    def close(self) -> None:
        self._temporary.cleanup()


def open_folders(path: Path, wanted: Sequence[str]) -> Folders:
    """The folders inside a folder, on a disk or in an object store.

    Args:
        path: the folder that holds them.
        wanted: names of the files that are read from each.
    """
    return _StoredFolders(path, wanted) if files.is_remote(path) else Folders(path, wanted)
