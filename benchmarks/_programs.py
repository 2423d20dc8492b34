"""The trainer's own compiled programs for a network and an image size, on made-up images."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _kernels
from bs_jax.data import pipeline
from bs_jax.data.image_data import ArraySplit
from bs_jax.models import layer_forms
from bs_jax.run import ResolvedRun

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
    run: ResolvedRun,
    data: ArraySplit,
    steps: int,
    devices: int = 1,
    runs: int = 0,
    counted: bool = False,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The compiled chunk that the trainer runs, and what it is called with at the start of a run.

    Args:
        run: the run.
        data: held on the device.
        steps: updates a call.
        devices: how many to spread a batch over.
        runs: how many to advance side by side in one program; 0: one, not vmapped.
        counted: with the number of updates as an argument, as where chunks differ in length.
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
    updates = parallel.replicate(np.int32(steps), used) if counted else None
    return programs.train_chunk, (state, inputs, resident, updates, batches)


def chunk_and_shapes(
    run: ResolvedRun,
    image_size: int,
    images: int,
    steps: int,
    devices: Sequence[Any],
    runs: int = 0,
    counted: bool = False,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """As `chunk_and_arguments`, with the arguments' shapes: the devices need not be there."""
    from bs_jax.training import step

    def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    image, side_by_side = (image_size, image_size, 3), (runs,) if runs else ()
    programs = step.make_programs(run, CLASSES, image, devices, vmapped=bool(runs))
    inputs = jax.tree.map(
        lambda leaf: shape(*side_by_side, *leaf.shape, dtype=leaf.dtype), step.run_inputs(run)
    )
    state = jax.eval_shape(programs.init, inputs)
    resident = (
        shape(images, *image, dtype=jnp.uint8),
        shape(images),
        shape(images, dtype=jnp.float32),
    )
    batches = shape(len(devices), *side_by_side, steps, run.batch_size // len(devices))
    updates = shape() if counted else None
    return programs.train_chunk, (state, inputs, resident, updates, batches)


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


class Training:
    """The trainer's chunk of `steps` updates as a worker's program.

    Args:
        spec: ``model``, ``image_size``, ``batch_size``, ``dtype``, ``steps``, and where they differ
            from what the trainer does: ``overrides`` of the recipe (field -> value), ``runs`` side
            by side, ``counted`` (see `chunk_and_arguments`), ``forms`` (see `as_asked`).
            ``keep``: folder for the trace and the program's text.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        data = make_images(4 * spec["batch_size"], spec["image_size"])
        with as_asked(spec):
            chunk, arguments = chunk_and_arguments(
                run_of(spec),
                data,
                spec["steps"],
                runs=spec.get("runs", 0),
                counted=spec.get("counted", False),
            )
            self._compiled = chunk.lower(*arguments).compile()
        self._steps, self._keep = spec["steps"], spec.get("keep")
        self._state, *self._others = arguments

    def run(self) -> None:
        """Take a turn's updates."""
        self._state, metrics = self._compiled(self._state, *self._others)
        jax.block_until_ready(metrics)

    def describe(self) -> dict[str, Any]:
        """What an update reads, writes and launches, by XLA's count and a profiler's trace."""
        cost = self._compiled.cost_analysis() or {}
        cost = cost[0] if isinstance(cost, list) else cost
        memory = self._compiled.memory_analysis()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, create_perfetto_trace=True):
                self.run()
            program = self._compiled.as_text()
            kernels = _kernels.by_group(Path(folder), program, self._steps)
            if self._keep:
                kept = Path(self._keep)
                kept.mkdir(parents=True, exist_ok=True)
                shutil.copy(_kernels.trace_file(Path(folder)), kept)
                (kept / "program.txt.gz").write_bytes(gzip.compress(program.encode()))
        return {
            "bytes_per_step": float(cost.get("bytes accessed", 0.0)),
            "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
            "kernels": kernels,
        }


def run_of(spec: Mapping[str, Any]) -> ResolvedRun:
    """The run that a worker's spec describes."""
    overrides = {"model.dtype": spec["dtype"], **spec.get("overrides", {})}
    return make_run(spec["model"], spec["image_size"], spec["batch_size"], **overrides)


@contextlib.contextmanager
def as_asked(spec: Mapping[str, Any]) -> Iterator[None]:
    """Trace networks with the changes that ``spec["forms"]`` makes to the layers' forms in use.

    Args:
        spec: its ``forms``: field of `layer_forms.LayerForms` -> value.
    """
    changed = dataclasses.replace(layer_forms.current(), **spec.get("forms", {}))
    with layer_forms.use(changed):
        yield


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
        state, metrics = programs.train_chunk(state, inputs, (), None, batches)
        return metrics

    return run
