"""From the command to the first update: cold, and with the compilation cache.

python -m benchmarks.startup --model=xresnet50 --image_size=64 --batch_size=32 --json=F

Every measurement is a process of its own; the first finds an empty cache, the others what the
first has left. `phases` are seconds since the process was started. With --one_by_one each program
is compiled at its first call; without, all of them side by side before, as the trainer does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import _measure

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("imports", "data", "programs", "initial state", "first update", "evaluation")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="xresnet50")
    parser.add_argument("--image_size", type=int, default=64, help="pixels")
    parser.add_argument("--batch_size", type=int, default=32, help="examples an update")
    parser.add_argument("--repeats", type=int, default=2, help="starts with the cache")
    parser.add_argument("--one_by_one", action="store_true", help="compile at the first calls")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--json", help="file to write the result to")
    flags = parser.parse_args(arguments)
    if flags.child is not None:
        print(json.dumps(child(flags)))
        return {}
    with tempfile.TemporaryDirectory() as folder:
        cold = start(flags, folder)
        warm = [start(flags, folder) for _ in range(flags.repeats)]
    result = {
        "model": flags.model,
        "image_size": flags.image_size,
        "batch_size": flags.batch_size,
        "one_by_one": flags.one_by_one,
        "cold": cold,
        "cached": {phase: statistics.median(one[phase] for one in warm) for phase in PHASES},
        "environment": _measure.environment(),
    }
    for name in ("cold", "cached"):
        print(name, {phase: round(result[name][phase], 2) for phase in PHASES})
    if flags.json:
        _measure.write_json(flags.json, result)
    return result


def start(flags: argparse.Namespace, cache: str) -> dict[str, float]:
    """Start a process and read its phases."""
    command = [sys.executable, "-m", "benchmarks.startup", f"--child={time.time()}"]
    command += [f"--{n}={getattr(flags, n)}" for n in ("model", "image_size", "batch_size")]
    command += ["--one_by_one"] * flags.one_by_one
    environment = dict(os.environ, BS_JAX_CACHE=cache)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(flags: argparse.Namespace) -> dict[str, float]:
    """What `main.py --mode=train` does up to its first update and first evaluation."""
    phases = {}

    def reached(phase: str) -> None:
        phases[phase] = time.time() - flags.child

    import jax
    import numpy as np

    from benchmarks import _programs
    from bs_jax.data import pipeline
    from bs_jax.training import compilation, parallel, step, train  # noqa: F401  what a run imports

    compilation.enable_cache()
    reached("imports")
    data = _programs.make_images(2 * flags.batch_size, flags.image_size)
    run = _programs.make_run(flags.model, flags.image_size, flags.batch_size)
    devices = jax.devices()[:1]
    programs = step.make_programs(run, _programs.CLASSES, data.image_shape, devices)
    resident = parallel.replicate(pipeline.device_arrays(data), devices)
    reached("data")
    inputs = step.run_inputs(run)
    batches = np.arange(flags.batch_size, dtype=np.int32)[None, None]
    eval_batches = (batches, np.ones(batches.shape, bool))
    if not flags.one_by_one:
        state = jax.eval_shape(programs.init, inputs)
        whole = parallel.replicated_shapes((state, inputs), devices)
        compilation.side_by_side(
            [
                (programs.init, (inputs,)),
                (programs.train_chunk, (*whole, resident, None, batches)),
                (programs.evaluate, (*whole, resident, eval_batches)),
            ]
        )
    reached("programs")
    state = jax.block_until_ready(parallel.replicate(programs.init(inputs), devices))
    inputs = parallel.replicate(inputs, devices)
    reached("initial state")
    state, metrics = programs.train_chunk(state, inputs, resident, None, batches)
    jax.block_until_ready(metrics)
    reached("first update")
    jax.block_until_ready(programs.evaluate(state, inputs, resident, eval_batches))
    reached("evaluation")
    return phases


if __name__ == "__main__":
    main()
