"""A run: a recipe scaled to its batch size, with all the numbers that training needs.

`bs_jax.training.resolve` makes a `ResolvedRun` of a `bs_jax.recipe.Recipe`. Its JSON form
(``run_id``, ``config``, ``hparams``) is what the records hold and what workers are sent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from bs_jax.errors import UserError
from bs_jax.recipe import Optimizer, Recipe, Scaling, Training
from bs_jax.records.run_files import NOT_IDENTITY
from bs_jax.schema import Decay, Positive, kinds_of, read_fields, written


@dataclasses.dataclass(frozen=True)
class FixedValues(Optimizer):
    """An optimizer whose hyperparameters are known before training.

    Attributes:
        hyperparams: scaled to the batch size in use.
        clock: further arguments of optimizers that count updates internally (RAdam, Adafactor), so
            that the count stays in updates of the base batch size.
        schedule_ahead: examples by which an update reads its schedule ahead of its start: in the
            middle of the base-size updates that it stands for.
    """

    clock: Mapping[str, float] = dataclasses.field(default_factory=dict)
    schedule_ahead: float = 0.0


@dataclasses.dataclass(frozen=True)
class ScaledWhileTraining(Optimizer):
    """An optimizer whose rule is applied in each update: it measures, or the batch size changes.

    Attributes:
        hyperparams: as tuned at the base batch size.
        base_batch_size: that size, examples per update.
        scaling: the rule.
    """

    base_batch_size: int
    scaling: Scaling


@dataclasses.dataclass(frozen=True)
class Scaled:
    """What was scaled, how and why: the record ``hparams.json``.

    Attributes:
        rule: name of the rule.
        batch_size: examples per update.
        base_batch_size: examples per update that the recipe was tuned at.
        base: hyperparameters as the recipe has them.
        values: for the batch size in use; None where the value is found while training.
        rows: the explanation, a dict a hyperparameter.
        warnings: where the rule stops being true.
        restored_from: folder of the run whose state this one begins with, if any.
    """

    rule: str
    batch_size: int
    base_batch_size: int
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    restored_from: str | None = None

    @property
    def k(self) -> float:
        """Batch size over base batch size."""
        return self.batch_size / self.base_batch_size


_FIXED = "fixed"  # the rule of a recorded run whose numbers are scaled already


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedRun(Training):
    """Everything that training needs, resolved and frozen.

    Attributes:
        run_id: stable name, made from the content by `content_id`.
        optimizer: with numbers known beforehand, or a rule that works while training.
        micro_batch_size: examples per gradient sample.
        bn_decay: of BatchNorm's running statistics, per update; with a batch ramp, per update of
            the base batch size, and scaled while training.
        ema_decay: of the weights' moving average, the same; 0: none.
        measures_noise: record the gradient noise beside the metrics.
        scaled: what was scaled, how and why.
    """

    run_id: str
    optimizer: FixedValues | ScaledWhileTraining
    micro_batch_size: Positive
    bn_decay: Decay
    ema_decay: Decay
    measures_noise: bool
    scaled: Scaled

    def __post_init__(self) -> None:
        super().__post_init__()
        batch, micro, ghost = self.batch_size, self.micro_batch_size, self.ghost_batch_size
        for size in self.batch_sizes:
            if size % micro:
                raise UserError(
                    f"batch_size {size} is not divisible by micro_batch_size {micro}; "
                    f"use {nearest_multiples(size, micro)} for the batch, or a divisor of {size}"
                )
        if isinstance(self.optimizer, ScaledWhileTraining) and not self.ramps:
            self.check_two_micro_batches(f"rule {self.optimizer.scaling.rule!r}")
        if ghost and self.bn_cross_device:
            raise UserError(
                f"ghost_batch_size {ghost} and bn_cross_device exclude each other; set one of them "
                "to 0 or False"
            )
        if ghost and micro % ghost:
            fits = all(size % ghost == 0 for size in self.batch_sizes) and batch > ghost
            fix = f"set config.micro_batch_size to {ghost}, or " if fits else ""
            raise UserError(
                f"ghost_batch_size {ghost} does not divide the micro-batch of {micro} examples "
                f"(batch_size {batch}); {fix}use a divisor of {micro}, or 0"
            )

    def check_two_micro_batches(self, what: str) -> None:
        """Raise a UserError unless the batch holds two micro-batches, which `what` compares."""
        batch, micro = self.batch_sizes[0], self.micro_batch_size
        if batch // micro < 2:
            fix = f"set config.micro_batch_size to {batch // 2} or less"
            raise UserError(
                f"{what} compares gradients within a batch and needs at least two micro-batches, "
                f"but batch_size is {batch} and micro_batch_size {micro}; "
                + (fix if batch > 1 else "use a config.batch_size of at least 2")
            )

    @property
    def ramps(self) -> bool:
        """Whether the batch size may change while training."""
        return self.batch_ramp.kind != "off"

    @property
    def is_guarded(self) -> bool:
        """Whether steps grow with the batch only up to the noise scale that training measures."""
        return isinstance(self.optimizer, ScaledWhileTraining) and self.optimizer.scaling.guard

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every batch size that it may come to, ascending; of most runs there is one."""
        return self.batch_ramp.sizes(self.batch_size, self.micro_batch_size)

    @property
    def config(self) -> dict[str, Any]:
        """The run as nested data that JSON can hold: the record ``config.json``."""
        content = written(self)
        optimizer = self.optimizer
        content["train_epochs"] = 0.0  # the length is in examples
        content["optimizer"] = written(optimizer, Optimizer)
        if isinstance(optimizer, FixedValues):
            own = {"clock": dict(optimizer.clock), "schedule_ahead": optimizer.schedule_ahead}
            own = {name: value for name, value in own.items() if value}
            content["scaling"] = {"rule": _FIXED, **own}
            content["base_batch_size"] = self.batch_size
        else:
            content["scaling"] = written(optimizer.scaling)
            content["base_batch_size"] = optimizer.base_batch_size
        return content | ({"measure_noise": True} if self.measures_noise else {})

    @property
    def hparams(self) -> dict[str, Any]:
        """What was scaled as data that JSON can hold: the record ``hparams.json``."""
        scaled = self.scaled
        found = {
            "rule": scaled.rule,
            "batch_size": scaled.batch_size,
            "base_batch_size": scaled.base_batch_size,
            "k": scaled.k,
            "base": dict(scaled.base),
            "scaled": dict(scaled.values),
            "rows": [dict(row) for row in scaled.rows],
            "warnings": list(scaled.warnings),
        }
        restored = scaled.restored_from
        return found | ({} if restored is None else {"restored_from": restored})

    @property
    def content_id(self) -> str:
        """A name made from what decides the numbers: equal for the same training."""
        content = {name: v for name, v in self.config.items() if name not in NOT_IDENTITY}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"b{self.batch_size}-s{self.seed}-{digest}"

    def to_json(self) -> dict[str, Any]:
        """The run as one object that JSON can hold; `from_json` reads it."""
        return {"run_id": self.run_id, "config": self.config, "hparams": self.hparams}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ResolvedRun:
        """Read what `to_json` wrote, or the records of a run, of any version.

        Args:
            content: ``run_id``, ``config`` and ``hparams``; of these only ``config`` is needed.

        Raises:
            UserError: ``config`` is no run's.
        """
        if not isinstance(content.get("config"), Mapping):
            raise UserError("a run's config is missing; it holds a section of fields")
        config = dict(content["config"])
        measures_noise = bool(config.pop("measure_noise", False))
        config.pop("train_epochs", None)
        sections = {
            name: _section_of(config, name) for name in ("optimizer", "scaling", "base_batch_size")
        }
        values = read_fields(cls, config)
        size = kinds_of(Recipe)["base_batch_size"]
        base_batch_size = size.read("config.base_batch_size", sections["base_batch_size"])
        optimizer = read_fields(Optimizer, sections["optimizer"], "config.optimizer")
        scaling = dict(sections["scaling"])
        if scaling.get("rule") == _FIXED:
            values["optimizer"] = FixedValues(
                **optimizer,
                clock=scaling.get("clock", {}),
                schedule_ahead=scaling.get("schedule_ahead", 0.0),
            )
        else:
            read = Scaling(**read_fields(Scaling, scaling, "config.scaling"))
            values["optimizer"] = ScaledWhileTraining(
                **optimizer, base_batch_size=base_batch_size, scaling=read
            )
        hparams = content.get("hparams", {})
        scaled = Scaled(
            rule=hparams.get("rule", scaling.get("rule", "")),
            batch_size=values["batch_size"],
            base_batch_size=hparams.get("base_batch_size", base_batch_size),
            base=hparams.get("base", {}),
            values=hparams.get("scaled", {}),
            rows=tuple(hparams.get("rows", ())),
            warnings=tuple(hparams.get("warnings", ())),
            restored_from=hparams.get("restored_from"),
        )
        run_id = content.get("run_id", "")
        return cls(**values, run_id=run_id, measures_noise=measures_noise, scaled=scaled)


def _section_of(config: dict[str, Any], name: str) -> Any:
    """Take a field out of nested data."""
    if name not in config:
        raise UserError(f"config.{name} is missing")
    value = config.pop(name)
    if name != "base_batch_size" and not isinstance(value, Mapping):
        raise UserError(f"config.{name} is {value!r:.80}; it must be a section of fields")
    return value


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of a divisor beside a value, in words.

    >>> nearest_multiples(50, 16)
    '48 or 64'
    """
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
