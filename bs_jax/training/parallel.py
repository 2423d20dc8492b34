"""The one place that knows how a step is spread over devices (the axis "batch").

In one process by ``jax.pmap`` or by ``jax.jit`` over a mesh, as ``config.parallel`` says; in
several processes always by the second. Both give the same numbers, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bs_jax.training import compilation

BATCH_AXIS = "batch"
Devices = Sequence[Any]  # of jax.Device, which type checkers do not take for a type


def training_devices() -> list[Any]:
    """All devices of all processes that train together, those of a process side by side.

    A process on its own takes its own alone: on a host of a TPU slice JAX lists those of the others
    too, whether they were joined or not.
    """
    devices = jax.devices() if jax.distributed.is_initialized() else jax.local_devices()
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def local_devices(devices: Devices) -> list[Any]:
    """The devices that this process feeds."""
    return [device for device in devices if device.process_index == jax.process_index()]


def data_parallel(
    function: Callable[..., Any],
    *,
    replicated: int,
    devices: Devices,
    donate: Sequence[int] = (),
    by: str = "pmap",
) -> Callable[..., Any]:
    """Compile ``function(*replicated, per_device)`` for all devices at once.

    The first `replicated` arguments are the same on every device and are passed whole; the last
    one has a leading device axis (see `spread`). The function must return values that agree on all
    devices (it reduces over the axis `BATCH_AXIS` itself), which come back whole as well: state is
    never stacked.

    Args:
        function: takes ``replicated + 1`` positional arguments.
        replicated: how many leading arguments are whole.
        devices: the devices to run on.
        donate: positions of arguments whose buffers may be reused for the result.
        by: "pmap" or "jit". The devices of several processes always get "jit".

    Returns:
        The compiled function.
    """
    options = compilation.compiler_options(devices[0].platform)
    if by == "jit" or not _one_process(devices):
        return _over_mesh(function, replicated, devices, donate, options)
    mapped = jax.pmap(
        function,
        axis_name=BATCH_AXIS,
        in_axes=(None,) * replicated + (0,),
        out_axes=None,
        devices=list(devices),
        donate_argnums=tuple(donate),
    )
    if not options:
        return mapped

    # pmap takes no compiler options; jit around it does. Of the mapped function itself jit would
    # take over `lower`, which knows of no options.
    @functools.wraps(function)
    def with_options(*arguments: Any) -> Any:
        return mapped(*arguments)

    return jax.jit(with_options, donate_argnums=tuple(donate), compiler_options=options)


def _over_mesh(
    function: Callable[..., Any],
    replicated: int,
    devices: Devices,
    donate: Sequence[int],
    options: Mapping[str, str],
) -> Callable[..., Any]:
    """One jitted program: whole arguments replicated over the mesh, the last one sharded."""

    def on_one_device(*arguments: Any) -> Any:
        *whole, shared = arguments
        return function(*whole, jax.tree.map(lambda leaf: leaf[0], shared))

    mesh = _mesh(devices)
    specs = (PartitionSpec(),) * replicated + (PartitionSpec(BATCH_AXIS),)
    mapped = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(),
        check_vma=False,  # the function itself sees to it that its results agree
    )
    return jax.jit(
        mapped,
        donate_argnums=tuple(donate),
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=dict(options),
    )


def replicated_shapes(tree: Any, devices: Devices) -> Any:
    """The shapes of what `replicate` makes of a tree, to compile for."""
    sharding = NamedSharding(_mesh(devices), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def replicate(tree: Any, devices: Devices) -> Any:
    """Put a whole copy of every leaf on every device, once, so that no step has to move it."""
    sharding = NamedSharding(_mesh(devices), PartitionSpec())
    if _one_process(devices):
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


def spread(tree: Any, devices: Devices) -> Any:
    """Make the last argument of a `data_parallel` function from this process's part of it.

    Args:
        tree: arrays with a leading axis over the devices of this process.
        devices: all of the run's.
    """
    if _one_process(devices):
        return tree
    sharding = NamedSharding(_mesh(devices), PartitionSpec(BATCH_AXIS))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def spread_shapes(tree: Any, devices: Devices) -> Any:
    """The shapes of what `spread` makes of a tree, to compile for."""
    if _one_process(devices):
        return tree
    sharding = NamedSharding(_mesh(devices), PartitionSpec(BATCH_AXIS))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (len(devices), *leaf.shape[1:]), leaf.dtype, sharding=sharding
        ),
        tree,
    )


def _one_process(devices: Devices) -> bool:
    return len({device.process_index for device in devices}) == 1


def _mesh(devices: Devices) -> Mesh:
    return Mesh(list(devices), (BATCH_AXIS,))
