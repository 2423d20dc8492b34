"""Sixteen small runs: one process a run after another, against one sweep.

python -m benchmarks.sweep --json=F          # --ways=separate,processes for a part

Every way is the command that a user would give, from a start with no compiled programs, and its
time is the command's: imports, compilation, training, evaluation, records. The ways:

- separate: `main.py --mode=train` for one run after another, each compiling for itself, all cores
- separate_cached: the same with the persistent compilation cache, which starts empty
- loop: one single-threaded worker, a compiled program for all the runs that it serves
- processes: the default on a CPU: one such worker a core
- vmap: the runs of a program side by side in one process, all cores

The results of every way are held against the first's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import _measure, sweep_config

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("separate", "separate_cached", "loop", "processes", "vmap")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--train_examples", type=int, default=7_680, help="length of every run")
    parser.add_argument("--json", help="file to write the result to")
    flags = parser.parse_args(arguments)
    ways = flags.ways.split(",")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--ways has {', '.join(sorted(unknown))}; choose from {', '.join(WAYS)}")
    seconds, losses = {}, {}
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            seconds[way] = run(way, Path(folder), flags.train_examples)
            losses[way] = final_losses(Path(folder))
        print(f"{way:16s} {seconds[way]:7.1f} s, {len(losses[way])} runs", flush=True)
    first = losses[ways[0]]
    result = {
        "runs": len(first),
        "batch_sizes": sweep_config.BATCH_SIZES,
        "train_examples": flags.train_examples,
        "seconds": seconds,
        "greatest_difference_of_final_loss": {
            way: max(abs(found[run] - first[run]) for run in first) for way, found in losses.items()
        },
        "environment": _measure.environment(),
    }
    for base in ("separate", "separate_cached"):
        if base in seconds:
            result[f"speedup_over_{base}"] = {w: seconds[base] / s for w, s in seconds.items()}
            print(f"times as fast as {base}: {result[f'speedup_over_{base}']}")
    print("final losses differ by at most", result["greatest_difference_of_final_loss"])
    if flags.json:
        _measure.write_json(flags.json, result)
    return result


def run(way: str, folder: Path, train_examples: int) -> float:
    """Train the sixteen runs in one of the ways; seconds of wall time."""
    environment = dict(os.environ, BS_JAX_CACHE=str(folder / "cache"))
    if way == "separate":
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    main_py = [
        sys.executable,
        str(ROOT / "main.py"),
        f"--config={ROOT / 'benchmarks' / 'sweep_config.py'}",
        f"--config.train_examples={train_examples}",
        f"--config.eval_every_examples={train_examples}",
    ]
    if way.startswith("separate"):
        commands = [
            [
                *main_py,
                "--mode=train",
                f"--config.batch_size={batch_size}",
                f"--config.seed={seed}",
                f"--workdir={folder / f'{batch_size}-{seed}'}",
            ]
            for batch_size in sweep_config.BATCH_SIZES
            for seed in sweep_config.SEEDS
        ]
    else:
        options = {"loop": ["--workers=1"], "processes": [], "vmap": ["--run_axis=vmap"]}[way]
        commands = [[*main_py, "--sweep=timed", f"--workdir={folder / 'runs'}", *options]]
    start = time.perf_counter()
    for command in commands:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - start


def final_losses(folder: Path) -> dict[str, float]:
    """run_id -> final evaluation loss of every run recorded anywhere in a folder."""
    summaries = [json.loads(path.read_text()) for path in folder.rglob("summary.json")]
    return {summary["run_id"]: summary["final"]["eval/loss"] for summary in summaries}


if __name__ == "__main__":
    main()
