"""The files of one run, each with its writer and its reader.

=============  =======================================================================
config.json    the config as trained, nested JSON
hparams.json   what was scaled, how and why; the sha256 of config.json
metrics.jsonl  a JSON object a line (`bs_jax.records.metrics_file`)
summary.json   how the run ended, its final metrics, what it ran on (`Summary`)
DONE           the sha256 of the other four; written last, unless the run was interrupted
=============  =======================================================================

The readers trust nothing: a file may be missing, half-written, damaged or somebody else's. They
raise `Unreadable` with a reason, or leave a field of another type at its default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bs_jax.records import stores
from bs_jax.records.json_files import (
    Unreadable,
    number,
    numbers,
    parse_object,
    read_bytes,
    read_object,
    sha256,
    text,
    texts,
    whole,
    write_json,
)

# Fields of a config in which two records of the same training may differ.
NOT_IDENTITY = (
    "name",
    "title",
    "report",
    "tensorboard",
    "trackers",
    "checkpoint_every_examples",
    "parallel",
)
CONFIG, HPARAMS, METRICS, SUMMARY, DONE = (
    "config.json",
    "hparams.json",
    "metrics.jsonl",
    "summary.json",
    "DONE",
)
_COVERED = (CONFIG, HPARAMS, METRICS, SUMMARY)  # by the checksums in DONE
RUN_FILES = (*_COVERED, DONE)

FINISHED, DIVERGED, INTERRUPTED = "done", "diverged", "interrupted"


# config.json and hparams.json


class RunRecord(Protocol):
    """What is known of a run before it is trained, as JSON.

    Attributes:
        run_id: name made from the content; the name of its folder in a sweep.
        config: the config as trained: hyperparameters of a rule known beforehand are already
            scaled in it, those of a rule that measures are the base's.
        hparams: what was scaled, how and why: ``rule batch_size base_batch_size k base scaled rows
            warnings``, and ``restored_from`` where the run goes on from another.
    """

    @property
    def run_id(self) -> str: ...  # noqa: D102

    @property
    def config(self) -> dict[str, Any]: ...  # noqa: D102

    @property
    def hparams(self) -> dict[str, Any]: ...  # noqa: D102


def write_record(folder: Path, run: RunRecord) -> None:
    """Write ``config.json``, then ``hparams.json``, whose checksum says that the first is whole."""
    checksum = write_json(folder / CONFIG, run.config)
    write_json(folder / HPARAMS, {**run.hparams, "config_sha256": checksum})


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config in a run's folder; None if there is none, or it was damaged.

    Raises:
        OSError: it cannot be read, or is not an ordinary file.
    """
    try:
        content = stores.read_bytes(folder / CONFIG)
        found = parse_object(content)
    except (FileNotFoundError, Unreadable):
        return None
    try:
        checksum = parse_object(stores.read_bytes(folder / HPARAMS)).get("config_sha256")
    except (OSError, Unreadable):
        return found
    return found if checksum in (None, sha256(content)) else None


@dataclasses.dataclass(frozen=True)
class Hparams:
    """What a report needs of ``hparams.json``.

    Attributes:
        rule: name of the scaling rule.
        base: hyperparameters at the base batch size, by name; None: varies during the run.
        scaled: hyperparameters in use, by name; None: varies during the run.
        warnings: about this run.
    """

    rule: str = ""
    base: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    scaled: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path, batch_size: int) -> Hparams:
        """Read the file of a run.

        Args:
            folder: of the run.
            batch_size: that the sweep says the run has.

        Raises:
            Unreadable: see `read_object`; or the file is of a run with another batch size.
        """
        try:
            found = read_object(folder / HPARAMS)
        except Unreadable as error:
            raise Unreadable(f"{HPARAMS}: {error}") from None
        recorded = found.get("batch_size")
        if recorded != batch_size:
            raise Unreadable(
                f"{HPARAMS}: batch_size {recorded!r} where the sweep says {batch_size}"
            )
        return cls(
            rule=text(found.get("rule")),
            base=_varying(found.get("base")),
            scaled=_varying(found.get("scaled")),
            warnings=texts(found.get("warnings")),
        )


def _varying(content: Any) -> dict[str, float | None]:
    """Numbers by name; null marks a hyperparameter that varies, not a broken number."""
    return {n: None if math.isnan(value) else value for n, value in numbers(content).items()}


# summary.json


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended and what it ran on; the content of ``summary.json``.

    Attributes:
        status: "done", "diverged" or "interrupted".
        final: the last value of every metric; NaN for a number that was not finite. Empty if the
            run diverged.
        run_id: name of the run.
        step: updates done.
        examples: examples seen.
        diverged_at_step: the update whose loss was not finite, or None.
        resumed_at_step: the update that the last process started from; 0: the beginning.
        processes: processes that trained together.
        device: number and kind of devices.
        wall_time_seconds: of the last process; NaN if not known.
        runs_at_once: runs that it trained side by side in one program, which share that time.
        started_at: time of the last process's start, UTC, ISO 8601.
        finished_at: time of its end.
        git_revision: commit of the code; "" if not known.
        versions: package -> version.
    """

    status: str
    final: Mapping[str, float]
    run_id: str = ""
    step: int = 0
    examples: int = 0
    diverged_at_step: int | None = None
    resumed_at_step: int = 0
    processes: int = 1
    device: str = ""
    wall_time_seconds: float = math.nan
    runs_at_once: int = 1
    started_at: str = ""
    finished_at: str = ""
    git_revision: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The run's share of the last process's wall time.

        >>> Summary("done", {}, wall_time_seconds=60.0, runs_at_once=4).seconds
        15.0
        """
        return self.wall_time_seconds / self.runs_at_once

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Summary:
        """Read the content of the file.

        Args:
            content: a JSON object.

        Raises:
            Unreadable: no status or no final metrics. Any other field of another type is left at
                its default.

        >>> Summary.parse({"status": "done", "final": {"eval/loss": 1}, "step": "?"}).step
        0
        """
        status, final = content.get("status"), content.get("final")
        if status not in (FINISHED, DIVERGED, INTERRUPTED) or not isinstance(final, dict):
            raise Unreadable(f"{SUMMARY}: status {status!r} with final {type(final).__name__}")
        read = numbers(final)
        for name in final:
            if name not in read:
                raise Unreadable(f"{SUMMARY}: final {name!r} is {final[name]!r:.40}")
        seconds = number(content.get("wall_time_seconds"))
        versions = content.get("versions")
        return cls(
            status=status,
            final=read,
            run_id=text(content.get("run_id")),
            step=whole(content.get("step")) or 0,
            examples=whole(content.get("examples")) or 0,
            diverged_at_step=whole(content.get("diverged_at_step")),
            resumed_at_step=whole(content.get("resumed_at_step")) or 0,
            processes=whole(content.get("processes")) or 1,
            device=text(content.get("device")),
            wall_time_seconds=math.nan if seconds is None else seconds,
            runs_at_once=max(whole(content.get("runs_at_once")) or 1, 1),
            started_at=text(content.get("started_at")),
            finished_at=text(content.get("finished_at")),
            git_revision=text(content.get("git_revision")),
            versions={name: str(version)[:40] for name, version in versions.items()}
            if isinstance(versions, dict)
            else {},
        )

    def write(self, folder: Path) -> None:
        """Write the file of a run."""
        write_json(folder / SUMMARY, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Summary:
        """Read the file of a run.

        Raises:
            Unreadable: see `read_object` and `parse`.
        """
        try:
            content = read_object(folder / SUMMARY)
        except Unreadable as error:
            raise Unreadable(f"{SUMMARY}: {error}") from None
        return cls.parse(content)


# DONE


def mark_done(folder: Path) -> None:
    """Write ``DONE``, with the checksums of a run's other files."""
    with stores.disk_errors(folder):
        marks = {}
        for name in _COVERED:
            with contextlib.suppress(FileNotFoundError):
                marks[name] = sha256(stores.read_bytes(folder / name))
    write_json(folder / DONE, marks)


def damaged_files(folder: Path) -> list[str]:
    """Names of a finished run's files that have changed since it was done.

    Args:
        folder: of the run.

    Returns:
        The names; none for a folder whose ``DONE`` is empty: marked by hand, or by a version that
        wrote no checksums.

    Raises:
        FileNotFoundError: the run is not done.
        OSError: ``DONE`` cannot be read, or is not an ordinary file.
        StoreError: the object store cannot be reached.
    """
    content = stores.read_bytes(folder / DONE)
    if not content:
        return []
    try:
        marks = parse_object(content)
    except Unreadable:
        return [DONE]
    return [n for n in _COVERED if n in marks and marks[n] != _checksum(folder / n)]


def _checksum(path: Path) -> str:
    """Of a file; "" if it is missing or cannot be read."""
    try:
        return sha256(read_bytes(path))
    except Unreadable:
        return ""
