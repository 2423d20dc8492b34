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
        own_convolutions: those of `bs_jax.models.cpu`, not XLA's.
        one_pass_statistics: BatchNorm reads its input once for mean and variance, not twice.
        sums_by_rows: BatchNorm sums ghost batches over up to 128 rows of positions side by side,
            then over the rows, and both sums of a pass at once.
        fused_activation: BatchNorm and the activation behind it keep only BatchNorm's input for
            the backward pass, which computes the normalised values again.
        pointwise_products: 1x1 convolutions as matrix products.
        native_max_pool: max pooling by XLA's own windows, not by maxima of slices.
    """

    own_convolutions: bool = False
    one_pass_statistics: bool = False
    sums_by_rows: bool = False
    fused_activation: bool = False
    pointwise_products: bool = False
    native_max_pool: bool = False


_DEFAULTS = {
    # Measured: `benchmarks.conv_forms` and docs/notes/cpu-convolutions.md.
    "cpu": LayerForms(own_convolutions=True),
    # Counted in the compiled program, not timed: `benchmarks.compiled` and docs/performance.md.
    "gpu": LayerForms(one_pass_statistics=True, sums_by_rows=True, fused_activation=True),
}

_chosen: contextvars.ContextVar[LayerForms | None] = contextvars.ContextVar("forms", default=None)


def of(backend: str) -> LayerForms:
    """The forms of a back end ("cpu", "gpu", "tpu"); the plain ones where none is known.

    Example:
        >>> of("cpu").own_convolutions, of("tpu") == LayerForms()
        (True, True)
    """
    return _DEFAULTS.get(backend, LayerForms())


def current() -> LayerForms:
    """The forms in use where a network is traced: those of `use`, or the back end's own."""
    chosen = _chosen.get()
    return of(jax.default_backend()) if chosen is None else chosen


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
