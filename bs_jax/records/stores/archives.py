"""Checkpoints in an object store: one object each, so that each is whole or not there."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path

from bs_jax.records.stores import storage

_SUFFIX = ".tar"


class Archives:
    """``STEP.tar`` in an object store, of a folder ``STEP`` on a disk.

    Putting an object is atomic, which putting a folder of them is not; unpacked, it is the folder
    that a run on a disk has.

    Args:
        path: of the objects.

    Attributes:
        folder: on a disk, for the folders; temporary.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.folder = Path(tempfile.mkdtemp(prefix="bs_jax-checkpoints-"))

    def steps(self) -> list[int]:
        """The steps that there are, ascending."""
        found = storage.names(self._path)
        stems = (name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def put(self, step: int) -> None:
        """Pack a step's folder and put it in the store."""
        packed = self._packed(step)
        try:
            with tarfile.open(packed, "w") as archive:
                archive.add(self.folder / str(step), arcname=str(step))
            storage.upload({packed: self._path / packed.name})
        finally:
            packed.unlink(missing_ok=True)

    def fetch(self, step: int) -> None:
        """Get a step from the store and unpack it.

        Raises:
            StoreError: the store cannot be reached.
            Exception: of whatever kind, if the object is damaged or gone.
        """
        packed = self._packed(step)
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        try:
            storage.download(self._path / packed.name, packed)
            with tarfile.open(packed) as archive:
                if {name.split("/")[0] for name in archive.getnames()} != {str(step)}:
                    raise ValueError(f"{packed.name} holds more than step {step}")
                archive.extractall(self.folder, filter="data")  # nothing outside the folder
        finally:
            packed.unlink(missing_ok=True)

    def delete(self, step: int) -> None:
        """Delete a step from the store."""
        storage.unlink(self._path / f"{step}{_SUFFIX}")

    def set_aside(self, step: int) -> None:
        """Rename a step that cannot be read, here and in the store."""
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        name = f"{step}{_SUFFIX}"
        taken = storage.names(self._path)
        if name in taken:
            storage.rename(self._path / name, self._path / unreadable_name(name, taken))

    def close(self) -> None:
        """Delete the folders on the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _packed(self, step: int) -> Path:
        return self.folder / f"{step}{_SUFFIX}"


def unreadable_name(name: str, taken: Collection[str]) -> str:
    """A name that is not taken for a checkpoint that cannot be read.

    >>> unreadable_name("64", {"64", "unreadable-64"})
    'unreadable-64.1'
    """
    wanted, number = f"unreadable-{name}", 0
    free = wanted
    while free in taken:
        number += 1
        free = f"{wanted}.{number}"
    return free
