"""The optimizers that the rules know, one line each, and a recipe: one call of a factory."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax.numpy as jnp
import optax
from optax import contrib

from bs_jax.errors import UserError
from bs_jax.scaling import clocked
from bs_jax.scaling.hyperparameters import (
    ROLES,
    Noise,
    NoiseScaleNeeded,
    Role,
    Scaled,
    ScalingWarning,
    check_batch_sizes,
    is_narrow,
    is_number,
    is_numeric,
)
from bs_jax.scaling.noise import step_share
from bs_jax.scaling.rules import FAMILIES, Family, Scalar, ScalingRule, nearest, resolve_rule

Factory = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What the rules know of one factory.

    Attributes:
        factory: a function that returns an optax transformation.
        family: a name in ``FAMILIES``; ``None`` where a user's own factory did not say.
        roles: hyperparameter -> a name in ``ROLES``.
        name: for messages and the command line.
        clocked: a factory with further keywords, for what the plain one cannot scale.
        clock: ``clock(scaled)`` gives those keywords; empty where the plain factory serves.
        implied: hyperparameter -> the value, or the name of the argument, that ``None`` stands for.
        variant: arguments -> the optimizer, where its roles depend on them.
        known: whether its state is known, and that it squares gradients as they are given; a
            user's own chain may clip them in front.
    """

    factory: Factory
    family: str | None
    roles: Mapping[str, str]
    name: str
    clocked: Factory | None = None
    clock: Callable[[Scaled], dict[str, Scalar]] | None = None
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    variant: Callable[[Mapping[str, Any]], Optimizer] | None = None
    known: bool = False


# By how an optimizer keeps its second moment: the role of the decay that averages it, and of that
# of the average which it is taken about.
MOMENT_DECAYS = {
    "ema": ("second_moment_decay",),
    "layer": ("second_moment_decay",),
    "centered": ("second_moment_decay", "centering_decay"),
    "centered_raw": ("variance_decay", "variance_decay"),
}

_TABLE: dict[Factory, Optimizer] = {}


def _check_names(family: str | None, roles: Mapping[str, str]) -> None:
    if family is not None and family not in FAMILIES:
        raise UserError(f"unknown family {family!r}{nearest(family, FAMILIES)}")
    for name, role in roles.items():
        if role not in ROLES:
            raise UserError(f"unknown role {role!r} for {name!r}{nearest(role, ROLES)}")


def register(
    factory: Factory, family: str, roles: Mapping[str, str], name: str = "", **more: Any
) -> None:
    """Add a line to the table: what the hyperparameters of a factory mean.

    Args:
        factory: a function that returns an optax transformation.
        family: a name in ``FAMILIES``.
        roles: hyperparameter -> a name in ``ROLES``.
        name: of the factory; by default its ``__name__``.
        **more: further attributes of ``Optimizer``.

    Raises:
        UserError: for an unknown family or role.
    """
    _check_names(family, roles)
    name = name or factory.__name__
    _TABLE[factory] = Optimizer(factory, family, roles, name, **more)


def registered() -> dict[str, Factory]:
    """Return every factory in the table by name."""
    return {line.name: factory for factory, line in _TABLE.items()}


_LR = {"learning_rate": "learning_rate"}
_ADAM = {**_LR, "b1": "decay", "b2": "second_moment_decay", "eps": "eps", "eps_root": "eps_root"}
_ADAMW = {**_ADAM, "weight_decay": "weight_decay"}
_ADAMAX = {**_LR, "b1": "decay", "b2": "decay", "eps": "eps"}
_LION = {**_LR, "b1": "mixing_weight", "b2": "decay", "weight_decay": "weight_decay"}
_NORMALIZED = {**_ADAM, "weight_decay": "weight_decay_normalized"}
_RMSPROP = {
    **_LR,
    "decay": "second_moment_decay",
    "eps": "eps",
    "initial_scale": "eps_root",
    "momentum": "undamped_momentum",
}
_LARS = {
    **_LR,
    "weight_decay": "l2",
    "trust_coefficient": "unchanged",
    "eps": "eps",
    "momentum": "undamped_momentum",
}
_ADAGRAD = {**_LR, "initial_accumulator_value": "eps_root", "eps": "eps_root"}
_ADAFACTOR = {
    **_LR,
    "min_dim_size_to_factor": "unchanged",
    "decay_rate": "unchanged",
    "decay_offset": "unchanged",
    "clipping_threshold": "update_norm",
    "momentum": "decay",
    "weight_decay_rate": "weight_decay_independent",
    "eps": "eps_root",
}
_MUON = {
    **_LR,
    "ns_steps": "unchanged",
    "beta": "decay",
    "eps": "eps",
    "weight_decay": "weight_decay",
    "adam_b1": "decay",
    "adam_b2": "second_moment_decay",
    "adam_eps_root": "eps_root",
    "adam_weight_decay": "weight_decay_normalized",
    "adam_learning_rate": "divided_learning_rate",
    "consistent_rms": "unchanged",
}
_SCHEDULE_FREE = {
    **_LR,
    "warmup_steps": "period",
    "b1": "unchanged",
    "weight_lr_power": "unchanged",
}
_SLOW = {"sync_period": "period", "slow_step_size": "slow_step_size"}


def _rmsprop(arguments: Mapping[str, Any]) -> Optimizer:
    """RMSProp's family and roles depend on two flags."""
    line, roles = _TABLE[optax.rmsprop], dict(_RMSPROP)
    if arguments.get("eps_in_sqrt", True):
        roles["eps"] = "eps_root"
    if arguments.get("centered"):
        roles["decay"] = "variance_decay"
        return dataclasses.replace(line, family="centered_rmsprop", roles=roles)
    return dataclasses.replace(line, roles=roles)


_RADAM: dict[str, Any] = {"clocked": clocked.radam, "clock": clocked.radam_clock}
_RANGER: dict[str, Any] = {"clocked": clocked.clocked_ranger, "clock": clocked.radam_clock}

_line = functools.partial(register, known=True)
_line(optax.adam, "adam", _ADAM)
_line(optax.adamw, "adam", _ADAMW)
_line(optax.nadam, "adam", _ADAM, "nadam")
_line(optax.nadamw, "adam", _ADAMW, "nadamw")
_line(optax.radam, "adam", {**_ADAM, "threshold": "unchanged"}, **_RADAM)
_line(clocked.ranger, "adam", {**_ADAMW, "threshold": "unchanged", **_SLOW}, **_RANGER)
_line(optax.amsgrad, "amsgrad", _ADAM)
_line(optax.adamax, "adamax", _ADAMAX)
_line(optax.adamaxw, "adamax", {**_ADAMAX, "weight_decay": "weight_decay"})
_line(optax.adabelief, "centered", {**_ADAM, "b1": "centering_decay", "eps_root": "eps_sum"})
_line(optax.sgd, "linear", {**_LR, "momentum": "undamped_momentum"})
_line(optax.lion, "sign", _LION)
_line(optax.lamb, "normalized_adam", _NORMALIZED)
_line(optax.lars, "lars", _LARS)
_line(optax.rmsprop, "rmsprop", _RMSPROP, variant=_rmsprop)
_line(optax.adagrad, "adagrad", _ADAGRAD)
_line(
    optax.adafactor,
    "adafactor",
    _ADAFACTOR,
    clocked=clocked.adafactor,
    clock=clocked.adafactor_clock,
    implied={"learning_rate": 1.0},
)
_line(optax.novograd, "novograd", {**_NORMALIZED, "b1": "undamped_momentum"})
_line(contrib.muon, "muon", _MUON, implied={"adam_learning_rate": "learning_rate"})
_line(contrib.schedule_free_sgd, "linear", {**_SCHEDULE_FREE, "weight_decay": "l2"})
_line(
    contrib.schedule_free_adamw,
    "adam",
    {**_SCHEDULE_FREE, "b2": "second_moment_decay", "eps": "eps", "weight_decay": "weight_decay"},
)
# Parts of an optimizer: they have no learning rate.
_line(optax.ema, "wrapper", {"decay": "decay"})
_line(
    optax.trace,
    "linear",
    {"decay": "undamped_momentum"},
    clocked=clocked.trace,
    clock=clocked.trace_gain,
)
_line(optax.clip_by_global_norm, "wrapper", {"max_norm": "gradient_norm"})
_line(optax.clip, "wrapper", {"max_delta": "gradient_norm"})
_line(optax.clip_by_block_rms, "wrapper", {"threshold": "gradient_norm"})
_line(optax.adaptive_grad_clip, "wrapper", {"clipping": "gradient_norm", "eps": "unchanged"})
_line(optax.lookahead, "wrapper", _SLOW)


def resolve_factory(factory: Factory | str) -> Factory:
    """Return the factory that a name stands for; a factory is returned as it is.

    Raises:
        UserError: if the table has no factory of that name; names the nearest.

    Example:
        >>> import optax
        >>> resolve_factory("adamw") is optax.adamw
        True
    """
    if callable(factory):
        return factory
    if not isinstance(cast(object, factory), str):
        raise UserError(
            f"the optimizer is a {type(factory).__name__}; give its factory (optax.adam, not"
            " optax.adam(1e-3)) or the factory's name"
        )
    by_name = registered()
    if factory in by_name:
        return by_name[factory]
    raise UserError(f"unknown optimizer {factory!r}{nearest(factory, by_name)}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One call of a factory: its arguments, tuned at the base batch size, and what they mean.

    Attributes:
        optimizer: what the rules know of the factory.
        family: its family; ``None`` if a user's own factory did not say.
        roles: hyperparameter -> role, for the names in ``arguments``.
        arguments: name -> value of the whole call, defaults filled in.
        idle: names that ``roles=`` gave a role and that the factory does not take.
        declared: names in ``arguments`` that ``roles=`` gave their role.
    """

    optimizer: Optimizer
    family: Family | None
    roles: Mapping[str, Role]
    arguments: Mapping[str, Any]
    idle: tuple[str, ...] = ()
    declared: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        factory: Factory | str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        roles: Mapping[str, str] | None = None,
        family: str | None = None,
        whole_call: bool = False,
    ) -> Recipe:
        """Return the recipe of one call of a factory, its values checked.

        Args:
            factory: an optax factory, its name, a ``functools.partial`` of one, or a user's own.
            args: positional arguments.
            kwargs: arguments by name; those with a role in ``roles`` need not be the factory's.
            roles: hyperparameter -> role, added to or in place of the table's.
            family: of a user's own factory.
            whole_call: whether the arguments must suffice to call the factory.

        Returns:
            The recipe.

        Raises:
            UserError: for unknown names, roles or families, and for values out of bounds.
        """
        if roles is not None and not isinstance(cast(object, roles), Mapping):
            raise UserError(f"roles is {roles!r}; give a mapping, e.g. {{'momentum': 'decay'}}")
        declared = dict(roles or {})
        _check_names(family, declared)
        factory, args, kwargs = _unwrapped(resolve_factory(factory), args, dict(kwargs or {}))
        optimizer = _TABLE.get(factory) or _own(factory)
        arguments = _bind(optimizer, args, kwargs, () if whole_call else declared, whole_call)
        if optimizer.variant is not None:
            optimizer = optimizer.variant(arguments)
        for name, implied in optimizer.implied.items():
            if arguments.get(name) is None:
                value = arguments.get(implied) if isinstance(implied, str) else implied
                arguments[name] = value
        chosen = family or optimizer.family
        named = {**optimizer.roles, **declared}
        meant = {n: ROLES[named[n]] for n in arguments if n in named}
        for name, role in meant.items():
            role.check(name, arguments[name])
            if name in declared:
                _check_is_decay(name, role, arguments[name])
        return cls(
            optimizer=optimizer,
            family=FAMILIES[chosen] if chosen else None,
            roles=meant,
            arguments=arguments,
            idle=tuple(name for name in declared if name not in arguments),
            declared=tuple(name for name in declared if name in arguments),
        )

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """What the rules may scale: every argument that has a role and a value."""
        return {n: v for n, v in self.arguments.items() if n in self.roles and v is not None}

    @functools.cached_property
    def schedules(self) -> frozenset[str]:
        """The names of the values that are schedules which optax itself accepts."""
        return frozenset(
            n for n, v in self.values.items() if callable(v) and self.roles[n].takes_schedule
        )

    def at(
        self,
        rule: ScalingRule,
        k: Scalar,
        noise: Noise | None = None,
        values: Mapping[str, Any] | None = None,
        phi: Scalar | None = None,
    ) -> Scaled:
        """Return the recipe under one rule at one k.

        Args:
            rule: the scaling rule.
            k: batch size over base batch size.
            noise: of the base batch's gradient, where it is known.
            values: base values in place of the recipe's own (schedules read, say).
            phi: noise scale over the base batch size, up to which a guard lets steps grow.

        Returns:
            Every hyperparameter in force.
        """
        return Scaled(
            optimizer=self.optimizer.name,
            family=self.family,
            roles=self.roles,
            values=self.values if values is None else values,
            rule=rule,
            k=k,
            noise=noise,
            share=step_share(k, phi if self.metric(rule) is not None else None),
            guards_moment=(
                rule.invariant and self.family is not None and self.family.guards_moment
            ),
            known=self.optimizer.known,
            own_clock=self.optimizer.clock,
        )

    def metric(self, rule: ScalingRule) -> str | None:
        """Return the metric in which a rule's guard measures the noise scale; ``None``: unguarded.

        What takes no steps of its own (a clip, a moving average) has none.
        """
        steps = self.family is not None and any(
            role.name == "learning_rate" for role in self.roles.values()
        )
        return self.family.metric if rule.guard and self.family is not None and steps else None

    def needs_noise(self, rule: ScalingRule) -> bool:
        """Whether a rule needs the noise to scale this recipe."""
        stand_ins = {n: v if is_number(v) else 0.5 for n, v in self.values.items()}
        try:
            scaled = self.at(rule, 2.0, values=stand_ins)
            for name in stand_ins:
                scaled.value(name)
        except NoiseScaleNeeded:
            return True
        return False

    def invariant_moment(self, rule: ScalingRule) -> str | None:
        """Return which second moment a rule makes that of the base batch size; ``None``: none.

        Raises:
            UserError: if the rule would, and cannot for this optimizer.
        """
        if not rule.invariant or self.family is None or not self.family.can_be_invariant:
            return None
        kind = self.family.second_moment
        for role in MOMENT_DECAYS.get(kind, ()):
            self.at(rule, 1.0).only(role)
        only = {"factored": "adafactor", "centered": "adabelief", "centered_raw": "rmsprop"}
        if kind in only and not self.optimizer.known:
            raise UserError(
                f"{self.optimizer.name}: rule {rule.name!r} knows the {kind} second moment of"
                f" optax.{only[kind]} alone; use rule='noise_aware', or another family"
            )
        return kind

    def cautions(self, rule: ScalingRule) -> list[str]:
        """Return what of this recipe a rule does not reach, or may not reach as meant."""
        return [
            *self._without_role(),
            *self._no_decays(),
            *self._misspelt(rule),
            *self._idle(),
            *self._without_rate(),
            *self._narrow(),
        ]

    def _without_role(self) -> list[str]:
        unknown = [
            name
            for name, value in self.arguments.items()
            if name not in self.roles
            and "dtype" not in name  # inject_hyperparams calls a dtype, and hands a number on
            and (is_numeric(value) or _is_schedule(name, value))
        ]
        if not unknown:
            return []
        if not self.roles and getattr(self.optimizer.factory, "__wrapped__", None) in _TABLE:
            return [
                f"{self.optimizer.name} inside another function (optax.inject_hyperparams, say) is"
                " not known, so nothing is scaled; put that function outside:"
                " optax.inject_hyperparams(bs_jax.scale_by_batch(...))"
            ]
        told = {name: role for name in unknown if (role := role_of_name(name))}
        rest = [name for name in unknown if name not in told]
        all_of_it = "" if self.roles else " and so the same at every batch size"
        advice = [f"pass roles={told}" if told else ""]
        if rest:
            advice.append(
                f"{'say in roles= what' if told else 'pass roles= to say what'}"
                f" {', '.join(rest)} {'is' if len(rest) == 1 else 'are'}: one of"
                f" {', '.join(ROLES)}"
            )
        return [
            f"{self.optimizer.name}: no role is known for {', '.join(unknown)}: left as given"
            f"{all_of_it}; {'; '.join(filter(None, advice))}"
        ]

    def _no_decays(self) -> list[str]:
        """Warn of a decay so low that a user probably means something else."""
        return [
            f"{name} = {self.values[name]:g} as {self.roles[name].name} halves what is averaged in"
            f" {math.log(0.5) / math.log(self.values[name]):.2g} updates of the base batch size: is"
            f" it no decay? {_role_advice(name)}"
            for name in self.declared
            if self.roles[name].is_decay
            and is_number(self.values.get(name))
            and 0 < self.values[name] < 0.5
        ]

    def _misspelt(self, rule: ScalingRule) -> list[str]:
        # A rule may serve more than the optimizer (BatchNorm's decay, say), so a name that it does
        # not take is no mistake in itself; one that is nearly one of its names is.
        found: list[str] = []
        for name, _ in rule.overrides:
            near = difflib.get_close_matches(name, self.arguments, n=1, cutoff=0.8)
            if name not in self.arguments and near:
                found.append(
                    f"rule {rule.name!r} changes {name!r}, which {self.optimizer.name} does not"
                    f" take; did you mean {near[0]!r}?"
                )
        return found

    def _idle(self) -> list[str]:
        if not self.idle:
            return []
        return [
            f"roles= names {', '.join(self.idle)}, which {self.optimizer.name} does not take;"
            f" it takes {', '.join(self.arguments)}"
        ]

    def _without_rate(self) -> list[str]:
        rates = [n for n, role in self.roles.items() if role.name.endswith("learning_rate")]
        if self.optimizer.known or rates or self.family in (None, FAMILIES["wrapper"]):
            return []
        return [
            f"{self.optimizer.name}: no argument has the role 'learning_rate', so the length of its"
            " updates stays the same at every batch size; make the rate an argument and name it in"
            " roles="
        ]

    def _narrow(self) -> list[str]:
        narrow = [
            f"{name} is {self.values[name].dtype}"
            for name, role in self.roles.items()
            if role.is_decay and is_narrow(getattr(self.values.get(name), "dtype", jnp.float32))
        ]
        if not narrow:
            return []
        return [
            f"{', '.join(narrow)}, which rounds decays near 1 to 1: give float32"
            " (optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32))"
        ]


# What the name of a hyperparameter tells, where it tells one thing alone: a "decay" may be a moving
# average's or the weights', a "scale" anything.
_NAMES = {
    "learning_rate": "learning_rate lr rate step_size",
    "eps": "eps epsilon",
    "eps_root": "eps_root",
    "gradient_norm": "clip max_norm clip_norm grad_clip max_grad_norm gradient_clip clip_grad_norm",
    "weight_decay": "weight_decay wd",
    "undamped_momentum": "momentum",
    "decay": "b1 beta1 beta_1 beta ema ema_decay bn_decay",
    "second_moment_decay": "b2 beta2 beta_2",
    "period": "sync_period warmup_steps",
}
_ROLE_OF_NAME = {name: role for role, names in _NAMES.items() for name in names.split()}
# A decay below it, at the base batch size, averages nothing.
_SMALLEST_DECAY = 0.1


def role_of_name(name: str) -> str | None:
    """Return the role that a hyperparameter's name alone tells; ``None`` where it tells none.

    Example:
        >>> role_of_name("lr"), role_of_name("max_norm"), role_of_name("rank")
        ('learning_rate', 'gradient_norm', None)
    """
    return _ROLE_OF_NAME.get(name)


def _role_advice(name: str) -> str:
    told = role_of_name(name)
    if told is not None and not ROLES[told].is_decay:
        return f"its name says roles={{{name!r}: {told!r}}}"
    return (
        "a learning rate is 'learning_rate', a weight decay 'weight_decay'; what torch calls"
        " BatchNorm's momentum is 1 - decay"
    )


def _check_is_decay(name: str, role: Role, value: object) -> None:
    """Raise a ``UserError`` where a user's role says decay and the value can be none."""
    if role.is_decay and is_number(value) and 0 < value <= _SMALLEST_DECAY:
        raise UserError(
            f"{name} is {value:g}, but as {role.name} it would keep {value:g} of an average at each"
            f" update of the base batch size, which averages nothing: {_role_advice(name)}"
        )


# What a schedule is called, where only a name tells it from other functions (masks, say).
_SCHEDULE_NAMES = re.compile(r"rate|lr|schedule|step_size|decay")


def _is_schedule(name: str, value: object) -> bool:
    return callable(value) and "mask" not in name and bool(_SCHEDULE_NAMES.search(name))


def _own(factory: Factory) -> Optimizer:
    return Optimizer(factory, None, {}, getattr(factory, "__name__", repr(factory)))


def _unwrapped(
    factory: Factory, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Factory, tuple[Any, ...], dict[str, Any]]:
    """Return the function inside partials, and what they call it with."""
    # Some optax factories are partials themselves (nadam), others a user made.
    while factory not in _TABLE and isinstance(factory, functools.partial):
        args, kwargs = (*factory.args, *args), {**factory.keywords, **kwargs}
        factory = factory.func
    return factory, args, kwargs


def _bind(
    optimizer: Optimizer,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    others: Mapping[str, str] | tuple[()],
    whole_call: bool,
) -> dict[str, Any]:
    """Return all arguments by name, defaults filled in, in the factory's order."""
    signature = inspect.signature(optimizer.factory)
    taken = {n: v for n, v in kwargs.items() if n in signature.parameters or n not in others}
    try:
        bind = signature.bind if whole_call else signature.bind_partial
        bound = bind(*args, **taken)
    except TypeError as error:
        raise UserError(
            f"{optimizer.name}: {error}; it takes {', '.join(signature.parameters)}"
        ) from error
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            if value:
                raise UserError(f"{optimizer.name}: name the arguments passed as *{name}")
        else:
            named[name] = value
    return {**named, **{n: v for n, v in kwargs.items() if n not in taken}}


def missing_noise(recipe: Recipe, rule: ScalingRule, *, by_coordinate: bool = False) -> UserError:
    """Return the error for a rule that needs the noise and has none, or only its scale."""
    scale = "" if by_coordinate else "noise_scale= (examples), or "
    return UserError(
        f"rule {rule.name!r} with {recipe.optimizer.name} needs the gradient noise: give {scale}"
        "update(..., microbatch=) from bs_jax.value_grad_and_stats with 2 or more micro-batches."
        " What lies in between must hand it on: flax's TrainState.apply_gradients and optax's"
        " MultiSteps(...).gradient_transformation(), lookahead and"
        " contrib.split_real_and_imaginary do not"
    )


def scale_hyperparams(
    factory: Callable[..., Any] | str,
    hyperparams: Mapping[str, Any],
    *,
    batch_size: int,
    base_batch_size: int,
    rule: str | ScalingRule = "sqrt",
    guard: bool | None = None,
    noise_scale: float | None = None,
    roles: Mapping[str, str] | None = None,
    family: str | None = None,
) -> dict[str, Any]:
    r"""Return hyperparameters for another batch size: pure arithmetic, floats in, floats out.

    For Adam under ``"sqrt"``: ``lr k^(1/2), b^k, wd k^(1/2), eps k^(-1/2)`` with
    ``k = batch_size / base_batch_size``.

    Args:
        factory: the optax factory (or its name) that the hyperparameters belong to.
        hyperparams: name -> value at the base batch size. A callable learning rate (a schedule in
            base-size updates) comes back as a schedule in updates of ``batch_size``.
        batch_size: examples per update to scale to.
        base_batch_size: examples per update that the values were tuned at.
        rule: a name, ``"power(a)"``, or a ``ScalingRule``.
        guard: whether steps grow with the batch only up to a given noise scale; ``None``: as the
            rule says.
        noise_scale: gradient noise scale in examples: for ``"noise_aware"``, and for the guard.
        roles: further names -> role, e.g. ``{"bn_decay": "decay"}``: BatchNorm's decay or a weight
            average then follow the same rule.
        family: of a user's own factory.

    Returns:
        name -> new value, for the given names and no others.

    Raises:
        UserError: for invalid values, unknown names of rules or roles, or a missing noise scale.

    Example:
        >>> new = scale_hyperparams("adamw", {"learning_rate": 1e-3, "b1": 0.9, "bn_decay": 0.9},
        ...     batch_size=256, base_batch_size=64, rule="sqrt", roles={"bn_decay": "decay"})
        >>> {name: round(value, 6) for name, value in new.items()}
        {'learning_rate': 0.002, 'b1': 0.6561, 'bn_decay': 0.6561}

    Reference:
        Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, 2022.
    """
    check_batch_sizes(batch_size, base_batch_size)
    rule = resolve_rule(rule).replace(guard=guard)
    recipe = Recipe.of(factory, kwargs=hyperparams, roles=roles, family=family)
    # Raises where the rule promises what it cannot do.
    invariant = recipe.invariant_moment(rule) is not None and batch_size != base_batch_size
    if invariant and "learning_rate" in hyperparams:
        warnings.warn(
            f"these numbers alone do not do what rule {rule.name!r} promises: it needs the second"
            " moment as the base batch size would have shown it, which scale_by_batch estimates;"
            f" for a plain {recipe.optimizer.name} use rule='sqrt'",
            ScalingWarning,
            stacklevel=2,
        )
    noise = None if noise_scale is None else Noise.from_scale(noise_scale, base_batch_size)
    phi = None if noise is None else noise.phi
    scaled = recipe.at(rule, batch_size / base_batch_size, noise, phi=phi)
    try:
        return {
            name: scaled.schedule_or_value(name) if name in recipe.values else value
            for name, value in hyperparams.items()
        }
    except NoiseScaleNeeded:
        raise missing_noise(recipe, rule) from None
