"""The trainer's own compiled programs for a network and an image size, on made-up images."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bs_jax.data import pipeline
from bs_jax.data.image_data import ArraySplit
from bs_jax.recipe import ResolvedRun

CLASSES = 10


def make_images(count: int, image_size: int, channels: int = 3) -> ArraySplit:
    """Noise, the same every time."""
    draw = np.random.default_rng(0)
    shape = (count, image_size, image_size, channels)
    images = draw.integers(0, 256, shape, dtype=np.uint8)
    return ArraySplit(images, draw.integers(0, CLASSES, count, dtype=np.int32))


def make_run(model: str, image_size: int, batch_size: int, **overrides: Any) -> ResolvedRun:
    """A run by the default recipe, plain AdamW at its own batch size."""
    from bs_jax.sweep.points import resolve
    from configs.fashion_mnist import get_config

    settings = {
        "model.name": model,
        "batch_size": batch_size,
        "base_batch_size": batch_size,
        "micro_batch_size": batch_size,
        "ghost_batch_size": 0,
        "scaling.rule": "none",
        "train_examples": max(1_000_000, batch_size),
        "data.image_size": image_size,
        "data.mean": (0.5,),
        "data.std": (0.25,),
    }
    return resolve(json.loads(get_config().to_json()), settings | overrides)


def request_devices(count: int) -> int:
    """Ask for so many devices before JAX has started; on a CPU they are made. Those there are."""
    if jax.config.values["jax_platforms"] in (None, "cpu"):
        with contextlib.suppress(RuntimeError):  # JAX has started: it keeps those it has
            jax.config.update("jax_num_cpu_devices", count)
    return min(count, jax.local_device_count())


def chunk_and_arguments(
    run: ResolvedRun, data: ArraySplit, steps: int, devices: int = 1, runs: int = 0
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The compiled chunk that the trainer runs, and what it is called with at the start of a run.

    Args:
        run: the run.
        data: held on the device.
        steps: updates a call.
        devices: how many to spread a batch over.
        runs: how many to advance side by side in one program; 0: one, not vmapped.
    """
    from bs_jax.training import parallel, plan, step

    used = jax.local_devices()[:devices]
    programs = step.make_programs(run, CLASSES, data.image_shape, used, vmapped=bool(runs))
    inputs = step.run_inputs(run)
    order = np.arange(steps * run.batch_size, dtype=np.int32) % len(data)
    batches = plan.per_device(order.reshape(steps, -1), devices)
    if runs:
        inputs = jax.tree.map(lambda leaf: jnp.stack([leaf] * runs), inputs)
        batches = np.stack([batches] * runs, axis=1)
    state = parallel.replicate(programs.init(inputs), used)
    inputs = parallel.replicate(inputs, used)
    resident = parallel.replicate(pipeline.device_arrays(data), used)
    return programs.train_chunk, (state, inputs, resident, batches)


def train_chunks(
    run: ResolvedRun, data: ArraySplit, steps: int, devices: int = 1, runs: int = 0
) -> Callable[[], Any]:
    """A call that takes `steps` updates and returns their metrics; see `chunk_and_arguments`."""
    chunk, (state, *others) = chunk_and_arguments(run, data, steps, devices, runs)

    def run() -> Any:
        nonlocal state
        state, metrics = chunk(state, *others)
        return metrics

    return run


def streamed_chunks(run: ResolvedRun, data: ArraySplit) -> Callable[[Any], Any]:
    """A call that takes the updates of one streamed chunk: (images, labels, aspects)."""
    from bs_jax.training import parallel, plan, step

    used = jax.local_devices()[:1]
    programs = step.make_programs(run, CLASSES, data.image_shape, used)
    inputs = step.run_inputs(run)
    state = parallel.replicate(programs.init(inputs), used)
    inputs = parallel.replicate(inputs, used)

    def run(chunk: Any) -> Any:
        nonlocal state
        batches = tuple(plan.per_device(leaf, 1) for leaf in chunk)
        state, metrics = programs.train_chunk(state, inputs, (), batches)
        return metrics

    return run
