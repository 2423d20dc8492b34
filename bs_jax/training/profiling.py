"""Profile mode: a trace of a few updates and one evaluation, and where their time goes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gzip
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bs_jax.data import pipeline
from bs_jax.data.image_data import ArraySplit, ImageData
from bs_jax.records import stores
from bs_jax.run import ResolvedRun
from bs_jax.training import checks, parallel, plan, step

UPDATES = 10
_EXAMPLES = 4096  # enough for any cache to miss; a part of the data set, so that it is there soon


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a trace says.

    Attributes:
        folder: of the trace: TensorBoard or xprof open it, and ``perfetto_trace.json.gz`` in it
            opens at ui.perfetto.dev.
        seconds_per_update: of wall time, in the traced updates.
        operations: (name, share of the time that operations take), the longest first.
    """

    folder: Path
    seconds_per_update: float
    operations: list[tuple[str, float]]

    def to_text(self, rows: int = 12) -> str:
        """The longest operations, a line each."""
        what = "longest operations:" if self.operations else "its operations show in xprof alone"
        lines = [f"{1e3 * self.seconds_per_update:.2f} ms an update; {what}"]
        lines += [f"  {share:6.1%}  {name}" for name, share in self.operations[:rows]]
        lines.append(f"Trace: {self.folder} (TensorBoard, xprof; Perfetto: *perfetto_trace*)")
        return "\n".join(lines)


def profile(
    run: ResolvedRun,
    data: ImageData,
    devices: parallel.Devices,
    folder: Path,
    updates: int = UPDATES,
) -> Profile:
    """Trace `updates` updates and one batch of evaluation, after everything is compiled.

    Args:
        run: the run.
        data: the data set that it names; its first examples are enough.
        devices: to spread every batch over.
        folder: for the trace.
        updates: how many to trace.

    Raises:
        UserError: the run does not fit the devices or the data.
    """
    checks.check_devices(run, len(devices))
    checks.check_data(run, len(data.train), data.image_shape[-1])
    programs = step.make_programs(run, data.num_classes, data.train.image_shape, devices)
    train = _resident(data.train, max(_EXAMPLES, run.batch_size), devices)
    evaluation = _resident(data.eval, run.eval_batch_size, devices)
    inputs = parallel.replicate(step.run_inputs(run), devices)
    state = parallel.replicate(programs.init(step.run_inputs(run)), devices)
    order = np.arange(updates * run.batch_size, dtype=np.int32) % len(train[1])
    batches = plan.per_device(order.reshape(updates, -1), len(devices))
    examples = len(evaluation[1]) // len(devices) * len(devices)
    numbers = np.arange(examples, dtype=np.int32).reshape(1, -1)
    eval_batches = tuple(
        plan.per_device(leaf, len(devices)) for leaf in (numbers, np.ones(numbers.shape, bool))
    )
    elapsed = 0.0

    def once(state: Any) -> Any:
        nonlocal elapsed
        start = time.perf_counter()
        state, metrics = programs.train_chunk(state, inputs, train, None, batches)
        jax.block_until_ready(metrics)
        elapsed = time.perf_counter() - start
        jax.block_until_ready(programs.evaluate(state, inputs, evaluation, eval_batches))
        return state

    state = once(state)
    stores.make_folder(folder)
    outbox = stores.Outbox(folder)
    with contextlib.closing(outbox):
        with jax.profiler.trace(str(outbox.folder), create_perfetto_trace=True):
            once(state)
        found = operations(outbox.folder)
        with stores.disk_errors(folder):
            outbox.send()
    return Profile(folder, elapsed / updates, found)


def operations(folder: Path) -> list[tuple[str, float]]:
    """Names of the operations in the newest trace below a folder and their shares of the time."""
    # The JSON form: reading the other aborts the process in some versions of jaxlib.
    path = max(folder.rglob("perfetto_trace.json.gz"), key=lambda found: found.stat().st_mtime)
    total: collections.Counter[str] = collections.Counter()
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        name = event.get("args", {}).get("hlo_op")
        # A loop's time is that of the operations within it.
        if name is not None and not str(name).startswith("while"):
            total[str(name)] += event.get("dur", 0)
    whole = sum(total.values()) or 1
    return [(name, duration / whole) for name, duration in total.most_common()]


def _resident(split: Any, count: int, devices: parallel.Devices) -> Any:
    chosen = np.arange(min(count, len(split)))
    part = ArraySplit(split.read(chosen), split.labels[chosen], split.aspects[chosen])
    return parallel.replicate(pipeline.device_arrays(part), devices)
