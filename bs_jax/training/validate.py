"""Every check of a config that needs no data, no device and no compile; one line per mistake."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from bs_jax.errors import UserError

SCHEDULES = ("constant", "linear", "flat_cosine")
DTYPES = ("float32", "bfloat16")
DECAY_MASKS = ("all", "kernels")

_POSITIVE_INTS = (
    "batch_size",
    "base_batch_size",
    "train_examples",
    "eval_batch_size",
    "eval_every_examples",
    "log_every_examples",
    "data.image_size",
)
_COUNTS = (  # 0 has a meaning of its own, told in the config
    "seed",
    "micro_batch_size",
    "ghost_batch_size",
    "checkpoint_every_examples",
    "schedule.warmup_examples",
    "data.crop_padding",
    "data.train_size",
)
_FRACTIONS = (
    "bn_decay",
    "ema_decay",
    "label_smoothing",
    "schedule.flat_fraction",
    "schedule.final_fraction",
)


def choose(what: str, name: Any, known: Iterable[str]) -> None:
    """Raise a UserError that suggests the nearest name unless `name` is a known one."""
    known = tuple(known)
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown {what} {name!r}; {hint}known: {', '.join(known)}")


def check_config(config: Mapping[str, Any]) -> None:
    """Raise a UserError for the first number or name in the config that cannot be right."""
    from bs_jax import models
    from bs_jax.training import optimizers

    for path in _POSITIVE_INTS:
        value = _get(config, path)
        if not _is_int(value) or value < 1:
            raise UserError(f"config.{path} is {value!r}; it must be a whole number of at least 1")
    for path in _COUNTS:
        value = _get(config, path)
        if not _is_int(value) or value < 0:
            raise UserError(f"config.{path} is {value!r}; it must be a whole number of at least 0")
    for path in _FRACTIONS:
        value = _get(config, path)
        top = "at most 1" if path.startswith("schedule.") else "below 1"
        if not _is_finite(value) or value < 0 or value > 1 or (top == "below 1" and value == 1):
            raise UserError(f"config.{path} is {value!r}; it must be at least 0 and {top}")
    for name, value in config["optimizer"]["hyperparams"].items():
        if isinstance(value, bool):
            continue
        if not _is_finite(value) or value < 0:
            raise UserError(
                f"config.optimizer.hyperparams.{name} is {value!r}; "
                "it must be a finite number of at least 0"
            )
    if not isinstance(config["drop_remainder"], bool):
        raise UserError(
            f"config.drop_remainder is {config['drop_remainder']!r}; it must be True or False"
        )
    if not config["train_examples"] >= config["batch_size"]:
        raise UserError(
            f"config.train_examples is {config['train_examples']:,}, less than one batch of "
            f"{config['batch_size']:,}; train on more examples or use a smaller batch"
        )
    if config["schedule"]["warmup_examples"] > config["train_examples"]:
        raise UserError(
            f"config.schedule.warmup_examples is {config['schedule']['warmup_examples']:,}, more "
            f"than config.train_examples of {config['train_examples']:,}; shorten the warm-up"
        )
    if config["train_examples"] >= 2**31:
        raise UserError(
            f"config.train_examples is {config['train_examples']:,}; the example clock is an int32 "
            f"and counts to {2**31 - 1:,}: train in parts"
        )
    choose("config.schedule.name", config["schedule"]["name"], SCHEDULES)
    choose("config.model.dtype", config["model"]["dtype"], DTYPES)
    choose("config.model.name", config["model"]["name"], models.names())
    choose("config.optimizer.decay_mask", config["optimizer"]["decay_mask"], DECAY_MASKS)
    choose("config.optimizer.name", config["optimizer"]["name"], optimizers.names())
    _check_scaling(config)
    _check_augmentation(config["data"])


def _check_scaling(config: Mapping[str, Any]) -> None:
    from bs_jax.training import optimizers

    scaling = config["scaling"]
    scalable = optimizers.scalable_names(config)
    for path, value in (("offset", scaling["offset"]), *scaling["offsets"]):
        if not _is_finite(value) or value <= 0:
            raise UserError(f"config.scaling offset of {path} is {value!r}; it must be above 0")
    for name in (*scaling["off"], *(name for name, _ in scaling["offsets"])):
        choose("hyperparameter in config.scaling", name, scalable)
    if not _is_finite(scaling["noise_scale"]) or scaling["noise_scale"] < 0:
        raise UserError(
            f"config.scaling.noise_scale is {scaling['noise_scale']!r}; give it in examples, "
            "or 0 to estimate it while training"
        )


def _check_augmentation(data: Mapping[str, Any]) -> None:
    low, high = data["crop_area"]
    if not (_is_finite(low) and _is_finite(high) and 0 < low <= high <= 1):
        raise UserError(
            f"config.data.crop_area is ({low}, {high}); it must be two shares with 0 < low <= "
            "high <= 1, (1.0, 1.0) for no resized crop"
        )
    if any(not _is_finite(value) or value <= 0 for value in data["std"]):
        raise UserError(f"config.data.std is {data['std']!r}; every channel's must be above 0")
    if len(data["mean"]) != len(data["std"]):
        raise UserError(
            f"config.data.mean has {len(data['mean'])} channels and config.data.std "
            f"{len(data['std'])}; give one number a channel in both"
        )


def check_run(config: Mapping[str, Any]) -> None:
    """Raise a UserError unless the resolved batch splits evenly into micro and ghost batches."""
    batch, micro, ghost = (
        config["batch_size"],
        config["micro_batch_size"],
        config["ghost_batch_size"],
    )
    if batch % micro:
        raise UserError(
            f"batch_size {batch} is not divisible by micro_batch_size {micro}; "
            f"use {_nearest(batch, micro)} for the batch, or a divisor of {batch}"
        )
    if config["scaling"]["rule"] != "fixed":
        check_two_micro_batches(f"rule {config['scaling']['rule']!r}", batch, micro)
    if ghost and config["bn_cross_device"]:
        raise UserError(
            f"ghost_batch_size {ghost} and bn_cross_device exclude each other; set one of them to "
            "0 or False"
        )
    if ghost and micro % ghost:
        raise UserError(
            f"ghost_batch_size {ghost} does not divide the micro-batch of {micro} examples "
            f"(batch_size {batch}); use a divisor of {micro}, or 0"
        )


def check_two_micro_batches(what: str, batch: int, micro: int) -> None:
    """Raise a UserError unless the batch holds two micro-batches, which `what` compares."""
    if batch // micro < 2:
        fix = f"set config.micro_batch_size to {batch // 2} or less"
        raise UserError(
            f"{what} compares gradients within a batch and needs at least two micro-batches, but "
            f"batch_size is {batch} and micro_batch_size {micro}; "
            + (fix if batch > 1 else "use a config.batch_size of at least 2")
        )


def check_devices(config: Mapping[str, Any], devices: int) -> None:
    """Raise a UserError unless the batch can be spread evenly over so many devices."""
    batch, micro, ghost = (
        config["batch_size"],
        config["micro_batch_size"],
        config["ghost_batch_size"],
    )
    if batch % devices:
        raise UserError(
            f"batch_size {batch} is not divisible by {devices} devices; "
            f"use {_nearest(batch, devices)}"
        )
    local = batch // devices
    if config["scaling"]["rule"] != "fixed" and local % micro:
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


def check_data(config: Mapping[str, Any], train_size: int, channels: int) -> None:
    """Raise a UserError where the config does not fit the data set that was loaded."""
    expected = config["data"]["train_size"]
    if expected and expected != train_size:
        raise UserError(
            f"config.data.train_size is {expected:,} but {config['data']['name']} has "
            f"{train_size:,} training examples; set config.data.train_size to {train_size}"
        )
    if config["batch_size"] > train_size:
        raise UserError(
            f"batch_size {config['batch_size']:,} is larger than the training set of "
            f"{train_size:,} examples ({config['data']['name']}); use {train_size:,} or less"
        )
    if len(config["data"]["mean"]) not in (1, channels):
        raise UserError(
            f"config.data.mean has {len(config['data']['mean'])} channels but "
            f"{config['data']['name']} has {channels}; give one number a channel"
        )


def comparison_warnings(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """What would make a comparison between these runs unfair, said for the report.

    BatchNorm's noise depends on how many examples are normalised together: arms that differ in
    it differ for a reason that no rule can mend.
    """
    groups = {
        config["ghost_batch_size"] or config["micro_batch_size"]
        for config in configs
        if not config["bn_cross_device"]
    }
    if len(groups) < 2:
        return []
    return [
        f"These runs normalise {', '.join(str(g) for g in sorted(groups))} examples together in "
        "BatchNorm, so part of the difference between batch sizes is BatchNorm's own noise. Set "
        f"ghost_batch_size to {min(groups)} for all of them."
    ]


def _get(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for name in path.split("."):
        node = node[name]
    return node


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _nearest(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
