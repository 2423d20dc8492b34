"""Results of a sweep made up in memory, for tests of statistics and of what the report says."""

from pathlib import Path

from bs_jax.records.results import Results, Row, Run, Sweep

MARGIN = 0.01
SWEEP = Sweep("s", "c", "t", "", 64, "acc", "loss", "train/loss", MARGIN, (), "", "", None)


def made_up(groups, seeds_of=lambda values: range(len(values)), curve=None):
    """Results in memory: {(arm, batch size): finals}; None in the finals is a diverged run."""
    rows, runs = [], {}
    for (arm, batch_size), values in groups.items():
        for seed, value in zip(seeds_of(values), values, strict=True):
            run_id = f"{arm}-{batch_size}-{seed}"
            status = "diverged" if value is None else "done"
            metrics = {} if value is None else {"acc": value, "loss": 1 - value}
            made = {"train/loss": curve(arm, batch_size, seed)} if curve else {}
            runs[run_id] = Run(run_id, status, metrics, "", {}, {}, (), made, None)
            k = batch_size / 64
            rows.append(Row(arm, batch_size, k, 1.0, seed, run_id, status, metrics, {}))
    return Results(Path(), SWEEP, tuple(rows), runs, (), ())
