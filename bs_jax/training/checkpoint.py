"""Checkpoints by Orbax: the train state, which holds the data position as well."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from bs_jax.training.state import TrainState

_KEPT = 2  # the newest and one to fall back on


class Checkpoints:
    """Checkpoints of one run, newest last.

    Args:
        path: folder of the checkpoints; made when the first one is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._manager: Any = None

    def save(self, state: TrainState) -> None:
        """Write a checkpoint at the state's step; back when it is on disk."""
        import orbax.checkpoint as ocp

        manager = self._open(create=True)
        manager.save(int(state.step), args=ocp.args.StandardSave(state))
        manager.wait_until_finished()

    def restore(self, template: TrainState) -> TrainState | None:
        """The newest checkpoint that can be read, or None.

        Args:
            template: a state of the same shapes, dtypes and placement.

        Returns:
            The state. A damaged checkpoint is named in the log and passed over for the one before.
        """
        import orbax.checkpoint as ocp

        if not self._path.is_dir():
            return None
        manager = self._open(create=False)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                return manager.restore(step, args=ocp.args.StandardRestore(abstract))
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

    def _open(self, create: bool) -> Any:
        import orbax.checkpoint as ocp

        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=_KEPT, create=create, enable_async_checkpointing=False
            )
            self._manager = ocp.CheckpointManager(self._path, options=options)
        return self._manager
