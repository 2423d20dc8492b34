"""The one place that knows how a step is spread over devices (pmap over the axis "batch")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH_AXIS = "batch"
Devices = Sequence[Any]  # of jax.Device, which type checkers do not take for a type


def data_parallel(
    function: Callable[..., Any],
    *,
    replicated: int,
    devices: Devices,
    donate: Sequence[int] = (),
) -> Callable[..., Any]:
    """Compile ``function(*replicated, per_device)`` for all devices at once.

    The first `replicated` arguments are the same on every device and are passed whole; the last
    one has a leading device axis. The function must return values that agree on all devices (it
    reduces over the axis `BATCH_AXIS` itself), which come back whole as well: state is never
    stacked.

    Args:
        function: takes ``replicated + 1`` positional arguments.
        replicated: how many leading arguments are whole.
        devices: the devices to run on.
        donate: positions of arguments whose buffers may be reused for the result.

    Returns:
        The compiled function.
    """
    return jax.pmap(
        function,
        axis_name=BATCH_AXIS,
        in_axes=(None,) * replicated + (0,),
        out_axes=None,
        devices=list(devices),
        donate_argnums=tuple(donate),
    )


def replicate(tree: Any, devices: Devices) -> Any:
    """Put a whole copy of every leaf on every device, once, so that no step has to move it."""
    mesh = Mesh(list(devices), (BATCH_AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
