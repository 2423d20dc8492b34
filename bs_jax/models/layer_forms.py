"""In which forms a network's layers are computed: equal values, another speed by back end."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class LayerForms:
    """Alternatives that agree up to rounding.

    Attributes:
        one_pass_statistics: BatchNorm reads its input once for mean and variance, not twice.
        fused_activation: BatchNorm and the activation behind it keep only BatchNorm's input for
            the backward pass, which computes the normalised values again.
        pointwise_products: 1x1 convolutions as matrix products.
        native_max_pool: max pooling by XLA's own windows, not by maxima of slices.
    """

    one_pass_statistics: bool = False
    fused_activation: bool = False
    pointwise_products: bool = False
    native_max_pool: bool = False


# By back end; another one takes the plain forms. `benchmarks.gpu --parts=forms` measures them.
_DEFAULTS: dict[str, LayerForms] = {}

_chosen: contextvars.ContextVar[LayerForms | None] = contextvars.ContextVar("forms", default=None)


def current() -> LayerForms:
    """The forms in use where a network is traced: those of `use`, or the back end's own."""
    chosen = _chosen.get()
    return _DEFAULTS.get(jax.default_backend(), LayerForms()) if chosen is None else chosen


@contextlib.contextmanager
def use(forms: LayerForms) -> Iterator[None]:
    """Trace networks in these forms inside the context.

    Args:
        forms: for all networks traced inside; programs traced before keep theirs.

    Example:
        >>> with use(LayerForms(one_pass_statistics=True)):
        ...     current().one_pass_statistics
        True
    """
    token = _chosen.set(forms)
    try:
        yield
    finally:
        _chosen.reset(token)
