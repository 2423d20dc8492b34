"""Checkpoints by Orbax: the train state, which holds the data position as well."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bs_jax.training.state import TrainState

_KEPT = 2  # the newest and one to fall back on


class Checkpoints:
    """Checkpoints of one run, newest last.

    They hold plain arrays and a checksum of them, no placement: a state saved on any number of
    devices or processes is restored on any other. Of many processes one alone uses this class.

    Args:
        path: folder of the checkpoints; made when the first one is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._manager: Any = None

    def save(self, state: TrainState) -> None:
        """Write a checkpoint (numpy arrays) at the state's step; back when it is on disk."""
        import orbax.checkpoint as ocp

        self._path.mkdir(parents=True, exist_ok=True)
        content = {"state": state, "sha256": _digest(state)}
        self._open().save(int(state.step), args=ocp.args.StandardSave(content))

    def restore(self, template: TrainState) -> TrainState | None:
        """The newest checkpoint that can be read, or None.

        Args:
            template: a state of numpy arrays of the same shapes and dtypes.

        Returns:
            The state. A damaged checkpoint is named in the log and passed over for the one before.
        """
        import orbax.checkpoint as ocp

        if not self._path.is_dir():
            return None
        manager = self._open()
        wanted = {"state": template, "sha256": _digest(template)}
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                found = manager.restore(step, args=ocp.args.StandardRestore(wanted))
                state = found["state"]
                if not np.array_equal(found["sha256"], _digest(state)):
                    raise ValueError("its checksum is another")
                return state
            except Exception as error:  # whatever a damaged file makes Orbax raise
                logging.getLogger(__name__).warning(
                    "checkpoint %s cannot be read (%s); trying the one before",
                    self._path / str(step),
                    type(error).__name__,
                )
                self._set_aside(step)
                manager.reload()
        return None

    def _set_aside(self, step: int) -> None:
        # Kept under another name, not deleted: what cannot be read here may be readable elsewhere.
        target = self._path / f"unreadable-{step}"
        for number in range(1, 1000):
            if not target.exists():
                break
            target = self._path / f"unreadable-{step}.{number}"
        (self._path / str(step)).rename(target)

    def close(self) -> None:
        """Release Orbax's threads."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        if self._manager is None:
            alone = jax.process_count() > 1
            options = ocp.CheckpointManagerOptions(
                max_to_keep=_KEPT,
                create=False,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,  # of a process killed while it wrote
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=jax.process_index(),
                    active_processes={jax.process_index()} if alone else None,
                    barrier_sync_key_prefix="first" if alone else None,
                ),
            )
            self._manager = ocp.CheckpointManager(self._path, options=options)
        return self._manager


def _digest(state: TrainState) -> np.ndarray:
    """sha256 of all arrays, uint8 [32]: compressed files do not notice every flipped bit."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8).copy()
