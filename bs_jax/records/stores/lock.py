"""Lets one process at a time write in a folder, on a disk or in an object store."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bs_jax.errors import UserError
from bs_jax.records.stores import files, lease

_PATIENCE_SECONDS = 60.0  # a dying process needs a moment to let go


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold a folder for writing. If another process holds it, wait a little, then refuse.

    On a disk a lock on the file ``LOCK``, which the system releases however the process ends. In
    an object store a lease, see `bs_jax.records.stores.lease`.

    Args:
        folder: the folder; on a disk it exists.

    Yields:
        A function to call before every write. It raises a `UserError` if another process has
        taken over the folder.

    Raises:
        UserError: another process holds the folder.
    """
    if files.is_remote(folder):
        with lease.held(folder) as held:
            yield held.check
        return
    with open(folder / "LOCK", "w", encoding="utf-8") as lock:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process is training in {folder}; "
                        "wait for it, or give this one another --workdir"
                    ) from None
                time.sleep(0.1)
        yield lambda: None
