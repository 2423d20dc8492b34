"""What kind of value each field of a config holds: asked before anything looks at the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bs_jax.errors import UserError

_LARGEST = 2**63  # beyond it no number of a recipe has a meaning, nor an array of numpy's


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not isinstance(value, int) or abs(value) < _LARGEST


def _is_list(value: Any, item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(item, value))


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and _is_text(value[0])
        and _is_number(value[1])
    )


_NUMBERS = (
    "seed batch_size base_batch_size train_examples train_epochs micro_batch_size bn_decay "
    "ghost_batch_size ema_decay label_smoothing eval_batch_size eval_every_examples "
    "log_every_examples checkpoint_every_examples scaling.offset scaling.noise_scale "
    "schedule.warmup_examples schedule.flat_fraction schedule.final_fraction data.train_size "
    "data.image_size data.train_storage_size data.eval_storage_size data.crop_padding report.margin"
)
_TEXTS = (
    "name title scaling.rule optimizer.name optimizer.decay_mask schedule.name data.name data.fit "
    "model.name model.dtype report.accuracy_metric report.smoothed_metric report.loss_metric "
    "report.curve_metric"
)
_FLAGS = "drop_remainder bn_cross_device data.streamed data.flip tensorboard"
# Kind, whether a value is of it, and the fields that hold it. Sections come first.
_KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "a section of fields",
        lambda value: isinstance(value, Mapping),
        "scaling optimizer optimizer.hyperparams schedule data model report",
    ),
    ("a number below 2**63", _is_number, _NUMBERS),
    ("a text", _is_text, _TEXTS),
    ("True or False", _is_flag, _FLAGS),
    ("a list of numbers", lambda value: _is_list(value, _is_number), "data.mean data.std"),
    (
        "two numbers",
        lambda value: _is_list(value, _is_number) and len(value) == 2,
        "data.crop_area",
    ),
    ("a list of names", lambda value: _is_list(value, _is_text), "scaling.off"),
    (
        "a list of pairs (name, number)",
        lambda value: _is_list(value, _is_pair),
        "scaling.offsets",
    ),
)


def check_form(config: Mapping[str, Any]) -> None:
    """Raise a UserError for the first field that is missing or holds another kind of value.

    Args:
        config: a recipe, nested.
    """
    for kind, fits, paths in _KINDS:
        for path in paths.split():
            value: Any = config
            for name in path.split("."):
                if name not in value:
                    raise UserError(f"config.{path} is missing; it holds {kind}")
                value = value[name]
            if not fits(value):
                raise UserError(f"config.{path} is {value!r:.80}; it must be {kind}")
    for name, value in config["optimizer"]["hyperparams"].items():
        if not (_is_number(value) or _is_flag(value)):
            raise UserError(
                f"config.optimizer.hyperparams.{name} is {value!r:.80}; it must be a number below "
                "2**63, or True or False"
            )
