"""What may be a hyperparameter or a batch size, and the errors that say what may not."""

from __future__ import annotations

import math
import numbers
from typing import Any, cast

import numpy as np

from bs_jax.errors import UserError
from bs_jax.scaling.roles import ROLES

MAX_EXAMPLES = np.iinfo(np.int32).max


def is_number(value: Any) -> bool:
    """Whether a value is a plain number: not a bool, an array or a tracer."""
    return isinstance(value, (numbers.Real, np.number)) and not isinstance(value, (bool, np.bool_))


def is_numeric(value: Any) -> bool:
    """Whether a value can be a hyperparameter: a plain number or a scalar array or tracer."""
    return is_number(value) or (hasattr(value, "dtype") and getattr(value, "shape", None) == ())


def shown(value: Any) -> str:
    """Return a value as a message has it."""
    shape = getattr(value, "shape", None)
    return repr(value) if not shape else f"an array of shape {shape}"


def check_batch_sizes(batch_size: Any, base_batch_size: Any) -> None:
    """Raise a ``UserError`` unless both are positive integers."""
    for name, value in (("batch_size", batch_size), ("base_batch_size", base_batch_size)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise UserError(
                f"{name} is {value!r}, which is no integer; give the global number of examples in"
                " one update, e.g. 256 (a traced one goes to update(..., batch_size=))"
            )
        if not 1 <= value <= MAX_EXAMPLES:
            raise UserError(
                f"{name} is {value}; give at least 1 example per update, and at most"
                f" {MAX_EXAMPLES:,}, which the int32 clock of examples counts to"
            )


def check_value(name: str, role_name: str, value: Any) -> None:
    """Raise a ``UserError`` for what is no hyperparameter, or a number its role does not allow."""
    switched_off = value is None and role_name != "learning_rate"
    if callable(value) or switched_off:
        return
    if not is_numeric(value) or np.issubdtype(getattr(value, "dtype", float), np.complexfloating):
        raise UserError(
            f"{name} is {shown(value)}, but as {role_name} it must be a real number, a scalar"
            f" array or a schedule; change {name}"
        )
    if not is_number(value):
        return
    role, number = ROLES[role_name], cast("float", value)
    if math.isfinite(number) and role.low <= number < role.high:
        return
    bounds = f"at least {role.low:g}" + (f" and below {role.high:g}" if role.high < 2 else "")
    if role.low == -math.inf:
        bounds = "finite"
    raise UserError(f"{name} is {value}, but as {role_name} it must be {bounds}; change {name}")
