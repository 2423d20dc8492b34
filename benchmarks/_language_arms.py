"""The problem of the language-model study, and its arms: ways to train at another batch size."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import bs_jax
from bs_jax import scaling
from bs_jax.scaling import BatchRamp
from examples import language_model as example


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all runs of a file have in common; batch sizes and examples count sequences."""

    width: int = 64
    layers: int = 2
    vocabulary: int = 512
    learning_rate: float = 4e-3
    base_batch_size: int = 16
    examples: int = 10_240
    chunk_examples: int = 512  # between two looks at the noise scale
    validation: int = 512
    microbatch: int = 8  # or half of the batch, if that is less

    @property
    def chunks(self) -> int:
        return self.examples // self.chunk_examples

    @property
    def base_updates(self) -> int:
        return self.examples // self.base_batch_size

    def microbatches(self, batch_size: int) -> int:
        return max(2, batch_size // self.microbatch)


TINY = Problem(width=8, layers=1, vocabulary=256, base_batch_size=8, examples=512,
               chunk_examples=128, validation=16)  # fmt: skip


PLAIN, ADAM, ADAPTDL = 0, 1, 2  # p = 0, 1/2, 1


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train at another batch size.

    Attributes:
        name: as on the command line.
        rule: of the library; what the optimizer is scaled by. It says whether it is guarded.
        gain: (phi, k) -> factor on the learning rate beside the rule's, phi the measured noise
            scale over the base batch size.
        metric: of the noise scale that ``gain`` reads.
        decay: k -> decay of that measurement per update.
        form: "fixed", "ramp" (given stages) or "follow" (the measured noise scale).
        follow_share: the share of the noise scale that a following batch may reach.
        optimizer: (problem, k) -> a transformation of its own instead of a rule.
        shuffled: examples change places inside blocks of 128.
    """

    name: str
    rule: Any = "none"
    gain: Callable[[Any, Any], Any] | None = None
    metric: int = PLAIN
    decay: Callable[[float], float] = lambda k: 0.98**k
    form: str = "fixed"
    follow_share: float = BatchRamp.share
    optimizer: Callable[[Problem, float], Any] | None = None
    shuffled: bool = False


def adascale_gain(phi: Any, k: Any) -> Any:
    """(sigma^2 + mu^2)/(sigma^2/k + mu^2): 1 in signal, k in noise (Johnson et al. 2020)."""
    return k - (k - 1) / (1 + phi / k)  # the same, and right for an infinite phi


def adaptdl_gain(phi: Any, k: Any) -> Any:
    """Square root of AdaScale's gain, for Adam (AdaptDL; Qiao et al., Pollux, 2021)."""
    return jnp.sqrt(adascale_gain(phi, k))


def malladi(problem: Problem, k: float) -> Any:
    """Square-root rule as published: decays to first order (Malladi et al. 2022)."""
    return optax.chain(
        optax.clip_by_global_norm(1.0 / math.sqrt(k)),
        optax.adamw(
            lambda update: math.sqrt(k) * schedule(problem)(update * k),
            b1=max(0.0, 1 - k * (1 - 0.9)),
            b2=max(0.0, 1 - k * (1 - 0.95)),
            eps=1e-8 / math.sqrt(k),
            weight_decay=0.1,
            mask=example.matrices,
        ),
    )


def _lr_alone(name: str, power: float) -> bs_jax.ScalingRule:
    none = bs_jax.RULES["none"]
    return dataclasses.replace(none, name=name, lr_power=power)


_half_lives = dataclasses.replace(bs_jax.RULES["none"], name="marek", time_constants=True)
RECIPES: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base"),
        Arm("order", shuffled=True),
        # A batch warm-up with the square-root rule for the learning rate alone.
        Arm("merrill", _lr_alone("merrill", 0.5), form="ramp"),  # Merrill et al. 2025
        # The second moment keeps its half-life in examples, all else as it was; and with sqrt.
        Arm("marek", _half_lives.replace(b1=None)),  # Marek et al. 2025
        Arm("marek_sqrt", dataclasses.replace(_half_lives, lr_power=0.5).replace(b1=None)),
        Arm("adascale", gain=adascale_gain, metric=PLAIN, decay=lambda k: max(1 - k / 1000, 0)),
        Arm("adaptdl", gain=adaptdl_gain, metric=ADAPTDL, decay=lambda k: 0.999**k),
        Arm("malladi", optimizer=malladi),
    )
}
# Where the batch of a ramp doubles, as shares of all examples.
STAGES = ((0.0, 1), (0.3, 2), (0.45, 4), (0.75, 8))


def find_arm(name: str) -> Arm:
    """Return the arm of this name, e.g. ``"sqrt"``, ``"guard:invariant"`` or ``"adascale"``."""
    if name in RECIPES:
        return RECIPES[name]
    *forms, last = name.split(":")
    own = RECIPES[last].rule if last in RECIPES else last
    rule, fields = scaling.resolve_rule(own), {}
    for form in forms:
        match = re.fullmatch(r"guard|(ramp)|(follow|floor)(\d*\.?\d*)", form)
        if not match:
            raise SystemExit(
                f"arm {name!r}: {form!r} is no form; write guard:, ramp:, follow: or floor:RULE"
            )
        if re.match("guard|floor", form) and not rule.measures:
            raise SystemExit(f"arm {name!r}: {last} measures no noise scale that could guard it")
        if match[2] == "floor":
            rule = dataclasses.replace(rule, guard_power=float(match[3] or 0.5))
        elif form != "guard":
            fields["form"] = match[1] or match[2]
            fields |= {"follow_share": float(match[3])} if match[3] else {}
    guarded = any(re.match("guard|floor", form) for form in forms)
    return Arm(name, rule.replace(guard=guarded), **fields)


def schedule(problem: Problem) -> optax.Schedule:
    return example.learning_rate(problem.base_updates, problem.learning_rate)


def make_optimizer(problem: Problem, arm: Arm, batch_size: int) -> Any:
    if arm.optimizer is not None:
        return arm.optimizer(problem, batch_size / problem.base_batch_size)
    return example.make_optimizer(batch_size, problem.base_batch_size, arm.rule, schedule(problem))
