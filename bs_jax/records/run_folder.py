"""The folder of one run, as training writes it: who may write, and when the run is complete."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from bs_jax.errors import UserError
from bs_jax.records import stores
from bs_jax.records.json_files import Unreadable
from bs_jax.records.run_files import (
    DONE,
    INTERRUPTED,
    NOT_IDENTITY,
    RunRecord,
    Summary,
    damaged_files,
    mark_done,
    read_config,
    write_record,
)

# A saved state has no meaning under other values of these.
_FIXED = ("batch_size", "data.", "ema_decay", "model.", "optimizer.name", "scaling.rule", "seed")


AnyRun = TypeVar("AnyRun", bound=RunRecord)


class RunFolder(Generic[AnyRun]):
    """The record of one run; see `bs_jax.records.run_files` for what is in it.

    Only one process writes in a folder at a time.

    Args:
        path: the folder, see `stores.to_path`; made if it does not exist.
        run: what is to be trained in it.
        writes: False in a process that leaves reading and writing to another: nothing is touched.
        allow_change: continue a run of another config, if its state has a meaning under this
            config too.

    Attributes:
        path: the folder.
        run: the run.

    Raises:
        UserError: the folder cannot be written, or holds a run of another config.
    """

    def __init__(
        self, path: Path, run: AnyRun, *, writes: bool = True, allow_change: bool = False
    ) -> None:
        self.path = path
        self.run = run
        self._changed = False
        self._check_held: Callable[[], None] = lambda: None
        if writes:
            with stores.disk_errors(path):
                stores.make_folder(path)
                self._changed = self._has_other_config(allow_change)

    @property
    def done(self) -> bool:
        """Whether the run is complete; records that were damaged since are logged."""
        if self._changed:
            return False
        try:
            with stores.disk_errors(self.path, missing=True):
                wrong = damaged_files(self.path)
        except FileNotFoundError:
            return False
        if wrong:
            logging.getLogger(__name__).warning(
                "%s: %s damaged since the run was done; training it again",
                self.path,
                ", ".join(wrong),
            )
        return not wrong

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for writing; wait a little if a dying process still holds it."""
        with stores.disk_errors(self.path), stores.hold(self.path) as self._check_held:
            yield

    def check_held(self) -> None:
        """Raise a UserError if another process has taken the folder over."""
        with stores.disk_errors(self.path):
            self._check_held()

    def begin(self) -> None:
        """Write what is known before training."""
        self.check_held()
        if self._changed:  # what was complete no longer is
            with stores.disk_errors(self.path):
                stores.unlink(self.path / DONE)
        write_record(self.path, self.run)
        self._changed = False

    def finish(self, summary: Summary) -> None:
        """Write the summary; then, unless the run was interrupted, mark the folder complete."""
        summary.write(self.path)
        if summary.status != INTERRUPTED:
            mark_done(self.path)

    def summary(self) -> Summary:
        """The summary as written.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            with stores.disk_errors(self.path):
                return Summary.read(self.path)
        except Unreadable as error:
            raise UserError(
                f"{self.path}: {error}; delete that file and {DONE} beside it, then give the same "
                "command again"
            ) from None

    def _has_other_config(self, allow_change: bool) -> bool:
        found = read_config(self.path)
        if found is None:
            return False  # absent or damaged: it will be written again
        wanted = self.run.config
        for name in NOT_IDENTITY:
            found.pop(name, None)
            wanted.pop(name, None)
        different = differences(found, wanted)
        if not different:
            return False
        shown = "; ".join(different[:4]) + ("; …" if len(different) > 4 else "")
        fixed = [line for line in different if line.startswith(_FIXED)]
        if not allow_change:
            raise UserError(
                f"{self.path} holds a run of another config ({shown}); use another --workdir, "
                "delete that folder, or continue with the new config by --allow_config_change"
            )
        if fixed:
            raise UserError(
                f"{self.path} holds a run that cannot continue with this config ({fixed[0]}); use "
                f"another --workdir, with --restore_from={self.path} to begin with its state"
            )
        return True


def differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """What differs between two nested configs, a line a field.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    ['a.b is 1 there and 2 here']
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for name in sorted({*found, *wanted})
            for line in differences(
                found.get(name, "missing"), wanted.get(name, "missing"), f"{path}.{name}".strip(".")
            )
        ]
    same = json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)
    return [] if same else [f"{path} is {found!r} there and {wanted!r} here"]
