"""All that is measured on a GPU, by one command: `python -m benchmarks.gpu --json=F`.

bfloat16, channels last, hundreds of updates as one donated program, the data on the device; against
PyTorch in bfloat16 autocast, channels last, eager and through torch.compile, on the same card:

- steps: xresnet50 at 128 px, batches 64 and 256 (goal: 1.2 times torch.compile) and 8 (3 times
  eager: a scan keeps a small batch's card busy)
- roofline: the time that the card's measured peak and bandwidth would allow, beside the real one
- side by side: images/s of 1, 2, 4, ... runs vmapped at batch 8, up to what fits in memory
- recipe: minutes that five epochs of the Imagenette recipe take at the measured rate

`--tiny` runs everything at a size that any CPU does in a minute, to see that it works; PyTorch is
left out where it is not installed (`pip install 'bs_jax[bench]'`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _measure, _programs, train_step
from bs_jax.data import pipeline
from bs_jax.training import memory

_RECIPE_EXAMPLES = 5 * 9469  # of Imagenette's training set


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is."""

    model: str = "xresnet50"
    image_size: int = 128
    batch_sizes: tuple[int, ...] = (256, 64, 8)
    steps: int = 50
    rounds: int = 7
    most_runs: int = 64
    matmul: int = 8192
    copied_floats: int = 2**28


TINY = Size("xresnet18", 16, (8, 4), steps=2, rounds=2, most_runs=2, matmul=64, copied_floats=4096)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a size for a CPU, to see that it runs")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--against", choices=("torch", "nothing"), default="torch")
    parser.add_argument("--json", help="file to write the result to")
    flags = parser.parse_args(arguments)
    size = TINY if flags.tiny else Size()
    if jax.default_backend() == "cpu" and not flags.tiny:
        raise SystemExit("no GPU is at hand; --tiny shows on a CPU that everything runs")
    against = flags.against
    if importlib.util.find_spec("torch") is None:
        against = "nothing"
    bandwidth = copy_bandwidth(size.copied_floats)
    steps = [
        _step(size, batch_size, flags.dtype, against, bandwidth, compiled=not flags.tiny)
        for batch_size in size.batch_sizes
    ]
    result = {
        "steps": steps,
        "bytes_per_second": bandwidth,
        "side_by_side": side_by_side(size, flags.dtype),
        "recipe_minutes": {
            str(step["batch_size"]): _RECIPE_EXAMPLES / step["images_per_second"] / 60
            for step in steps
        },
        "environment": _measure.environment(),
    }
    _tell(result)
    if flags.json:
        _measure.write_json(flags.json, result)
    return result


def _step(
    size: Size, batch_size: int, dtype: str, against: str, bandwidth: float, *, compiled: bool
) -> dict[str, Any]:
    flags = argparse.Namespace(
        model=size.model,
        image_size=size.image_size,
        batch_size=batch_size,
        dtype=dtype,
        against=against,
        compiled=compiled and against == "torch",
        steps=size.steps,
        rounds=size.rounds,
        matmul=size.matmul,
    )
    found = train_step.measure(flags)
    moved = bytes_per_step(flags)
    found["roofline"] = {
        "bytes_per_step": moved,
        "seconds_by_arithmetic": found["flops_per_step"] / found["peak_flops_per_second"],
        "seconds_by_memory": moved / bandwidth,
    }
    return found


def bytes_per_step(flags: argparse.Namespace) -> float:
    """Bytes that the compiled step reads and writes, as XLA counts them."""
    run = _programs.make_run(
        flags.model, flags.image_size, flags.batch_size, **{"model.dtype": flags.dtype}
    )
    data = _programs.make_images(flags.batch_size, flags.image_size)
    chunk, arguments = _programs.chunk_and_arguments(run, data, 1)
    cost = chunk.lower(*arguments).compile().cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    return float(cost.get("bytes accessed", 0.0))


def copy_bandwidth(floats: int) -> float:
    """Bytes a second, read and written, of adding one to a long array."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(jnp.zeros(floats)))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        times.append(time.perf_counter() - start)
    return 2 * 4 * floats / min(times)


def side_by_side(size: Size, dtype: str) -> list[dict[str, float]]:
    """Images a second of so many runs in one program, at the smallest batch."""
    batch_size = min(size.batch_sizes)
    run = _programs.make_run(size.model, size.image_size, batch_size, **{"model.dtype": dtype})
    data = _programs.make_images(4 * batch_size, size.image_size)
    chunk, arguments = _programs.chunk_and_arguments(run, data, 1, runs=1)
    own = memory.peak_bytes(chunk, *arguments)
    budget = pipeline.device_budget_bytes(jax.local_devices()[0], 1.0)
    most = memory.runs_at_once(own, data.images.nbytes, budget, size.most_runs)
    rows, runs = [], 1
    while runs <= most:
        program = _programs.train_chunks(run, data, size.steps, runs=runs)
        seconds = min(_measure.interleave({"runs": program}, rounds=size.rounds)["runs"])
        rate = runs * batch_size * size.steps / seconds
        rows.append({"runs": runs, "images_per_second": rate, "bytes_per_run": own})
        runs *= 2
    return rows


def _tell(result: dict[str, Any]) -> None:
    for step in result["steps"]:
        print(f"{step['model']}, {step['image_size']} px, batch {step['batch_size']}")
        print(_measure.table(step["programs"]))
        limits = step["roofline"]
        bound = max(limits["seconds_by_arithmetic"], limits["seconds_by_memory"])
        print(
            f"{step['images_per_second']:.0f} images/s, {step['share_of_peak']:.0%} of peak; the "
            f"roofline allows {1e3 * bound:.2f} ms a step; five epochs of the recipe: "
            f"{result['recipe_minutes'][str(step['batch_size'])]:.1f} minutes\n"
        )
    for row in result["side_by_side"]:
        print(f"{row['runs']:4.0f} runs side by side: {row['images_per_second']:10.0f} images/s")


if __name__ == "__main__":
    main()
