"""What a sweep's records hold, once read: the sweep, its points as rows, its runs, their curves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DONE = "done"
DIVERGED = "diverged"
UNFINISHED = "unfinished"
MISSING = "missing"
DAMAGED = "damaged"


@dataclass(frozen=True)
class Sweep:
    """What `sweep.json` says of the whole sweep; `margin` is in units of `accuracy_metric`.

    `smoothed_metric` is a second witness in the same units; empty where there is none.
    """

    name: str
    config_name: str
    title: str
    command: str
    base_batch_size: int
    accuracy_metric: str
    loss_metric: str
    curve_metric: str
    margin: float
    warnings: tuple[str, ...]
    data: str
    model: str
    train_examples: int | None
    smoothed_metric: str = ""


@dataclass(frozen=True)
class Curve:
    """One metric over examples seen: int64 `examples`, ascending, and float64 `values`."""

    examples: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Run:
    """One run folder. `metrics` holds NaN for a number that was not finite.

    `scaled` and `base` are hyperparameters by name, None where they vary during the run.
    """

    run_id: str
    status: str
    metrics: Mapping[str, float]
    rule: str
    base: Mapping[str, float | None]
    scaled: Mapping[str, float | None]
    warnings: tuple[str, ...]
    curves: Mapping[str, Curve]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One point of the sweep, as `sweep.json` lists it; k is of the base batch size."""

    arm: str
    batch_size: int
    k: float
    offset: float
    seed: int
    run_id: str


@dataclass(frozen=True)
class Row(Point):
    """A point and what came of it; points that share a run share its numbers."""

    status: str
    metrics: Mapping[str, float]
    scaled: Mapping[str, float | None]


@dataclass(frozen=True)
class Results:
    """Everything a report is made from.

    Attributes:
      workdir: the folder it came from.
      sweep: the sweep's description.
      rows: one a point, in the order of `sweep.json`.
      runs: run_id -> run, each distinct run once.
      problems: one line a damaged or refused record, with the file's name.
      foreign: names under `runs/` that belong to no point.
    """

    workdir: Path
    sweep: Sweep
    rows: tuple[Row, ...]
    runs: Mapping[str, Run]
    problems: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def curves(self) -> dict[str, Mapping[str, Curve]]:
        """run_id -> metric -> curve over examples seen."""
        return {run_id: run.curves for run_id, run in self.runs.items()}
