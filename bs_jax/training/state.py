"""What training carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """The whole state of one run; a checkpoint of it is all that resuming needs.

    Attributes:
        step: updates done, int32 scalar.
        examples: examples seen, int32 scalar: the clock of schedules, data and metrics (a float32
            would stop counting at 2**24).
        params: parameters, float32.
        batch_stats: BatchNorm's running statistics, float32.
        opt_state: the optimizer's state.
        ema_params: moving average of the parameters, or ``()`` where it is off.
    """

    step: jax.Array
    examples: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any
