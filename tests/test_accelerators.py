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
from jax.experimental import topologies

from bs_jax import scaling
from bs_jax.models.attention import SimpleSelfAttention
from bs_jax.models.pooling import max_blur_pool
from bs_jax.scaling import GradientAccumulator, MicrobatchStats, problems
from bs_jax.sweep.points import resolve
from bs_jax.training import parallel, step

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


def programs_of_a_run(devices, **overrides):
    """The programs of a run with all that it may have, and the shapes they are called with."""
    run = resolve(
        tiny_config(
            **{
                "parallel": "jit",
                "batch_size": 64,
                "scaling.rule": "invariant",
                "base_batch_size": 8,
                "micro_batch_size": 4,
                "batch_ramp.kind": "noise",
                "ema_decay": 0.9,
                "data.crop_padding": 0,
                "data.crop_area": (0.35, 1.0),
                **overrides,
            }
        )
    )
    data, count = tiny_data(), len(devices)
    programs = step.make_programs(run, 3, data.image_shape, devices)
    inputs = step.run_inputs(run)
    state = jax.eval_shape(programs.init, inputs)
    images = data.train.images
    resident = (images, data.train.labels, np.ones(len(images), np.float32))
    whole = (state, inputs, resident, np.int32(2))
    state, inputs, resident, updates = parallel.replicated_shapes(whole, devices)
    numbers = jax.ShapeDtypeStruct((count, 2, run.batch_size // count), np.int32)
    mask = jax.ShapeDtypeStruct(numbers.shape, bool)
    return {
        "init": (programs.init, (inputs,)),
        "train_chunk": (programs.train_chunk, (state, inputs, resident, updates, numbers)),
        "evaluate": (programs.evaluate, (state, inputs, resident, (numbers, mask))),
    }


def test_training_rounds_inside_the_network_alone(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    programs = programs_of_a_run(jax.devices()[:1])
    found = {name: rounded(lowered(call, *given)) for name, (call, given) in programs.items()}
    assert all("ResNet" in scope for scopes in found.values() for scope in scopes), found
    # The stem and the head, their weights' gradients, and the gradient of the head's input.
    assert len(found["train_chunk"]) == 5


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:2x2x1", "v6e:2x4"])
@pytest.mark.parametrize("cross_device", [False, True])
def test_the_compiler_of_a_tpu_takes_them(topology, cross_device, monkeypatch):
    """For chips that are not there; gradients are reduced once an update, all together."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # at a flag that it does not know libtpu aborts
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    shared = {"bn_cross_device": cross_device, "ghost_batch_size": 0 if cross_device else 4}
    programs = programs_of_a_run(described.devices, **shared)
    texts = {
        name: call.lower(*given).compile().as_text() for name, (call, given) in programs.items()
    }
    reductions = len(re.findall(r" all-reduce(?:-start)?\(", texts["train_chunk"]))
    if len(described.devices) == 1:
        assert not reductions
    else:
        assert reductions > 1 if cross_device else reductions == 1


def test_pools_and_the_power_iteration_keep_float32():
    x = jnp.ones((1, 4, 4, 8))
    assert [whole for _, whole in products(lowered(max_blur_pool, x))] == [True, True]
    module = SimpleSelfAttention()
    variables = jax.eval_shape(lambda key: module.init(key, x, train=False), jax.random.key(0))
    found = products(
        lowered(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]), variables, x)
    )
    assert [whole for _, whole in found].count(True) == 4  # v, u, and sigma's two
