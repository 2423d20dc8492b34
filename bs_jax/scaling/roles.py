"""What each hyperparameter of each optimizer means: roles, families and the registry by factory."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

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
    """

    kept: str
    formula: str
    low: float = 0.0
    high: float = float("inf")


ROLES: dict[str, Role] = {
    "learning_rate": Role("movement per example", "x F"),
    "decay": Role("half-life in examples", "decay^k", high=1.0),
    "second_moment_decay": Role("half-life in examples", "decay^k", high=1.0),
    "undamped_momentum": Role(
        "half-life in examples; learning rate x (1 - decay^k)/(1 - decay)", "decay^k", high=1.0
    ),
    "centering_decay": Role("half-life in examples", "decay^k", high=1.0),
    "variance_decay": Role("half-life in examples", "decay^k", high=1.0),
    "mixing_weight": Role("signal to noise of the mixed gradient", "solved", high=1.0),
    "eps": Role("size beside the root of the second moment", "x q"),
    "eps_root": Role("size beside the second moment", "x q^2"),
    "eps_sum": Role(
        "size beside the second moment it is added to at each update", "x q^2 (1-b^k)/(1-b)"
    ),
    "weight_decay": Role("learning rate x weight decay, per example", "x k/F"),
    "weight_decay_normalized": Role("size beside the normalised gradient", "x 1/q"),
    "divided_learning_rate": Role("movement per example", "x k q"),
    "weight_decay_independent": Role("decay per example", "1 - (1 - wd)^k", high=1.0),
    "l2": Role("size beside the gradient", "unchanged"),
    "gradient_norm": Role("size beside a raw gradient norm", "x q"),
    "update_norm": Role("size beside the update before the learning rate", "x q/d"),
    "period": Role("examples per period", "max(1, round(period/k))", low=1.0),
    "slow_step_size": Role(
        "share of the fast weights' way that the slow ones follow", "unchanged", high=1.0 + 1e-9
    ),
    "unchanged": Role("itself", "unchanged", low=-float("inf")),
}
UNSCALED = ("l2", "slow_step_size", "unchanged")


@dataclasses.dataclass(frozen=True)
class Family:
    """How an optimizer's update answers to the size and the noise of the gradient.

    Attributes:
        name: for tables.
        denominator: what the update is divided by: ``"none"``, ``"raw"`` (magnitude of the step's
            own gradient), ``"sum"`` (squares summed over steps), ``"centered"`` (variance).
        normalized: whether the update is normalised once more afterwards, so that F = k.
        second_moment: how the optimizer keeps it: ``"ema"``, ``"sum"``, ``"layer"`` (one number a
            leaf), ``"factored"``; these can be made invariant; ``"max"``, ``"centered"``,
            ``"centered_raw"`` or ``"none"`` cannot.
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
        return self.second_moment in ("ema", "sum", "layer", "factored")

    @property
    def lr_formula(self) -> str:
        """F, the factor on the learning rate when q is measured."""
        if self.normalized:
            return "k"
        return {"none": "k", "raw": "k q", "sum": "sqrt(k) q", "centered": "sqrt(k) c"}[
            self.denominator
        ]

    @property
    def lr_powers(self) -> tuple[float, float]:
        """F as a power of k: where noise dominates, and where signal does."""
        if self.normalized:
            return 1.0, 1.0
        return {"none": (1.0, 1.0), "raw": (0.5, 1.0), "sum": (0.0, 0.5), "centered": (0.5, 0.5)}[
            self.denominator
        ]


FAMILIES: dict[str, Family] = {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the registry knows of one factory.

    Attributes:
        name: of the factory.
        family: a name in ``FAMILIES``.
        roles: hyperparameter -> a name in ``ROLES``.
        clock: ``clock(scaler)`` gives the numbers by which what the factory itself cannot scale
            follows the batch size; ``None``: under this rule it does not.
        build: ``build(arguments, clock)`` makes the transformation with them.
        implied: hyperparameter -> the value, or the name of the argument, that ``None`` stands for.
    """

    name: str
    family: str
    roles: Mapping[str, str]
    clock: Callable[[Any], dict[str, Any] | None] | None = None
    build: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None = None
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Spec:
    """An optimizer as the scaling rules see it: resolved for one call of its factory.

    Attributes:
        factory: the optax factory.
        family: its family, ``None`` if a user's own factory did not say.
        roles: hyperparameter -> name of its role.
        entry: the registry's, ``None`` for a user's own factory.
    """

    factory: Factory
    family: Family | None
    roles: Mapping[str, str]
    entry: Entry | None = None


Resolver = Callable[[Mapping[str, Any]], Entry]
_REGISTRY: dict[Factory, tuple[str, Resolver]] = {}


def register(factory: Factory, entry: Entry, variant: Resolver | None = None) -> None:
    """Tell the registry what the hyperparameters of a factory mean.

    Args:
        factory: a function that returns an optax transformation.
        entry: what it is.
        variant: arguments -> entry, where it depends on them (``eps_in_sqrt`` and such).

    Raises:
        UserError: for an unknown family or role.
    """
    _check_names(entry.family, entry.roles)
    _REGISTRY[factory] = entry.name, variant or (lambda arguments: entry)


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
        >>> import optax
        >>> resolve_factory("adamw") is optax.adamw
        True
    """
    if callable(factory):
        return factory
    if not isinstance(factory, str):
        raise UserError(
            f"the optimizer is a {type(factory).__name__}; give its factory (optax.adam, not"
            " optax.adam(1e-3)) or the factory's name"
        )
    by_name = registered()
    if factory in by_name:
        return by_name[factory]
    raise UserError(f"unknown optimizer {factory!r}{_nearest(factory, by_name)}")


def registered() -> dict[str, Factory]:
    """Return every registered factory by name."""
    return {name: factory for factory, (name, _) in _REGISTRY.items()}


def bind(factory: Factory, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name, defaults filled in.

    Raises:
        UserError: if the factory does not take such arguments.
    """
    signature = inspect.signature(factory)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(
            f"{factory_name(factory)}: {error}; it takes {', '.join(signature.parameters)}"
        ) from error
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


def fill_implied(values: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Return values with what ``None`` stands for filled in, so that it can be scaled."""
    filled = dict(values)
    for name, implied in (spec.entry.implied if spec.entry else {}).items():
        if filled.get(name) is None:
            filled[name] = filled.get(implied) if isinstance(implied, str) else implied
    return filled


def factory_name(factory: Factory) -> str:
    """Return a factory's name for messages."""
    root = _root(factory)
    return _REGISTRY[root][0] if root in _REGISTRY else getattr(root, "__name__", repr(root))


def _root(factory: Factory) -> Factory:
    # Some optax factories are partials themselves (nadam), others a user made.
    while factory not in _REGISTRY and isinstance(factory, functools.partial):
        factory = factory.func
    return factory


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
    if roles is not None and not isinstance(roles, Mapping):
        raise UserError(f"roles is {roles!r}; give a mapping, e.g. {{'momentum': 'decay'}}")
    _check_names(family, roles or {})
    root = _root(factory)
    entry = _REGISTRY[root][1](arguments) if root in _REGISTRY else None
    chosen = family or (entry.family if entry else None)
    return Spec(
        factory=factory,
        family=FAMILIES[chosen] if chosen else None,
        roles={**(entry.roles if entry else {}), **(roles or {})},
        entry=entry,
    )
