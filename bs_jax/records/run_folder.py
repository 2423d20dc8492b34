"""One folder a run: who may write in it, what is in it, and when it counts as done."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bs_jax.errors import UserError
from bs_jax.records.stores import lease, storage

_LOCK_PATIENCE_SECONDS = 60.0
# What a saved state has no meaning without.
_FIXED = ("batch_size", "data.", "ema_decay", "model.", "optimizer.name", "scaling.rule", "seed")
_RECORDS = ("config.json", "hparams.json", "metrics.jsonl", "summary.json")


@dataclasses.dataclass(frozen=True)
class Run:
    """A point met with its recipe: everything that training needs, resolved and frozen.

    Attributes:
        run_id: stable name made from the content.
        config: the config as trained (nested, JSON only): hyperparameters of a fixed rule are
            already scaled in it, those of a rule that works while training are the base's.
        hparams: the record of what was scaled, how and why (``hparams.json``).
    """

    run_id: str
    config: dict[str, Any]
    hparams: dict[str, Any]


class RunFolder:
    """The record of one run: ``config.json hparams.json metrics.jsonl summary.json DONE``.

    ``DONE`` is written last and holds the checksums of the others, so a folder that has it and
    fits it is complete. Only one process writes in a
    folder at a time (a lock on ``LOCK`` that the system releases however the process ends; in an
    object store a lease, see `bs_jax.records.stores.lease`).

    Args:
        path: the folder, see `storage.to_path`; made if missing.
        run: what is to be trained in it.
        writes: False in a process that leaves reading and writing to another: nothing is touched.
        allow_change: go on with a run of another config, where its state has a meaning under this
            one too.

    Raises:
        UserError: the folder cannot be written, or holds a run of another config.
    """

    def __init__(
        self, path: Path, run: Run, *, writes: bool = True, allow_change: bool = False
    ) -> None:
        self.path = path
        self.run = run
        self._allow_change, self._changed = allow_change, False
        self._lease: lease.Lease | None = None
        if not writes:
            return
        with disk_errors(path):
            storage.make_folder(path)
            self._refuse_other_config()

    @property
    def done(self) -> bool:
        """Whether the run is complete; where its records were damaged since, that is logged."""
        if self._changed:
            return False
        try:
            with disk_errors(self.path, missing=True):
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
        """Hold the folder for writing; wait a little for a dying process to let go of it."""
        if storage.is_remote(self.path):
            with disk_errors(self.path), lease.held(self.path) as self._lease:
                yield
            return
        with disk_errors(self.path), open(self.path / "LOCK", "w", encoding="utf-8") as lock:
            deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"another process is training in {self.path}; "
                            "wait for it, or give this one another --workdir"
                        ) from None
                    time.sleep(0.1)
            yield

    def check_held(self) -> None:
        """Raise a UserError if another process has taken the folder over; see `Lease.check`."""
        if self._lease is not None:
            with disk_errors(self.path):
                self._lease.check()

    def begin(self) -> None:
        """Write what is known before training."""
        self.check_held()
        if self._changed:  # what was done is no longer all
            with disk_errors(self.path):
                storage.unlink(self.path / "DONE")
        config = write_json(self.path / "config.json", self.run.config)
        self._changed = False
        write_json(self.path / "hparams.json", {**self.run.hparams, "config_sha256": config})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary; then, unless the run was interrupted, mark the folder complete."""
        write_json(self.path / "summary.json", summary)
        if summary["status"] != "interrupted":
            with disk_errors(self.path):
                marks = {name: _sha256(self.path / name) for name in _RECORDS}
            write_json(self.path / "DONE", {name: mark for name, mark in marks.items() if mark})

    def summary(self) -> dict[str, Any]:
        """The summary as written."""
        with disk_errors(self.path, missing=True):
            return json.loads(storage.read_bytes(self.path / "summary.json"))

    def _refuse_other_config(self) -> None:
        try:
            content = storage.read_bytes(self.path / "config.json")
            found = json.loads(content)
        except (FileNotFoundError, ValueError, RecursionError):
            return  # absent or damaged: it will be written again
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            hparams = json.loads(storage.read_bytes(self.path / "hparams.json"))
            if hparams["config_sha256"] != hashlib.sha256(content).hexdigest():
                return  # damaged as well, though it can be read
        different = differences(found, self.run.config)
        if not different:
            return
        shown = "; ".join(different[:4]) + ("; …" if len(different) > 4 else "")
        fixed = [line for line in different if line.split(" ")[0].startswith(_FIXED)]
        if not self._allow_change:
            raise UserError(
                f"{self.path} holds a run of another config ({shown}); use another --workdir, "
                "delete that folder, or go on with the new config by --allow_config_change"
            )
        if fixed:
            raise UserError(
                f"{self.path} holds a run that cannot go on with this config ({fixed[0]}); use "
                f"another --workdir, with --restore_from={self.path} to begin with its state"
            )
        self._changed = True


def damaged_files(folder: Path) -> list[str]:
    """The names of a finished run's files that are not as they were when it was done.

    Args:
        folder: of the run.

    Raises:
        FileNotFoundError: the run is not done.
    """
    content = storage.read_bytes(folder / "DONE")
    if not content:
        return []  # a folder marked by hand or by an older version, without checksums
    try:
        wanted = json.loads(content)
        wanted = {name: str(wanted[name]) for name in _RECORDS if name in wanted}
    except (ValueError, KeyError, TypeError, RecursionError):
        return ["DONE"]
    wrong = []
    for name, digest in wanted.items():
        try:
            found = _sha256(folder / name)
        except storage.StoreError:
            raise  # not the file's fault
        except OSError:
            found = ""
        if found != digest:
            wrong.append(name)
    return wrong


def _sha256(path: Path) -> str:
    """Of a file; "" where there is none."""
    try:
        return hashlib.sha256(storage.read_bytes(path)).hexdigest()
    except FileNotFoundError:
        return ""


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


class MetricsFile:
    """``metrics.jsonl``: a JSON object a line, in order of examples seen.

    Args:
        path: the file. Lines beyond `examples` (written after the checkpoint that training goes
            on from) and a torn last line are cut off.
        examples: of the state that training goes on from.

    Attributes:
        kept: the rows that were there already.
    """

    def __init__(self, path: Path, examples: int) -> None:
        self._path = path
        with disk_errors(path):
            self.kept, text = _kept(path, examples)
            self._digest = hashlib.sha256(text.encode())
            if not storage.exists(path) or storage.read_bytes(path) != text.encode():
                storage.write_bytes(path, text.encode())
            self._file = storage.Appender(path, text)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows and hand them to the system; to an object store every few seconds."""
        text = "".join(_line(row) for row in rows)
        with disk_errors(self._path):
            self._file.write(text)
        self._digest.update(text.encode())

    def flush(self) -> None:
        """Return when others can read all rows."""
        with disk_errors(self._path):
            self._file.flush()

    @property
    def digest(self) -> bytes:
        """sha256 of all that was written."""
        return self._digest.digest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def metrics_digest(path: Path, examples: int) -> bytes:
    """The `MetricsFile.digest` of what a file holds up to so many examples."""
    return hashlib.sha256(_kept(path, examples)[1].encode()).digest()


def _kept(path: Path, examples: int) -> tuple[list[dict[str, Any]], str]:
    rows = [row for row in _whole_lines(path) if row["examples"] <= examples]
    return rows, "".join(_line(row) for row in rows)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        return []
    rows = []
    for text in content.decode("utf-8", "replace").split("\n"):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("examples"), int):
            break
        rows.append(row)
    return rows


def finite(value: Any) -> Any:
    """The value with every non-finite number as None, since JSON has none of them."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Any) -> str:
    """Write a whole JSON file or none: readers never see half of one. Its sha256 comes back."""
    text = json.dumps(finite(content), indent=1, sort_keys=True, allow_nan=False) + "\n"
    with disk_errors(path):
        storage.write_bytes(path, text.encode())
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path, *, missing: bool = False) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk or store into a line that says what to do.

    Args:
        path: what is written or read.
        missing: let FileNotFoundError pass.
    """
    try:
        with storage.plainly():
            yield
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # What belongs in a store is written in a temporary folder first: that may be full.
            full = error.filename if storage.is_remote(path) and error.filename else path
            raise UserError(
                f"no space left while writing {full}; free some space and give the same command "
                "again: finished runs are kept"
            ) from error
        if isinstance(error, FileExistsError | IsADirectoryError):
            path = error.filename2 or error.filename or path  # something else lies in its place
        elif not isinstance(error, FileNotFoundError | NotADirectoryError) and (
            error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM)
        ):
            raise
        raise UserError(
            f"cannot write {path}: {error.strerror}; give a --workdir that can be written"
        ) from error


def check_writable(workdir: Path) -> None:
    """Raise a UserError at once if the work folder cannot take files."""
    with disk_errors(workdir):
        storage.make_folder(workdir)
        probe = workdir / f".probe-{os.getpid()}"
        if storage.is_remote(probe):
            storage.write_bytes(probe, b"x")
        else:
            probe.write_bytes(b"x" * 4096)
        storage.unlink(probe)
