"""What this machine trains on, and how a sweep makes the best of it.

Measured (docs/performance.md): on a CPU one single-threaded process a core is the quickest for
small networks, and runs side by side in one program are slower than alone. On an H200, 64 runs of
resnet8_patch (28 px) side by side train 6.5 times (batch size 64) to 14 times (16) as many images a
second as one after another: a small update leaves most of an accelerator idle.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

from bs_jax.errors import UserError
from bs_jax.run import ResolvedRun

# Multiply-adds of the forward pass of one update up to which runs are trained side by side on an
# accelerator. Measured were 11 million (14 times) and 45 million (6.5 times). From about 10 billion
# on, convolutions of one run are large enough to be quick alone.
_SMALL_UPDATE = 1e9
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin")
_MEMORY = 0.9  # of a card, shared among the workers on it
_PROBE = "import jax; d = jax.local_devices(); print('devices', d[0].platform, len(d))"


@dataclasses.dataclass(frozen=True)
class Machine:
    """What JAX trains on here.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        devices: how many.
        cores: CPU cores that this process may use.
    """

    platform: str
    devices: int
    cores: int

    def workers(self, pending: int, wanted: int = 0, run_axis: str = "auto") -> int:
        """How many worker processes train a sweep; 0: this process alone.

        A core each on a CPU, a card each on a machine with several GPUs. A TPU is one process's.

        Args:
            pending: runs to train.
            wanted: by the user; 0: no wish.
            run_axis: of the flags.

        Raises:
            UserError: workers are wanted on a TPU, which this process holds.

        >>> Machine("cpu", 1, 4).workers(9), Machine("gpu", 1, 4).workers(9)
        (4, 0)
        >>> Machine("gpu", 8, 64).workers(9), Machine("gpu", 1, 16).workers(9, wanted=2)
        (8, 2)
        """
        if wanted and self.platform == "tpu":
            raise UserError(
                f"--workers is {wanted}, but one process holds all chips of a TPU; leave --workers "
                "out: this process trains small runs side by side (--run_axis=auto)"
            )
        if not wanted and self.platform == "cpu":
            wanted = 0 if run_axis == "vmap" else self.cores
        elif not wanted and self.platform == "gpu" and self.devices > 1:
            wanted = self.devices
        return min(wanted, pending)

    def vmapped(self, run_axis: str) -> Callable[[ResolvedRun], bool]:
        """Whether the runs of a cohort, given one of them, are trained side by side.

        Args:
            run_axis: "loop" never, "vmap" always, "auto" where that is known to be quicker.
        """
        if run_axis == "auto":
            return lambda run: self.platform != "cpu" and multiply_adds(run) <= _SMALL_UPDATE
        return lambda run: run_axis == "vmap"

    def core_of(self, worker: int) -> int | None:
        """The CPU core that a worker keeps to; None: any, as XLA compiles on many for a card."""
        if self.platform != "cpu" or not hasattr(os, "sched_getaffinity"):
            return None
        cores = sorted(os.sched_getaffinity(0))
        return cores[worker % len(cores)]

    def environment_of(self, worker: int, workers: int) -> dict[str, str]:
        """Variables by which a worker sees one card, and takes no more than its share of it.

        Args:
            worker: its number, from 0.
            workers: how many there are.

        >>> Machine("gpu", 1, 16).environment_of(1, workers=3)["XLA_PYTHON_CLIENT_MEM_FRACTION"]
        '0.30'
        """
        if self.platform != "gpu":
            return {}
        card = worker % self.devices
        sharing = len(range(card, workers, self.devices))
        found = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY / max(sharing, 1):.2f}"}
        if sharing > 1:  # else the first would take memory that another begins to need
            found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        found = {name: value for name, value in found.items() if name not in os.environ}
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            given = [one for one in os.environ.get(name, "").split(",") if one]
            if given or name.startswith("CUDA"):
                found[name] = given[card] if card < len(given) else str(card)
        return found


@functools.cache
def here() -> Machine:
    """The machine that this process runs on.

    If there may be GPUs, another process looks: one that has looked itself would hold memory of
    every card, which the worker processes need.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if any(importlib.util.find_spec(name) for name in _PLUGINS):
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        found = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, env=environment
        )
        for line in found.stdout.splitlines():
            if line.startswith("devices "):
                _, platform, count = line.split()
                return Machine(platform, int(count), cores or 1)
    import jax

    return Machine(jax.default_backend(), jax.local_device_count(), cores or 1)


def multiply_adds(run: ResolvedRun) -> int:
    """Multiply-adds of the forward pass of one update."""
    channels = max(len(run.data.mean), len(run.data.std))
    return run.batch_size * _of_an_image(run.model.name, run.data.image_size, channels)


@functools.cache
def _of_an_image(model: str, size: int, channels: int) -> int:
    import jax
    import jax.numpy as jnp

    from bs_jax import models
    from bs_jax.models.costs import count_multiply_adds

    network, image = models.create(model, num_classes=10), jnp.zeros((1, size, size, channels))
    variables = jax.eval_shape(lambda key: network.init(key, image, False), jax.random.key(0))
    return count_multiply_adds(lambda values: network.apply(values, image, False), variables)
