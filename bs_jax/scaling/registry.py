"""The optimizers that the scaling rules know: optax's, and this package's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax
from optax import contrib

from bs_jax.scaling import rebuild
from bs_jax.scaling.ranger import ranger
from bs_jax.scaling.roles import FAMILIES, Entry, Family, register

_FAMILIES = (
    Family("linear", note="linear in the gradient"),
    Family("adam", "raw", second_moment="ema", note="filtered gradient / root of second moment"),
    Family("rmsprop", "raw", second_moment="ema", trace_after_lr=True),
    Family(
        "centered",
        "centered",
        second_moment="centered",
        note="divides by the spread about its own average, which holds the batch's noise alone",
    ),
    Family(
        "centered_rmsprop",
        "centered",
        second_moment="centered_raw",
        trace_after_lr=True,
        label="approximate",
        note="the lag of its average behind a moving gradient counts as spread, beside the noise",
    ),
    Family(
        "amsgrad",
        "raw",
        second_moment="ema",
        label="approximate",
        note="the largest of many noisy second moments depends on how many there were",
    ),
    Family(
        "adamax",
        "raw",
        second_moment="max",
        label="approximate",
        note="the largest of many noisy gradients depends on how many there were",
    ),
    Family("normalized_adam", "raw", normalized=True, second_moment="ema"),
    Family(
        "sign",
        normalized=True,
        note="the mixing weight is solved to keep signal to noise, which ends at 0 for large k",
    ),
    Family(
        "muon",
        "raw",
        normalized=True,
        second_moment="ema",
        label="approximate",
        note="Nesterov's raw share of the gradient is no time constant",
    ),
    Family("lars", "raw", trace_after_lr=True),
    Family("adagrad", "sum", second_moment="sum"),
    Family("adafactor", "raw", second_moment="factored", trace_after_lr=True),
    Family("novograd", "raw", second_moment="layer"),
    Family("wrapper", note="has no learning rate of its own"),
)
FAMILIES.update({family.name: family for family in _FAMILIES})

_RATES = {"learning_rate": "learning_rate"}
_ADAM = {
    **_RATES,
    "b1": "decay",
    "b2": "second_moment_decay",
    "eps": "eps",
    "eps_root": "eps_root",
}
_ADAMW = {**_ADAM, "weight_decay": "weight_decay"}


def _rmsprop(arguments: Mapping[str, Any]) -> Entry:
    return Entry(
        "rmsprop",
        "centered_rmsprop" if arguments["centered"] else "rmsprop",
        {
            **_RATES,
            "decay": "variance_decay" if arguments["centered"] else "second_moment_decay",
            "eps": "eps_root" if arguments["eps_in_sqrt"] else "eps",
            "initial_scale": "eps_root",
            "momentum": "undamped_momentum",
        },
    )


def _register_all() -> None:
    adams = {
        "adam": (optax.adam, _ADAM),
        "adamw": (optax.adamw, _ADAMW),
        "nadam": (optax.nadam, _ADAM),
        "nadamw": (optax.nadamw, _ADAMW),
    }
    for name, (factory, roles) in adams.items():
        register(factory, Entry(name, "adam", roles))
    register(
        optax.radam,
        Entry(
            "radam",
            "adam",
            {**_ADAM, "threshold": "unchanged"},
            clock=rebuild.radam_clock,
            build=rebuild.radam,
        ),
    )
    register(
        ranger,
        Entry(
            "ranger",
            "adam",
            {
                **_ADAMW,
                "threshold": "unchanged",
                "sync_period": "period",
                "slow_step_size": "slow_step_size",
            },
            clock=rebuild.radam_clock,
            build=rebuild.ranger,
        ),
    )
    register(optax.amsgrad, Entry("amsgrad", "amsgrad", _ADAM))
    adamax = {**_ADAM, "b2": "decay"}
    del adamax["eps_root"]
    register(optax.adamax, Entry("adamax", "adamax", adamax))
    register(optax.adamaxw, Entry("adamaxw", "adamax", {**adamax, "weight_decay": "weight_decay"}))
    register(
        optax.adabelief,
        Entry("adabelief", "centered", {**_ADAM, "b1": "centering_decay", "eps_root": "eps_sum"}),
    )
    register(optax.sgd, Entry("sgd", "linear", {**_RATES, "momentum": "undamped_momentum"}))
    register(
        optax.lion,
        Entry(
            "lion",
            "sign",
            {**_RATES, "b1": "mixing_weight", "b2": "decay", "weight_decay": "weight_decay"},
        ),
    )
    register(
        optax.lamb,
        Entry("lamb", "normalized_adam", {**_ADAM, "weight_decay": "weight_decay_normalized"}),
    )
    register(
        optax.lars,
        Entry(
            "lars",
            "lars",
            {
                **_RATES,
                "weight_decay": "l2",
                "trust_coefficient": "unchanged",
                "eps": "eps",
                "momentum": "undamped_momentum",
            },
        ),
    )
    register(optax.rmsprop, Entry("rmsprop", "rmsprop", {}), _rmsprop)
    register(
        optax.adagrad,
        Entry(
            "adagrad",
            "adagrad",
            {**_RATES, "initial_accumulator_value": "eps_root", "eps": "eps_root"},
        ),
    )
    register(
        optax.adafactor,
        Entry(
            "adafactor",
            "adafactor",
            {
                **_RATES,
                "min_dim_size_to_factor": "unchanged",
                "decay_rate": "unchanged",
                "decay_offset": "unchanged",
                "clipping_threshold": "update_norm",
                "momentum": "decay",
                "weight_decay_rate": "weight_decay_independent",
                "eps": "eps_root",
            },
            clock=rebuild.adafactor_clock,
            build=rebuild.adafactor,
            implied={"learning_rate": 1.0},
        ),
    )
    register(
        optax.novograd,
        Entry(
            "novograd",
            "novograd",
            {**_ADAM, "b1": "undamped_momentum", "weight_decay": "weight_decay_normalized"},
        ),
    )
    _register_contrib()
    _register_wrappers()


def _register_contrib() -> None:
    register(
        contrib.muon,
        Entry(
            "muon",
            "muon",
            {
                **_RATES,
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
            },
            implied={"adam_learning_rate": "learning_rate"},
        ),
    )
    schedule_free = {
        **_RATES,
        "warmup_steps": "period",
        "b1": "unchanged",
        "weight_lr_power": "unchanged",
    }
    register(
        contrib.schedule_free_sgd,
        Entry("schedule_free_sgd", "linear", {**schedule_free, "weight_decay": "l2"}),
    )
    register(
        contrib.schedule_free_adamw,
        Entry(
            "schedule_free_adamw",
            "adam",
            {
                **schedule_free,
                "b2": "second_moment_decay",
                "eps": "eps",
                "weight_decay": "weight_decay",
            },
        ),
    )


def _register_wrappers() -> None:
    register(optax.ema, Entry("ema", "wrapper", {"decay": "decay"}))
    register(
        optax.trace,
        Entry(
            "trace",
            "linear",
            {"decay": "undamped_momentum"},
            clock=rebuild.trace_clock,
            build=rebuild.trace,
        ),
    )
    register(
        optax.clip_by_global_norm,
        Entry("clip_by_global_norm", "wrapper", {"max_norm": "gradient_norm"}),
    )
    register(optax.clip, Entry("clip", "wrapper", {"max_delta": "gradient_norm"}))
    register(
        optax.clip_by_block_rms,
        Entry("clip_by_block_rms", "wrapper", {"threshold": "gradient_norm"}),
    )
    register(
        optax.adaptive_grad_clip,
        Entry("adaptive_grad_clip", "wrapper", {"clipping": "gradient_norm", "eps": "unchanged"}),
    )
    register(
        optax.lookahead,
        Entry(
            "lookahead", "wrapper", {"sync_period": "period", "slow_step_size": "slow_step_size"}
        ),
    )


_register_all()
