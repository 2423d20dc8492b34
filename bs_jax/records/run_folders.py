"""The run folders of a sweep, as folders of this disk, wherever they lie."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bs_jax.records.stores import storage

_RECORDS = ("config.json", "hparams.json", "metrics.jsonl", "summary.json", "DONE")
Stamp = list[list[Any]]


class RunFolders:
    """Run folders on a disk.

    Args:
        path: of the folder that holds them.

    Attributes:
        present: their names.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.present = storage.names(path)

    def stamp(self, run_id: str) -> Stamp:
        """Name, times, size and inode of every file: what changes when a file does."""
        with contextlib.suppress(OSError), os.scandir(self._path / run_id) as items:
            found = ((item.name, item.stat()) for item in items if item.is_file())
            return sorted(
                [name, s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino] for name, s in found
            )
        return []

    def fetch(self, run_ids: Sequence[str]) -> None:
        """Make ready to be read by `folder`."""

    def folder(self, run_id: str) -> Path:
        """The folder of a run."""
        return self._path / run_id

    def close(self) -> None:
        """Forget what was fetched."""


class StoredRunFolders(RunFolders):
    """Run folders in an object store: listed once, and copied here where they are wanted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamps: dict[str, Stamp] = {}
        for name, stamp in storage.stamps(path).items():
            run_id, _, file = name.partition("/")
            if run_id in ("", ".", ".."):
                continue
            known = self._stamps.setdefault(run_id, [])
            if file in _RECORDS:
                known.append([file, *stamp])
        self.present = set(self._stamps)
        self._temporary = tempfile.TemporaryDirectory(prefix="bs_jax-")

    def stamp(self, run_id: str) -> Stamp:
        """Name, size and generation of every record."""
        return sorted(self._stamps[run_id])

    def fetch(self, run_ids: Sequence[str]) -> None:
        """Copy the records of runs, many at once."""
        files = [(run_id, file[0]) for run_id in run_ids for file in self._stamps[run_id]]
        for run_id in run_ids:
            self.folder(run_id).mkdir(exist_ok=True)

        def copy(item: tuple[str, str]) -> None:
            run_id, file = item
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                storage.download(self._path / run_id / file, self.folder(run_id) / file)

        storage.each(self._path, copy, files)

    def folder(self, run_id: str) -> Path:
        """Where the records of a run were copied to."""
        return Path(self._temporary.name) / run_id

    def close(self) -> None:
        """Delete the copies."""
        self._temporary.cleanup()


def open_folders(path: Path) -> RunFolders:
    """The run folders in a folder of either kind."""
    return StoredRunFolders(path) if storage.is_remote(path) else RunFolders(path)
