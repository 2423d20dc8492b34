"""A recipe, typed: what a config says, before the rule scales it.

An ``ml_collections`` config, flags and the points of a sweep are nested data. `Recipe.parse` turns
them into an object once, with every check that needs no data, no device and no compile; nothing
after it takes nested data. `bs_jax.training.resolve` scales a recipe to a `bs_jax.run.ResolvedRun`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from bs_jax.errors import UserError
from bs_jax.schema import (
    LARGEST,
    NUMBER,
    Count,
    Decay,
    Flag,
    Kind,
    Number,
    Numbers,
    Positive,
    Section,
    Share,
    Text,
    bounded,
    choose,
    is_flag,
    is_number,
    is_text,
    is_whole,
    kinds_of,
    list_of,
    one_of,
    read_fields,
)

SCHEDULES = ("constant", "linear", "flat_cosine")
DTYPES = ("float32", "bfloat16")
DECAY_MASKS = ("all", "kernels")
PARALLEL = ("pmap", "jit")

_LONGEST = 2**31  # the example clock is an int32


# --- fields that hold what no other section does


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and is_text(value[0])
        and is_number(value[1])
    )


def _is_stage(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and is_number(value[0])
        and 0 <= value[0] < math.inf
        and (value[0] < 1 or value[0] == int(value[0]))
        and is_whole(value[1])
        and 1 <= value[1] < LARGEST
    )


def _stages(path: str, value: Any) -> tuple[tuple[float, int], ...]:
    return tuple((start, size) for start, size in _STAGES.read(path, value))


def _named_pairs(path: str, value: Any) -> tuple[tuple[str, float], ...]:
    return tuple((name, number) for name, number in _PAIRS.read(path, value))


_STAGES = list_of("a list of pairs (share or examples, batch size)", _is_stage)
_PAIRS = list_of("a list of pairs (name, number)", _is_pair)
_AMOUNT = bounded(lambda v: 0 <= v < math.inf, "a finite number of at least 0")


def _hyperparams(path: str, value: Any) -> dict[str, float | bool]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path} is {value!r:.80}; it must be a section of fields")
    found: dict[str, float | bool] = {}
    for name, number in value.items():
        own = f"{path}.{name}"
        if not (is_number(number) or is_flag(number)):
            raise UserError(
                f"{own} is {number!r:.80}; it must be a number below 2**63, or True or False"
            )
        found[name] = number if is_flag(number) else _AMOUNT.read(own, number)
    return found


# --- the sections


@dataclasses.dataclass(frozen=True)
class Scaling(Section):
    """How hyperparameters follow the batch size.

    Attributes:
        rule: name of a scaling rule.
        offset: multiplies k = batch_size / base_batch_size for everything scaled.
        off: hyperparameters that the rule leaves as they are.
        offsets: pairs (hyperparameter, factor on its k).
        noise_scale: gradient noise scale in examples; 0: estimated while training.
        guard: steps grow with the batch only up to the noise scale, measured or given. A record
            that does not say so is of a run without.
    """

    rule: Text
    offset: Number
    off: Annotated[tuple[str, ...], list_of("a list of names", is_text)]
    offsets: Annotated[tuple[tuple[str, float], ...], Kind(_PAIRS.holds, _named_pairs)]
    noise_scale: Number
    guard: Flag = False

    def check(self, scalable: Iterable[str]) -> None:
        """Raise a UserError for a factor that cannot be, or a hyperparameter that is not there.

        Args:
            scalable: names of the recipe's hyperparameters.
        """
        for name, value in (("offset", self.offset), *self.offsets):
            if not 0 < value < math.inf:
                raise UserError(f"config.scaling offset of {name} is {value!r}; it must be above 0")
        for name in (*self.off, *(name for name, _ in self.offsets)):
            choose("hyperparameter in config.scaling", name, scalable)
        if not 0 <= self.noise_scale < math.inf:
            raise UserError(
                f"config.scaling.noise_scale is {self.noise_scale!r}; give it in examples, "
                "or 0 to estimate it while training"
            )


@dataclasses.dataclass(frozen=True)
class Optimizer(Section):
    """An optax factory and its arguments, as tuned at the base batch size.

    Attributes:
        name: of the factory.
        decay_mask: weight decay on "all" leaves, or on "kernels" only.
        hyperparams: the factory's own names and values.
    """

    name: Text
    decay_mask: Annotated[str, one_of(DECAY_MASKS)]
    hyperparams: Annotated[Mapping[str, float | bool], Kind("a section of fields", _hyperparams)]


@dataclasses.dataclass(frozen=True)
class Schedule(Section):
    """The learning rate over its peak.

    Attributes:
        name: "constant", "linear" or "flat_cosine".
        warmup_examples: linear from 0.
        flat_fraction: share of the length before the decay begins.
        final_fraction: of the peak, at the end.
    """

    name: Annotated[str, one_of(SCHEDULES)]
    warmup_examples: Count
    flat_fraction: Share
    final_fraction: Share


@dataclasses.dataclass(frozen=True)
class Data(Section):
    """The data set and what is done to its images.

    Attributes:
        name: of the data set, or ``folder:PATH``, ``tfds:NAME``.
        train_size: examples in the training split, checked; 0: not known.
        image_size: pixels, as the model sees them.
        train_storage_size: pixels, as kept before random crops; 0: `image_size`.
        eval_storage_size: pixels, as kept before the centre crop; 0: `image_size`.
        fit: how images of another shape come to that size, "crop" or "squash".
        streamed: read through grain, not held on the device.
        flip: mirror half of the images.
        crop_padding: pixels on each side before a random crop.
        crop_area: random resized crop: share of the area, low and high.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
    """

    name: Text
    train_size: Count
    image_size: Positive
    train_storage_size: Count
    eval_storage_size: Count
    fit: Text
    streamed: Flag
    flip: Flag
    crop_padding: Count
    crop_area: Annotated[tuple[float, float], list_of("two numbers", is_number, 2)]
    mean: Numbers
    std: Numbers

    def __post_init__(self) -> None:
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise UserError(
                f"config.data.crop_area is ({low}, {high}); it must be two shares with 0 < low <= "
                "high <= 1, (1.0, 1.0) for no resized crop"
            )
        if any(not 0 < value < math.inf for value in self.std):
            raise UserError(f"config.data.std is {self.std!r}; every channel's must be above 0")
        if len(self.mean) != len(self.std):
            raise UserError(
                f"config.data.mean has {len(self.mean)} channels and config.data.std "
                f"{len(self.std)}; give one number a channel in both"
            )


@dataclasses.dataclass(frozen=True)
class Model(Section):
    """The network.

    Attributes:
        name: of the architecture.
        dtype: of the computation; parameters are always float32.
    """

    name: Text
    dtype: Annotated[str, one_of(DTYPES)]


@dataclasses.dataclass(frozen=True)
class Report(Section):
    """What a report compares.

    Attributes:
        accuracy_metric: final metric that verdicts are about.
        smoothed_metric: a second one beside it; "": none.
        loss_metric: final loss.
        curve_metric: whose curves are compared.
        margin: accuracies closer than this count as equal.
    """

    accuracy_metric: Text
    smoothed_metric: Text
    loss_metric: Text
    curve_metric: Text
    margin: Number


_RAMPS = ("off", "stages", "noise")


@dataclasses.dataclass(frozen=True)
class BatchRamp(Section):
    """A batch size that grows while training, up to the run's `batch_size`.

    Attributes:
        kind: "off"; "stages", as given; or "noise", as the measured gradient noise scale allows.
        stages: pairs (start, batch size). A start is a share of the length below 1, else a number
            of examples; the first is 0.
        start: batch size that "noise" begins with; 0: the base batch size.
        share: of the noise scale's lower end that a batch may reach.
        growth: factor of one rise. Each size is a compiled program.
        every_examples: how often "noise" asks; 0: at every logging point.
    """

    kind: Annotated[str, one_of(_RAMPS)] = "off"
    stages: Annotated[tuple[tuple[float, int], ...], Kind(_STAGES.holds, _stages)] = ()
    start: Count = 0
    share: Number = 0.5
    growth: Number = 2.0
    every_examples: Count = 0

    def check(self, batch_size: int, train_examples: int) -> None:
        """Raise a UserError for a ramp that cannot be.

        Args:
            batch_size: of the run, the largest.
            train_examples: its length.
        """
        if not 0 < self.share < math.inf or not 1 < self.growth < math.inf:
            raise UserError(
                f"config.batch_ramp.share is {self.share!r} and growth {self.growth!r}; give a "
                "share above 0 and a growth above 1, e.g. 0.5 and 2.0"
            )
        if self.kind == "noise" and self.start > batch_size:
            raise UserError(
                f"config.batch_ramp.start is {self.start}, above the largest batch size, "
                f"config.batch_size of {batch_size}; swap them"
            )
        if self.kind != "stages":
            return
        starts = [start for start, _ in self.starts(train_examples)]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise UserError(
                f"config.batch_ramp.stages begin at {starts} examples; give pairs (start, batch "
                "size) in order, the first with start 0, e.g. ((0, 64), (0.3, 128))"
            )
        if starts[-1] >= train_examples:
            raise UserError(
                f"config.batch_ramp.stages: the last begins at {starts[-1]:,} examples, but "
                f"config.train_examples is {train_examples:,}; begin it earlier, or leave it out"
            )
        largest = max(size for _, size in self.stages)
        if largest != batch_size:
            raise UserError(
                f"config.batch_ramp.stages reach {largest} and config.batch_size is {batch_size}; "
                "the largest stage is the batch size: make them equal"
            )

    def starts(self, train_examples: int) -> list[tuple[int, int]]:
        """The stages as pairs (examples seen at the start, batch size)."""
        return [
            (round(start * train_examples) if start < 1 else int(start), size)
            for start, size in self.stages
        ]

    def sizes(self, batch_size: int, multiple_of: int = 1) -> tuple[int, ...]:
        """Every batch size that a run may come to, ascending.

        Args:
            batch_size: of the run, the largest.
            multiple_of: of "noise", whose sizes are multiples of it.

        >>> BatchRamp("noise", start=24).sizes(128, multiple_of=8)
        (24, 48, 96, 128)
        """
        if self.kind == "stages":
            return tuple(sorted({size for _, size in self.stages}))
        if self.kind == "off":
            return (batch_size,)
        found = [self.start]
        while found[-1] < batch_size:
            wanted = min(round(found[-1] * self.growth), batch_size)
            found.append(max(wanted - wanted % multiple_of, found[-1] + multiple_of))
        return (*found[:-1], batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Section):
    """What a recipe and a run have in common.

    Attributes:
        name: of the recipe.
        title: one line for the report.
        seed: of initial weights, order of the examples, augmentation.
        batch_size: examples per update, over all devices together.
        train_examples: length of training in examples seen.
        drop_remainder: leave out what an epoch has beyond its last whole batch.
        schedule: of the learning rate.
        ghost_batch_size: examples that BatchNorm normalises together; 0: a whole micro-batch.
        bn_cross_device: BatchNorm normalises over all devices' examples together.
        label_smoothing: share of the target spread evenly over all classes.
        data: the data set.
        model: the network.
        eval_batch_size: examples, over all devices; has no effect on the result.
        eval_every_examples: cadence of evaluation.
        log_every_examples: training metrics are means over this many examples.
        checkpoint_every_examples: cadence of checkpoints; 0: only where a signal interrupts.
        tensorboard: write its files beside the records.
        trackers: where metrics go beside the records: "tensorboard", "wandb", "mlflow".
        report: what a report compares.
        batch_ramp: a batch size that grows up to `batch_size`.
        parallel: how one process spreads an update over its devices, "pmap" or "jit" (over a
            mesh); has no effect on the result. Several processes always use "jit".
    """

    name: Text
    title: Text
    seed: Count
    batch_size: Positive
    train_examples: Positive
    drop_remainder: Flag
    schedule: Schedule
    ghost_batch_size: Count
    bn_cross_device: Flag
    label_smoothing: Decay
    data: Data
    model: Model
    eval_batch_size: Positive
    eval_every_examples: Positive
    log_every_examples: Positive
    checkpoint_every_examples: Count
    tensorboard: Flag
    report: Report
    trackers: Annotated[tuple[str, ...], list_of("a list of names", is_text)] = ()
    batch_ramp: BatchRamp = BatchRamp()
    parallel: Annotated[str, one_of(PARALLEL)] = "pmap"

    def __post_init__(self) -> None:
        if self.train_examples < self.batch_size:
            raise UserError(
                f"config.train_examples is {self.train_examples:,}, less than one batch of "
                f"{self.batch_size:,}; train on more examples or use a smaller batch"
            )
        if self.schedule.warmup_examples > self.train_examples:
            raise UserError(
                f"config.schedule.warmup_examples is {self.schedule.warmup_examples:,}, more than "
                f"config.train_examples of {self.train_examples:,}; shorten the warm-up"
            )
        if self.train_examples >= _LONGEST:
            raise UserError(
                f"config.train_examples is {self.train_examples:,}; the example clock is an int32 "
                f"and counts to {_LONGEST - 1:,}: train in parts"
            )
        self.batch_ramp.check(self.batch_size, self.train_examples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """A recipe as it was tuned, with the batch size that it is to be trained at.

    Attributes:
        base_batch_size: the batch size that the hyperparameters were tuned at.
        scaling: how they follow the batch size.
        optimizer: with its hyperparameters at the base batch size.
        micro_batch_size: examples per gradient sample; 0: as the rule needs it.
        bn_decay: of BatchNorm's running statistics, per update of the base batch size.
        ema_decay: of the weights' moving average, per such update; 0: none.
    """

    base_batch_size: Positive
    scaling: Scaling
    optimizer: Optimizer
    micro_batch_size: Count
    bn_decay: Decay
    ema_decay: Decay

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scaling.check(self.scalable)

    @property
    def scalable(self) -> tuple[str, ...]:
        """Names of the hyperparameters that a rule may scale."""
        return (*self.optimizer.hyperparams, "bn_decay", "ema_decay")

    @property
    def k(self) -> float:
        """Batch size over base batch size."""
        return self.batch_size / self.base_batch_size

    @property
    def base_values(self) -> dict[str, float | bool]:
        """The hyperparameters at the base batch size, by name; the EMA's where it is on."""
        values = {**self.optimizer.hyperparams, "bn_decay": self.bn_decay}
        return values | ({"ema_decay": self.ema_decay} if self.ema_decay else {})

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Recipe:
        """Read a recipe from nested data, checking every field.

        Args:
            config: with the fields of ``configs/fashion_mnist.py``; of ``train_epochs`` and
                ``train_examples`` one is 0.

        Returns:
            The recipe; its length is in examples.

        Raises:
            UserError: a field is missing or unknown, or its value cannot be.
        """
        lengths = {}
        for name in ("train_epochs", "train_examples"):
            if name not in config:
                raise UserError(f"config.{name} is missing; it holds {NUMBER.holds}")
            lengths[name] = NUMBER.read(f"config.{name}", config[name])
        config = {**config}
        if isinstance(config.get("scaling"), Mapping):  # recipes older than the guard have it too
            config["scaling"] = {"guard": True, **config["scaling"]}
        values = read_fields(cls, config, skip=(*lengths,))
        length = _length(
            **lengths,
            train_size=values["data"].train_size,
            batch_size=values["batch_size"],
            drop_remainder=values["drop_remainder"],
        )
        return cls(
            **values,
            train_examples=kinds_of(cls)["train_examples"].read("config.train_examples", length),
        )


def _length(
    train_epochs: float,
    train_examples: int,
    *,
    train_size: int,
    batch_size: int,
    drop_remainder: bool,
) -> int:
    """The length in examples, where it may be given in epochs.

    An epoch holds ``train_size`` examples, or its whole batches alone with ``drop_remainder``:
    `steps = epochs * floor(train_size / batch_size)`.

    >>> size = {"train_size": 9469, "batch_size": 64}
    >>> _length(2.0, 0, **size, drop_remainder=True)  # 2 x 147 updates
    18816
    """
    given = {"train_epochs": train_epochs, "train_examples": train_examples}
    for name, value in given.items():
        if not 0 <= value < _LONGEST:
            raise UserError(
                f"config.{name} is {value!r}; it must be a number of at least 0 and below 2**31"
            )
    if bool(train_epochs) == bool(train_examples):
        both = "both give" if train_epochs else "neither gives"
        raise UserError(
            f"config.train_epochs {train_epochs} and config.train_examples {train_examples}: "
            f"{both} the length of training; set one of them, and the other to 0"
        )
    if not train_epochs:
        return train_examples
    if not train_size:
        raise UserError(
            f"config.train_epochs is {train_epochs} but config.data.train_size is 0; say how many "
            "examples the training split holds, or give config.train_examples instead"
        )
    if drop_remainder:
        if batch_size > train_size:
            raise UserError(
                f"batch_size {batch_size} does not fit an epoch of {train_size:,} examples without "
                f"its remainder; use 1 to {train_size:,}, or config.drop_remainder=False"
            )
        train_size -= train_size % batch_size
    return int(train_epochs * train_size)
