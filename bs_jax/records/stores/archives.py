"""Checkpoint folders, named by step: on a disk as they are, in an object store one archive each."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path

from bs_jax.records.stores import files

_SUFFIX = ".tar"


class CheckpointFolders:
    """Folders ``STEP`` on a disk.

    Args:
        path: the folder that holds them.

    Attributes:
        folder: where a step's folder is written and read on this disk.
        copies: how many times a step needs its size on this disk while it is stored.
    """

    copies = 1

    def __init__(self, path: Path) -> None:
        self.folder = path.absolute()

    def steps(self) -> list[int]:
        """The stored steps, ascending."""
        return sorted(int(name) for name in files.names(self.folder) if name.isdecimal())

    def put(self, step: int) -> None:
        """Store a step whose folder was written."""

    def fetch(self, step: int) -> None:
        """Make a stored step readable in `folder`.

        Raises:
            StoreError: the store cannot be reached.
            Exception: of any kind, if the step is damaged or gone.
        """

    def delete(self, step: int) -> None:
        """Delete a step, if it exists."""
        shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def set_aside(self, step: int) -> None:
        """Rename a step that cannot be read: it may be readable elsewhere."""
        name = str(step)
        taken = files.names(self.folder)
        files.rename(self.folder / name, self.folder / unreadable_name(name, taken))

    def close(self) -> None:
        """Delete temporary copies."""


class _Archives(CheckpointFolders):
    """Objects ``STEP.tar`` in an object store, each of one folder ``STEP``.

    Putting an object is atomic; putting a folder of objects is not. Unpacked, an archive is the
    folder that a run on a disk has.
    """

    copies = 2

    def __init__(self, path: Path) -> None:
        self._path = path
        self.folder = Path(tempfile.mkdtemp(prefix="bs_jax-checkpoints-"))

    def steps(self) -> list[int]:
        found = files.names(self._path)
        stems = (name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def put(self, step: int) -> None:
        packed = self._packed(step)
        try:
            with tarfile.open(packed, "w") as archive:
                archive.add(self.folder / str(step), arcname=str(step))
            files.upload({packed: self._path / packed.name})
        finally:
            packed.unlink(missing_ok=True)

    def fetch(self, step: int) -> None:
        packed = self._packed(step)
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        try:
            files.download(self._path / packed.name, packed)
            with tarfile.open(packed) as archive:
                if {name.split("/")[0] for name in archive.getnames()} != {str(step)}:
                    raise ValueError(f"{packed.name} holds more than step {step}")
                archive.extractall(self.folder, filter="data")  # nothing outside the folder
        finally:
            packed.unlink(missing_ok=True)

    def delete(self, step: int) -> None:
        super().delete(step)
        files.unlink(self._path / f"{step}{_SUFFIX}")

    def set_aside(self, step: int) -> None:
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        name = f"{step}{_SUFFIX}"
        taken = files.names(self._path)
        if name in taken:
            files.rename(self._path / name, self._path / unreadable_name(name, taken))

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _packed(self, step: int) -> Path:
        return self.folder / f"{step}{_SUFFIX}"


def checkpoint_folders(path: Path) -> CheckpointFolders:
    """The checkpoints of a run, on a disk or in an object store.

    Args:
        path: the folder that holds them.
    """
    return _Archives(path) if files.is_remote(path) else CheckpointFolders(path)


def unreadable_name(name: str, taken: Collection[str]) -> str:
    """A free name for a checkpoint that cannot be read.

    >>> unreadable_name("64", {"64", "unreadable-64"})
    'unreadable-64.1'
    """
    wanted, number = f"unreadable-{name}", 0
    free = wanted
    while free in taken:
        number += 1
        free = f"{wanted}.{number}"
    return free
