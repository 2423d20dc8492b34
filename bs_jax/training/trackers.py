"""Where the metrics of a run go beside its records: a CSV file, TensorBoard, W&B, MLflow.

The records (``metrics.jsonl``) are what a run resumes from and what a report reads; a tracker is a
view of them. To add one, write a class with the three methods of `Tracker` and name it in
`TRACKERS`. A run that ends or stops has ``metrics.csv`` in any case.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import importlib.util
import io
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from bs_jax.errors import UserError
from bs_jax.records import metrics_file, stores
from bs_jax.run import ResolvedRun
from bs_jax.schema import choose


class Tracker(Protocol):
    """Shows the metrics of one run while it is trained. Made of (run, folder, examples).

    The arguments are the run, its folder, and the examples seen by the state that it goes on from:
    what was logged beyond them, before an interruption, is about to be logged again.
    """

    def log(self, examples: int, values: Mapping[str, float]) -> None:
        """Take in the metrics at a number of examples seen."""
        ...

    def flush(self) -> None:
        """Let others see all that was logged; called after every checkpoint."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run; the steps are examples."""

    def __init__(self, run: ResolvedRun, folder: Path, examples: int) -> None:
        from tensorboardX import SummaryWriter

        self._folder = folder
        self._outbox = stores.Outbox(folder / "tensorboard")
        # TensorBoard drops what an interrupted run has logged from this step on. It reads the files
        # by their names, which hold the second: a run that goes on within it needs more.
        self._writer = SummaryWriter(
            str(self._outbox.folder),
            purge_step=examples + 1,
            filename_suffix=f".{examples:015d}",
        )

    def log(self, examples: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, examples)

    def flush(self) -> None:
        """See `Tracker`."""
        self._writer.flush()
        with stores.disk_errors(self._folder):
            self._outbox.send()

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()
        self._outbox.close()


class WeightsAndBiases:
    """A run of the W&B project that is named like the recipe; the steps are examples.

    W&B keeps the first value of a step, so what is logged again after an interruption is passed
    over.
    """

    def __init__(self, run: ResolvedRun, folder: Path, examples: int) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=run.name,
            id=_identity(run, folder),
            name=run.run_id,
            config=run.config,
            resume="allow",
            reinit="create_new",  # runs that are vmapped are open at the same time
        )

    def log(self, examples: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=examples)

    def flush(self) -> None:
        """See `Tracker`: W&B sends by itself."""

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class MLflow:
    """A run of the MLflow experiment that is named like the recipe; the steps are examples."""

    _TAG = "bs_jax.run"

    def __init__(self, run: ResolvedRun, folder: Path, examples: int) -> None:
        mlflow = importlib.import_module("mlflow")
        self._metric = importlib.import_module("mlflow.entities").Metric
        self._client = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(run.name)
        number = (
            experiment.experiment_id if experiment else self._client.create_experiment(run.name)
        )
        identity = _identity(run, folder)
        found = self._client.search_runs([number], f"tags.`{self._TAG}` = '{identity}'")
        if found:
            self._id = found[0].info.run_id
        else:
            made = self._client.create_run(number, tags={self._TAG: identity}, run_name=run.run_id)
            self._id = made.info.run_id
            self._client.log_dict(self._id, run.config, "config.json")

    def log(self, examples: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, examples) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def flush(self) -> None:
        """See `Tracker`: every batch is sent at once."""

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id)


# Name in config.trackers -> class, the package it needs.
TRACKERS: dict[str, tuple[type[Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}


def names_of(run: ResolvedRun) -> tuple[str, ...]:
    """The trackers of a run: those of ``config.trackers``, and of ``config.tensorboard``."""
    names = ("tensorboard",) if run.tensorboard else ()
    return tuple(dict.fromkeys((*names, *run.trackers)))


def check(runs: Iterable[ResolvedRun]) -> None:
    """Raise a UserError for a tracker that is unknown or not installed."""
    for name in dict.fromkeys(name for run in runs for name in names_of(run)):
        choose("tracker in config.trackers", name, TRACKERS)
        package = TRACKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"config.trackers names {name!r}, but the package {package} is not installed; "
                f"run pip install {package}, or leave it out"
            )


def opened(run: ResolvedRun, folder: Path, examples: int) -> list[Tracker]:
    """Open the trackers of a run.

    Args:
        run: the run.
        folder: of the run.
        examples: seen by the state that it goes on from.

    Returns:
        The trackers. One of a service that fails is dropped with a warning: the records are whole
        without it.
    """
    found: list[Tracker] = []
    for name in names_of(run):
        make = TRACKERS[name][0]
        found.append(
            TensorBoard(run, folder, examples)
            if make is TensorBoard
            else _Service(name, make, run, folder, examples)
        )
    return found


class _Service:
    """A tracker that talks to a service. If that fails, training goes on without it."""

    def __init__(self, name: str, make: Any, *arguments: Any) -> None:
        self._name, self._tracker = name, None
        self._tracker = self._tried(make, *arguments)

    def _tried(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # whatever a service's client raises
            self._tracker = None
            logging.getLogger(__name__).warning(
                "tracker %s fails (%s: %s); training goes on without it",
                self._name,
                type(error).__name__,
                " ".join(str(error).split())[:200],
            )
            return None

    def log(self, examples: int, values: Mapping[str, float]) -> None:
        if self._tracker is not None:
            self._tried(self._tracker.log, examples, values)

    def flush(self) -> None:
        if self._tracker is not None:
            self._tried(self._tracker.flush)

    def close(self) -> None:
        if self._tracker is not None:
            self._tried(self._tracker.close)


def write_csv(folder: Path) -> None:
    """Write the metrics of a run as ``metrics.csv``; what a row does not hold is empty.

    Args:
        folder: of the run.
    """
    rows = metrics_file.read_rows(folder / "metrics.jsonl")
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with stores.disk_errors(folder):
        stores.write_bytes(folder / "metrics.csv", text.getvalue().encode())


def _identity(run: ResolvedRun, folder: Path) -> str:
    """The same for a run that is resumed, another for the same training in another folder."""
    digest = hashlib.sha256(stores.text_of(folder).encode()).hexdigest()[:8]
    return f"{run.run_id}-{digest}"
