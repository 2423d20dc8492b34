"""Checks of a run that need its devices or its data, or the other runs beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from bs_jax.errors import UserError
from bs_jax.run import ResolvedRun, ScaledWhileTraining, nearest_multiples
from bs_jax.training import optimizers


def check_devices(run: ResolvedRun, devices: int) -> None:
    """Raise a UserError unless every batch of a run can be spread evenly over so many devices."""
    for batch_size in run.batch_sizes:
        _check_devices(run, batch_size, devices)


def most_devices(run: ResolvedRun, devices: int) -> int:
    """The most devices, at most so many, over which every batch of a run can be spread evenly."""
    for count in range(devices, 1, -1):
        with contextlib.suppress(UserError):
            check_devices(run, count)
            return count
    return 1


def _check_devices(run: ResolvedRun, batch: int, devices: int) -> None:
    micro, ghost = run.micro_batch_size, run.ghost_batch_size
    if batch % devices:
        raise UserError(
            f"batch_size {batch} is not divisible by {devices} devices; "
            f"use {nearest_multiples(batch, devices)}"
        )
    local = batch // devices
    if _compares(run) and local % micro:
        raise UserError(
            f"micro_batch_size {micro} does not divide the {local} examples that each of "
            f"{devices} devices takes of batch_size {batch}; set config.micro_batch_size to "
            f"a divisor of {local}"
        )
    piece = min(micro, local)
    if local % piece or (ghost and piece % ghost):
        raise UserError(
            f"ghost_batch_size {ghost} or micro_batch_size {micro} does not divide the {local} "
            f"examples that each of {devices} devices takes of batch_size {batch}; "
            f"use divisors of {local}"
        )


def _compares(run: ResolvedRun) -> bool:
    """Whether a run reads the differences between the gradients of micro-batches."""
    optimizer = run.optimizer
    if not isinstance(optimizer, ScaledWhileTraining):
        return False
    return run.batch_ramp.kind == "noise" or optimizers.rule_of(optimizer.scaling).measures


def check_data(run: ResolvedRun, train_size: int, channels: int) -> None:
    """Raise a UserError where the run does not fit the data set that was loaded.

    Args:
        run: the run.
        train_size: examples in the training split.
        channels: of an image.
    """
    data = run.data
    if data.train_size and data.train_size != train_size:
        raise UserError(
            f"config.data.train_size is {data.train_size:,} but {data.name} has "
            f"{train_size:,} training examples; set config.data.train_size to {train_size}"
        )
    if run.batch_size > train_size:
        raise UserError(
            f"batch_size {run.batch_size:,} is larger than the training set of "
            f"{train_size:,} examples ({data.name}); use {train_size:,} or less"
        )
    if len(data.mean) not in (1, channels):
        raise UserError(
            f"config.data.mean has {len(data.mean)} channels but {data.name} has {channels}; "
            "give one number a channel"
        )


def comparison_warnings(runs: Iterable[ResolvedRun]) -> list[str]:
    """What would make a comparison between these runs unfair, in words for the report.

    BatchNorm's noise depends on how many examples are normalised together. Arms that differ in
    it differ for a reason that no rule can repair.
    """
    groups = {
        run.ghost_batch_size or run.micro_batch_size for run in runs if not run.bn_cross_device
    }
    if len(groups) < 2:
        return []
    return [
        f"These runs normalise {', '.join(str(g) for g in sorted(groups))} examples together in "
        "BatchNorm, so part of the difference between batch sizes is BatchNorm's own noise. Set "
        f"ghost_batch_size to {min(groups)} for all of them."
    ]
