"""The plan of a run: cadences in examples, the same chunks however often it is interrupted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_jax.training.plan import Plan, per_device


def make_plan(train=100, log=16, evaluate=40, checkpoint=0, short=False):
    return Plan(train, log, evaluate, checkpoint, short)


sizes = st.integers(1, 40)
plans = st.builds(
    make_plan,
    train=st.integers(40, 400),
    log=st.integers(1, 100),
    evaluate=st.integers(1, 200),
    checkpoint=st.integers(0, 200),
    short=st.booleans(),
)


def last_update(plan, size):
    return plan.train_examples // size


@given(plans, sizes)
def test_chunks_cover_every_update_once_and_end_with_an_evaluation(plan, size):
    chunks = list(plan.chunks(size))
    assert [c.start for c in chunks] == [0, *(c.end for c in chunks[:-1])]
    assert [c.examples for c in chunks] == [c.start * size for c in chunks]
    assert chunks[-1].end == last_update(plan, size)
    assert chunks[-1].evaluate
    assert all(c.end > c.start for c in chunks)
    (longest,) = {c.longest for c in chunks}  # so one program serves them all
    assert max(c.updates for c in chunks) <= longest <= last_update(plan, size)
    if plan.is_even(size):
        assert {c.updates for c in chunks} == {longest}
    assert [plan.is_last(c) for c in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize(
    ("size", "train", "lengths"),
    [(64, 188_160, {147}), (8, 189_280, {1176, 140}), (128, 186_880, {74, 73, 63})],
)
def test_the_published_recipe_has_chunks_of_one_length_at_its_own_batch_size(size, train, lengths):
    plan = make_plan(train, evaluate=9408, checkpoint=47_040)
    assert {c.updates for c in plan.chunks(size)} == lengths
    assert plan.is_even(size) == (len(lengths) == 1)


@given(plans, sizes)
def test_events_are_the_first_updates_that_have_seen_a_multiple_of_their_cadence(plan, size):
    last = last_update(plan, size)

    def due(every):
        steps = {-(-m * every // size) for m in range(1, plan.train_examples // every + 1)}
        return {step for step in steps if step <= last} | {last}

    evaluations = due(plan.eval_every_examples)
    every = plan.checkpoint_every_examples
    checkpoints = due(every) if every else set()
    logs = due(plan.log_every_examples)
    chunks = list(plan.chunks(size))
    assert {c.end for c in chunks if c.evaluate} == evaluations
    assert {c.end for c in chunks if c.checkpoint} == checkpoints
    assert {c.end for c in chunks} == evaluations | checkpoints | (
        logs if plan.short_chunks else set()
    )
    windows = {end for c in chunks for _, end in plan.log_windows(c)}
    assert windows == logs | {c.end for c in chunks}


@given(plans, sizes)
def test_a_resumed_run_goes_through_the_same_chunks(plan, size):
    chunks = list(plan.chunks(size))
    for position, chunk in enumerate(chunks):
        assert list(plan.chunks(size, chunk.end, chunk.end_examples)) == chunks[position + 1 :]


@given(plans, sizes)
def test_log_windows_partition_each_chunk(plan, size):
    for chunk in plan.chunks(size):
        updates = [u for start, end in plan.log_windows(chunk) for u in range(start, end)]
        assert updates == list(range(chunk.start, chunk.end))


def test_events_happen_at_the_first_update_past_the_cadence():
    # 40 and 80 examples fall due within updates 5 and 10 of 8 examples; 96 of 100 can be trained.
    ends = [(c.end, c.evaluate) for c in make_plan().chunks(8)]
    assert ends == [(5, True), (10, True), (12, True)]
    # With 12 examples an update, 40 examples are first reached in update 4 (48 examples).
    assert [c.end for c in make_plan().chunks(12)] == [4, 7, 8]


def test_checkpoints_also_at_the_end():
    chunks = list(make_plan(checkpoint=64).chunks(8))
    assert [c.end for c in chunks if c.checkpoint] == [8, 12]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_each_device_takes_consecutive_examples(devices):
    batches = np.arange(24).reshape(3, 8)
    split = per_device(batches, devices)
    assert split.shape == (devices, 3, 8 // devices)
    together = np.concatenate(list(split), axis=1)
    np.testing.assert_array_equal(together, batches)
