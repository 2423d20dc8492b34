"""What an accelerator would round or stall on: programs lowered for a TPU, where none is needed.

A TPU rounds the factors of a float32 product to bfloat16 unless told otherwise, and so do GPUs, to
TensorFloat-32. A norm or a noise scale made of such products would be wrong in the third digit.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.scaling import PARAMS
from helpers.training import tiny_config, tiny_data

from bs_jax import scaling
from bs_jax.models.attention import SimpleSelfAttention
from bs_jax.models.pooling import max_blur_pool
from bs_jax.scaling import GradientAccumulator, MicrobatchStats, problems
from bs_jax.sweep.points import resolve
from bs_jax.training import step

STATS = MicrobatchStats(PARAMS, 4, PARAMS)
OPTIMIZERS = {name: (check.factory, check.recipe) for name, check in problems.checks().items()} | {
    "adafactor, factored": (
        optax.adafactor,
        {"learning_rate": 1e-3, "min_dim_size_to_factor": 2, "momentum": 0.9},
    ),
    "clip_by_global_norm": (optax.clip_by_global_norm, {"max_norm": 0.5}),
    "clip_by_block_rms": (optax.clip_by_block_rms, {"threshold": 0.5}),
    "adaptive_grad_clip": (optax.adaptive_grad_clip, {"clipping": 0.5}),
}
# By default one of each arithmetic.
SAMPLE = ("adamw", "adabelief", "lamb", "muon", "adafactor, factored", "clip_by_global_norm")


def lowered(function, *arguments):
    """The text of a program for a TPU, with the scope of every operation."""
    traced = getattr(function, "trace", None) or jax.jit(function).trace
    return traced(*arguments).lower(lowering_platforms=("tpu",)).as_text(debug_info=True)


def products(program):
    """(scope, whether its factors stay whole) of every matrix product and convolution."""
    scopes = dict(re.findall(r'^(#loc\d+) = loc\("([^"]*)"', program, re.MULTILINE))
    lines = re.findall(r"^.*stablehlo\.(?:dot|dot_general|convolution)\b.*$", program, re.MULTILINE)
    return [
        (scopes[re.search(r"loc\((#loc\d+)\)\s*$", line)[1]], line.count("HIGHEST") == 2)
        for line in lines
    ]


def rounded(program):
    return [scope for scope, whole in products(program) if not whole]


def test_the_checks_see_what_they_look_for():
    def program(x):
        with jax.named_scope("here"):
            y = jnp.vdot(x, x)
        return y + jnp.vdot(x, x, precision="highest")

    text = lowered(program, jnp.ones(8))
    found = products(text)
    assert [whole for _, whole in found] == [False, True]
    assert "here" in found[0][0]
    with pytest.raises(ValueError, match="different from the lowering platform"):
        lowered(lambda x: jax.debug.print("{}", x), 1.0)  # nothing that calls the host passes here


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.long) for n in OPTIMIZERS],
)
def test_an_update_rounds_nothing_that_optax_does_not(name):
    """Muon's own iteration is all there is: Newton-Schulz does not need whole factors."""
    factory, recipe = OPTIMIZERS[name]
    tx = scaling.scale_by_batch(factory, batch_size=64, base_batch_size=16)(**recipe)

    def update(grads, state, params, batch_size, microbatch):
        return tx.update(grads, state, params, batch_size=batch_size, microbatch=microbatch)

    state = jax.eval_shape(tx.init, PARAMS)
    text = lowered(update, PARAMS, state, PARAMS, jnp.int32(64), STATS)
    found = rounded(text)
    if found:
        assert factory is optax.contrib.muon
        plain = factory(**recipe)
        state = jax.eval_shape(plain.init, PARAMS)
        assert len(found) == len(rounded(lowered(plain.update, PARAMS, state, PARAMS)))


def test_what_is_measured_is_rounded_nowhere():
    def loss(params, batch):  # without products of its own
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params)) * jnp.mean(batch)

    def measured(params, batch, gathered, groups):
        value, grads, stats = scaling.value_grad_and_stats(loss, microbatches=4)(params, batch)
        found = [
            scaling.noise_sample(grads, stats, batch_size=64, metric=metric)
            for metric in ("plain", "coordinate", "layer")
        ]
        _, groups = by_group.update(grads, groups, microbatch=stats, batch_size=64)
        gathered = gathered.add(grads)
        return value, found, gathered, gathered.result(params), scaling.noise_scale_by_group(groups)

    by_group = scaling.noise_by_group({"w": "matrix", "b": "vector"}, batch_size=64)
    gathered = GradientAccumulator.zeros_like(PARAMS)
    text = lowered(measured, PARAMS, jnp.ones((8, 2)), gathered, by_group.init(PARAMS))
    assert not products(text)


def test_training_rounds_inside_the_network_alone(monkeypatch):
    """With what a run may have: random crops, noise, a guard, a ramp, an average of the weights."""
    run = resolve(
        tiny_config(
            **{
                "parallel": "jit",
                "scaling.rule": "invariant",
                "base_batch_size": 8,
                "micro_batch_size": 4,
                "batch_ramp.kind": "noise",
                "ema_decay": 0.9,
                "data.crop_padding": 0,
                "data.crop_area": (0.35, 1.0),
            }
        )
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    data = tiny_data()
    images, inputs = data.train.images, step.run_inputs(run)
    programs = step.make_programs(run, 3, data.image_shape, jax.devices()[:1])
    state = jax.eval_shape(programs.init, inputs)
    resident = (images, data.train.labels, np.ones(len(images), np.float32))
    numbers = np.zeros((1, 2, 16), np.int32)
    mask = np.ones(numbers.shape, bool)
    training = lowered(programs.train_chunk, state, inputs, resident, np.int32(2), numbers)
    evaluation = lowered(programs.evaluate, state, inputs, resident, (numbers, mask))
    for text in (lowered(programs.init, inputs), training, evaluation):
        assert all("ResNet" in scope for scope in rounded(text)), rounded(text)
    assert len(rounded(training)) == 5  # the stem and the head, their weights, the head's input


def test_pools_and_the_power_iteration_keep_float32():
    x = jnp.ones((1, 4, 4, 8))
    assert [whole for _, whole in products(lowered(max_blur_pool, x))] == [True, True]
    module = SimpleSelfAttention()
    variables = jax.eval_shape(lambda key: module.init(key, x, train=False), jax.random.key(0))
    found = products(
        lowered(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]), variables, x)
    )
    assert [whole for _, whole in found].count(True) == 4  # v, u, and sigma's two
