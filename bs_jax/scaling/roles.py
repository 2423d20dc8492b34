"""What each hyperparameter of each optimizer means: roles, families and the registry by factory."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from bs_jax.errors import UserError

Factory = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Role:
    """What a hyperparameter means to the scaling rules.

    Attributes:
        kept: what stays the same when the batch size changes.
        formula: the new value, for tables.
        low: smallest valid base value.
        high: base values must lie below it.
        open_low: whether ``low`` itself is invalid.
    """

    kept: str
    formula: str
    low: float = 0.0
    high: float = float("inf")
    open_low: bool = False


ROLES: dict[str, Role] = {
    "learning_rate": Role("movement per example", "x F"),
    "decay": Role("half-life in examples", "decay^k", high=1.0),
    "second_moment_decay": Role("half-life in examples", "decay^k", high=1.0),
    "undamped_momentum": Role(
        "half-life in examples; learning rate x (1 - decay^k)/(1 - decay)", "decay^k", high=1.0
    ),
    "centering_decay": Role("half-life in examples", "decay^k", high=1.0),
    "mixing_weight": Role("signal to noise of the mixed gradient", "solved", high=1.0),
    "eps": Role("size beside the root of the second moment", "x q"),
    "eps_root": Role("size beside the second moment", "x q^2"),
    "weight_decay": Role("learning rate x weight decay, per example", "x k/F"),
    "weight_decay_normalized": Role("size beside the normalised gradient", "x 1/q"),
    "weight_decay_independent": Role("decay per example", "1 - (1 - wd)^k", high=1.0),
    "l2": Role("size beside the gradient", "unchanged"),
    "gradient_norm": Role("size beside a raw gradient norm", "x q", open_low=False),
    "period": Role("examples per period", "max(1, round(period/k))", low=1.0),
    "slow_step_size": Role(
        "share of the slow weights replaced per example", "1 - (1 - a)^(k p'/p)", high=1.0 + 1e-9
    ),
    "unchanged": Role("itself", "unchanged", low=-float("inf")),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """How an optimizer's update answers to the size and the noise of the gradient.

    Attributes:
        name: for tables.
        denominator: what the update is divided by: ``"none"``, ``"raw"`` (magnitude of the step's
            own gradient), ``"sum"`` (squares summed over steps), ``"centered"`` (variance).
        normalized: whether the update is normalised once more afterwards, so that F = k.
        second_moment: how the optimizer keeps it: ``"ema"``, ``"sum"``, ``"layer"`` (one number a
            leaf), ``"max"``, ``"centered"`` or ``"none"``. The first three can be made invariant.
        trace_after_lr: whether momentum is taken after the learning rate.
        label: ``"exact"`` or ``"approximate"``, as the noisy quadratic shows.
        note: what a user should know.
    """

    name: str
    denominator: str = "none"
    normalized: bool = False
    second_moment: str = "none"
    trace_after_lr: bool = False
    label: str = "exact"
    note: str = ""

    @property
    def can_be_invariant(self) -> bool:
        """Whether the second moment can be replaced by that of the base batch size."""
        return self.second_moment in ("ema", "sum", "layer")

    @property
    def lr_formula(self) -> str:
        """F, the factor on the learning rate when q is measured."""
        if self.normalized:
            return "k"
        return {"none": "k", "raw": "k q", "sum": "sqrt(k) q", "centered": "sqrt(k) c"}[
            self.denominator
        ]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("linear", note="linear in the gradient"),
        Family("adam", "raw", second_moment="ema"),
        Family("wrapper", note="has no learning rate of its own"),
    )
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """An optimizer as the scaling rules see it: resolved for one call of its factory.

    Attributes:
        factory: the optax factory.
        family: its family, ``None`` if a user's own factory did not say.
        roles: hyperparameter -> name of its role.
        build: called in place of the factory, with ``clock=`` (see ``rebuild.Clock``) added, where
            the optax factory alone cannot follow the batch size; ``None``: the factory serves.
    """

    factory: Factory
    family: Family | None
    roles: Mapping[str, str]
    build: Factory | None = None


Resolver = Callable[[Mapping[str, Any]], tuple[str, dict[str, str], Factory | None]]
_REGISTRY: dict[Factory, Resolver] = {}


def register(
    factory: Factory,
    family: str,
    build: Factory | None = None,
    **roles: str,
) -> None:
    """Tell the registry what the hyperparameters of a factory mean.

    Args:
        factory: a function that returns an optax transformation.
        family: a name in ``FAMILIES``.
        build: used in place of ``factory`` where the batch size is not the base one.
        **roles: hyperparameter -> a name in ``ROLES``.

    Raises:
        UserError: for an unknown family or role.
    """
    _check_names(family, roles)
    _REGISTRY[factory] = lambda arguments: (family, roles, build)


def register_variants(factory: Factory, resolver: Resolver) -> None:
    """Register a factory whose roles depend on its other arguments (``eps_in_sqrt`` and such)."""
    _REGISTRY[factory] = resolver


def _check_names(family: str | None, roles: Mapping[str, str]) -> None:
    if family is not None and family not in FAMILIES:
        raise UserError(f"unknown family {family!r}{_nearest(family, FAMILIES)}")
    for name, role in roles.items():
        if role not in ROLES:
            raise UserError(f"unknown role {role!r} for {name!r}{_nearest(role, ROLES)}")


def _nearest(word: str, choices: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.4)
    hint = f": did you mean {near[0]!r}? " if near else ": "
    return f"{hint}choose from {', '.join(choices)}"


def resolve_factory(factory: Factory | str) -> Factory:
    """Return the factory that a name stands for: looked up in optax, then in optax.contrib.

    Args:
        factory: a factory, or the name of a registered one.

    Returns:
        The factory.

    Raises:
        UserError: if no registered factory has that name; names the nearest.

    Example:
        >>> resolve_factory("adamw") is optax.adamw
        True
    """
    if callable(factory):
        return factory
    by_name = registered()
    if factory in by_name:
        return by_name[factory]
    raise UserError(f"unknown optimizer {factory!r}{_nearest(factory, by_name)}")


def registered() -> dict[str, Factory]:
    """Return every registered factory by name."""
    return {factory.__name__: factory for factory in _REGISTRY}


def bind(factory: Factory, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name, defaults filled in.

    Raises:
        UserError: if the factory does not take such arguments.
    """
    signature = inspect.signature(factory)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f"{factory_name(factory)}: {error}; it takes {signature}") from error
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise UserError(f"{factory_name(factory)}: name the arguments passed as *{name}")
        else:
            named[name] = value
    return named


def factory_name(factory: Factory) -> str:
    """Return a factory's name for messages."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "__name__", repr(factory))


def resolve(
    factory: Factory,
    arguments: Mapping[str, Any],
    roles: Mapping[str, str] | None = None,
    family: str | None = None,
) -> Spec:
    """Return what the hyperparameters of one call of a factory mean.

    Args:
        factory: an optax factory, a ``functools.partial`` of one, or a user's own.
        arguments: the call's arguments by name, defaults filled in.
        roles: hyperparameter -> role, added to or in place of the registry's.
        family: of a user's own factory; needed where the learning rate follows the noise.

    Returns:
        The resolved spec.

    Raises:
        UserError: for unknown roles or families.
    """
    _check_names(family, roles or {})
    root = factory
    while isinstance(root, functools.partial):
        root = root.func
    known_family, known_roles, build = (None, {}, None)
    if root in _REGISTRY:
        known_family, known_roles, build = _REGISTRY[root](arguments)
    chosen = family or known_family
    return Spec(
        factory=factory,
        family=FAMILIES[chosen] if chosen else None,
        roles={**known_roles, **(roles or {})},
        build=build,
    )


_ADAM = {
    "learning_rate": "learning_rate",
    "b1": "decay",
    "b2": "second_moment_decay",
    "eps": "eps",
    "eps_root": "eps_root",
}

register(optax.adam, "adam", **_ADAM)
register(optax.adamw, "adam", **_ADAM, weight_decay="weight_decay")
register(optax.sgd, "linear", learning_rate="learning_rate", momentum="undamped_momentum")
register(optax.ema, "wrapper", decay="decay")
