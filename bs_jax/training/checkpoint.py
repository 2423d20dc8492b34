"""Checkpoints by Orbax: the train state, which holds the data position as well."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np

from bs_jax.records import stores
from bs_jax.scaling import ScaleByBatchState
from bs_jax.scaling.upgrade import first_structure, upgrade_state
from bs_jax.training.state import TrainState

_KEPT = 2  # the newest and one to fall back on
_SPARE_BYTES = 256 << 10  # for what Orbax writes beside the arrays


class Checkpoints:
    """Checkpoints of one run, newest last.

    They hold plain arrays, no placement: a state saved on any number of devices or processes is
    restored on any other. Beside them lie a checksum of them, and one of the metrics written until
    then, so that a run goes on only where both are whole. Of many processes one alone uses this.

    Orbax writes on a disk; `stores.checkpoint_folders` keeps what it wrote, there or elsewhere.

    Args:
        path: folder of the checkpoints; made when the first one is written.
        metrics_digest: the checksum of the metrics on disk up to a count of examples.
    """

    def __init__(self, path: Path, metrics_digest: Callable[[int], bytes]) -> None:
        self._path = path
        self._stored = stores.checkpoint_folders(path)
        self._folder = self._stored.folder
        self._metrics_digest = metrics_digest
        self._manager: Any = None

    def save(self, state: TrainState, metrics_digest: bytes) -> None:
        """Write a checkpoint at the state's step; back when it is on disk.

        Args:
            state: of numpy arrays.
            metrics_digest: checksum of the metrics written until now.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        import orbax.checkpoint as ocp

        self._folder.mkdir(parents=True, exist_ok=True)
        content = _content(state, metrics_digest)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(content)) + _SPARE_BYTES
        if shutil.disk_usage(self._folder).free < needed * self._stored.copies:
            # Before anything is written.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        with _system_errors():
            self._open().save(int(state.step), args=ocp.args.StandardSave(content))
        self._stored.put(int(state.step))
        for old in self._stored.steps()[:-_KEPT]:
            self._stored.delete(old)

    def restore(self, template: TrainState, *, set_aside: bool = True) -> TrainState | None:
        """The newest checkpoint that can be read, or None.

        Args:
            template: a state of numpy arrays of the same shapes and dtypes.
            set_aside: rename what cannot be read; False in a folder that is somebody else's.

        Returns:
            The state. A damaged checkpoint, or one whose metrics are, is named in the log and
            passed over for the one before.
        """
        if not self._folder.is_dir():
            return None
        _hush_late_answers()
        for step in reversed(self._stored.steps()):
            try:
                self._stored.fetch(step)
                return self._read(step, template)
            except stores.StoreError:
                raise  # it may be whole
            except Exception as error:  # whatever a damaged file makes Orbax raise
                reason = str(error) if type(error) is ValueError else type(error).__name__
                logging.getLogger(__name__).warning(
                    "cannot restore checkpoint %s (%s); trying the previous one",
                    self._path / str(step),
                    " ".join(reason.split())[:200],
                )
                if set_aside:
                    self._stored.set_aside(step)
                self._close_manager()  # it would take the others to be of this one's form
        return None

    def _read(self, step: int, template: TrainState) -> TrainState:
        """One checkpoint; of the first version's too, upgraded.

        Raises:
            Exception: of whatever kind, if it is damaged or of another structure.
        """
        try:
            return self._read_as(template, step)
        except stores.StoreError:
            raise
        except Exception:
            for first in _first_version(template):
                self._close_manager()  # it would take this one to be of the structure before
                with contextlib.suppress(Exception):
                    saved = self._read_as(first, step)
                    examples = int(saved.examples)
                    opt_state = upgrade_state(
                        saved.opt_state, template.opt_state, examples=examples
                    )
                    return saved._replace(opt_state=jax.tree.map(np.asarray, opt_state))
            raise

    def _read_as(self, template: TrainState, step: int) -> TrainState:
        """One checkpoint, held against its checksum and that of the metrics."""
        import orbax.checkpoint as ocp

        wanted = _content(template, bytes(32))
        self._open().reload()
        found = self._open().restore(step, args=ocp.args.StandardRestore(wanted))
        state, metrics_digest = found["state"], found["metrics_sha256"].tobytes()
        again = _content(state, metrics_digest)
        if not np.array_equal(found["sha256"], again["sha256"]):
            raise ValueError("its content does not fit its checksum")
        if metrics_digest != self._metrics_digest(int(state.examples)):
            raise ValueError("metrics.jsonl has changed since")
        return state

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints beyond a step."""
        if not self._folder.is_dir():
            return
        self._close_manager()  # it lists the folder when it is opened
        for later in [found for found in self._stored.steps() if found > step]:
            self._stored.delete(later)

    def close(self) -> None:
        """Release Orbax's threads."""
        self._close_manager()
        self._stored.close()

    def _close_manager(self) -> None:
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
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        return self._manager


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Raise as OSError what TensorStore raises as ValueError; keep Orbax's threads quiet."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        yield
    except ValueError as error:
        found = re.search(r"os_error_code='(\d+)'", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
    finally:
        absl.logging.set_verbosity(verbosity)


@functools.cache
def _hush_late_answers() -> None:
    """Say nothing of what TensorStore answers after a read of a damaged checkpoint was given up.

    It would print a traceback for each array that was still to be read.
    """
    shown = sys.unraisablehook

    def hook(ignored: Any) -> None:
        # Errors of ours begin in a module of ours; these begin in asyncio, called from C++.
        trace = ignored.exc_traceback
        if trace is None or trace.tb_frame.f_code.co_name != "call_soon_threadsafe":
            shown(ignored)

    sys.unraisablehook = hook


def _first_version(template: TrainState) -> Iterator[TrainState]:
    """The structures in which version 0.1.0 may have saved such a state."""
    if isinstance(template.opt_state, ScaleByBatchState):
        for noise in (False, True):  # it depended on the rule
            opt_state = first_structure(template.opt_state, noise=noise)
            yield template._replace(opt_state=opt_state)


def _content(state: TrainState, metrics_digest: bytes) -> dict[str, Any]:
    """What is saved; the last item covers the others, as compression misses flipped bits."""
    digest = hashlib.sha256(metrics_digest)
    for leaf in jax.tree.leaves(state):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return {
        "state": state,
        "metrics_sha256": np.frombuffer(metrics_digest, np.uint8).copy(),
        "sha256": np.frombuffer(digest.digest(), np.uint8).copy(),
    }
