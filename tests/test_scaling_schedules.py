"""Batch-size ramps and batch growth in place of learning-rate decay."""

import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_jax.errors import UserError
from bs_jax.scaling import problems, scale_by_batch
from bs_jax.scaling.schedules import (
    Stage,
    batch_growth_from_decay,
    batch_size_ramp,
    ramp_within_noise,
)


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=6),
    length=st.integers(1000, 20_000),
)
def test_a_ramp_sees_the_examples_it_should(sizes, length):
    stages = batch_size_ramp(sizes, length)
    assert [s.batch_size for s in stages] == sizes
    for i, stage in enumerate(stages):
        assert abs(stage.start_examples - i * length) <= sizes[i - 1] / 2 + 1
    assert stages[0].start_examples == 0


def test_uneven_stages():
    assert batch_size_ramp((64, 100), (100, 300)) == [Stage(64, 2, 0), Stage(100, 3, 128)]


@given(
    factors=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6),
    lr_power=st.sampled_from([0.5, 1.0]),
    largest=st.integers(64, 100_000),
)
def test_growth_keeps_what_the_decay_meant(factors, lr_power, largest):
    stages = batch_growth_from_decay(
        factors, batch_size=64, largest_batch_size=largest, lr_power=lr_power, multiple_of=8
    )
    for (size, rate), factor in zip(stages, factors, strict=True):
        assert 64 <= size <= largest
        assert size % 8 == 0
        # At the base size this rate is the decayed one.
        assert rate * (64 / size) ** lr_power == pytest.approx(factor)


def test_growing_the_batch_does_what_decaying_the_rate_does():
    """SGD on the noisy quadratic: a rate of 1, 1/2, 1/4, 1/8 or a batch of 1, 2, 4, 8 times."""
    quarter = 1000

    def decayed(batch_size, base_batch_size):
        return optax.sgd(lambda t: 1e-3 * 0.5 ** (t // quarter))

    def grown(batch_size, base_batch_size):
        def rate(step):  # one examples clock for both: undo k, which the linear rule puts in
            return 1e-3 * 0.5 ** (step // quarter)

        make = scale_by_batch(
            optax.sgd, batch_size=batch_size, base_batch_size=base_batch_size, rule="linear"
        )
        return make(rate)

    sizes = tuple(
        s
        for s, _ in batch_growth_from_decay(
            (1, 0.5, 0.25, 0.125), batch_size=64, largest_batch_size=512
        )
    )
    assert sizes == (64, 128, 256, 512)
    by_rate = problems.run(decayed, k=1, sigmas=[1.0])
    by_batch = problems.run(grown, k=1, sigmas=[1.0], batch_sizes=sizes)
    np.testing.assert_allclose(by_batch, by_rate, atol=0.003)


def test_a_ramp_that_waits_for_the_noise():
    next_batch_size = ramp_within_noise(batch_size=64, largest_batch_size=300, share=0.5)
    size, seen = 64, []
    for noise_scale in (100.0, 255.0, 256.0, 256.0, 512.0, 10_000.0, 1.0):
        size = next_batch_size(size, noise_scale)
        seen.append(size)
    assert seen == [64, 64, 128, 128, 256, 300, 300]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_size_ramp((), 100), "0 batch sizes"),
        (lambda: batch_size_ramp((64, 128), (100,)), "1 stage lengths"),
        (lambda: batch_size_ramp((0,), 100), "batch size 0"),
        (lambda: batch_size_ramp((1000,), 100), "no update of 1000"),
        (lambda: batch_growth_from_decay((0.0,), batch_size=8, largest_batch_size=8), "0.0"),
        (lambda: batch_growth_from_decay((1,), batch_size=8, largest_batch_size=4), "largest"),
        (lambda: batch_growth_from_decay((1,), batch_size=8, largest_batch_size=8, lr_power=0),
         "lr_power"),
        (lambda: ramp_within_noise(batch_size=8, largest_batch_size=4), "largest"),
        (lambda: ramp_within_noise(batch_size=8, largest_batch_size=8, growth=1.0), "growth"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
