"""The plan of a run: cadences in examples, the same chunks however often it is interrupted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_jax.training.plan import Plan, per_device


def make_plan(batch_size=8, train=100, log=16, evaluate=40, checkpoint=0, short=False):
    return Plan(batch_size, train, log, evaluate, checkpoint, short)


plans = st.builds(
    make_plan,
    batch_size=st.integers(1, 40),
    train=st.integers(40, 400),
    log=st.integers(1, 100),
    evaluate=st.integers(1, 200),
    checkpoint=st.integers(0, 200),
    short=st.booleans(),
)


@given(plans)
def test_chunks_cover_every_update_once_and_end_with_an_evaluation(plan):
    chunks = list(plan.chunks())
    assert [c.start for c in chunks] == [0, *(c.end for c in chunks[:-1])]
    assert chunks[-1].end == plan.num_steps
    assert chunks[-1].evaluate
    assert all(c.end > c.start for c in chunks)


@given(plans)
def test_a_resumed_run_goes_through_the_same_chunks(plan):
    chunks = list(plan.chunks())
    for position, chunk in enumerate(chunks):
        assert list(plan.chunks(chunk.end)) == chunks[position + 1 :]


@given(plans)
def test_log_windows_partition_each_chunk(plan):
    for chunk in plan.chunks():
        updates = [u for start, end in plan.log_windows(chunk) for u in range(start, end)]
        assert updates == list(range(chunk.start, chunk.end))


def test_events_happen_at_the_first_update_past_the_cadence():
    # 40 and 80 examples fall due within updates 5 and 10 of 8 examples; 96 of 100 can be trained.
    ends = [(c.end, c.evaluate) for c in make_plan().chunks()]
    assert ends == [(5, True), (10, True), (12, True)]
    # With 12 examples an update, 40 examples are first reached in update 4 (48 examples).
    assert [c.end for c in make_plan(batch_size=12).chunks()] == [4, 7, 8]


def test_checkpoints_also_at_the_end():
    chunks = list(make_plan(checkpoint=64).chunks())
    assert [c.end for c in chunks if c.checkpoint] == [8, 12]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_each_device_takes_consecutive_examples(devices):
    batches = np.arange(24).reshape(3, 8)
    split = per_device(batches, devices)
    assert split.shape == (devices, 3, 8 // devices)
    together = np.concatenate(list(split), axis=1)
    np.testing.assert_array_equal(together, batches)
