"""Draw the curves of finished runs, a folder a seed: accuracy and loss over examples seen.

    python -m benchmarks.draw_run OUT RUN_FOLDER [RUN_FOLDER ...]

writes OUT.png and OUT.csv (a row an evaluation and run) and prints the final accuracies.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bs_jax.records.metrics_file import read_rows
from bs_jax.report import style
from bs_jax.statistics.contrasts import mean_interval

COLUMNS = (
    *("seed", "step", "examples", "train/loss", "train/accuracy"),
    *("eval/loss", "eval/accuracy", "eval/smoothed_accuracy"),
)


def read_run(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, with its seed."""
    seed = json.loads((folder / "config.json").read_text(encoding="utf-8"))["seed"]
    return [{"seed": seed, **row} for row in read_rows(folder / "metrics.jsonl")]


def draw(runs: list[list[dict[str, Any]]]) -> bytes:
    """Training and evaluation accuracy beside the losses, a line a run."""
    from matplotlib.figure import Figure

    with style.drawing():
        figure = Figure(figsize=(7.4, 3.0), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, name, factor in zip(panels, ("accuracy", "loss"), (100, 1), strict=True):
            for part, colour in (("train", style.MUTED), ("eval", style.ARM_COLOURS[0][0])):
                for number, rows in enumerate(runs):
                    points = [row for row in rows if f"{part}/{name}" in row]
                    axes.plot(
                        [row["examples"] / 1000 for row in points],
                        [row[f"{part}/{name}"] * factor for row in points],
                        color=colour,
                        lw=1.2,
                        label=part if number == 0 else None,
                    )
            axes.set_xlabel("thousand examples seen")
            axes.set_ylabel(f"{name} (%)" if name == "accuracy" else name)
            axes.legend(frameon=False)
    return style.to_png(figure)


def main() -> None:
    """Write the figure and the table."""
    if len(sys.argv) < 3:
        sys.exit("usage: python -m benchmarks.draw_run OUT RUN_FOLDER [RUN_FOLDER ...]")
    out = Path(sys.argv[1])
    runs = [read_run(Path(name)) for name in sys.argv[2:]]
    out.with_suffix(".png").write_bytes(draw(runs))
    with open(out.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for rows in runs for row in rows if "eval/accuracy" in row)
    finals = [rows[-1]["eval/accuracy"] for rows in runs]
    found = mean_interval(finals)
    print("final accuracies:", ", ".join(f"{value:.2%}" for value in finals))
    if np.isfinite(found.low):
        print(f"mean {found.mean:.2%}, 95 % interval [{found.low:.2%}, {found.high:.2%}]")


if __name__ == "__main__":
    main()
