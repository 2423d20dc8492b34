"""The order of examples, exact evaluation batches, and streamed data equal to resident data."""

import hashlib
import threading
import time
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_jax.data import (
    ArraySplit,
    check_batch_size,
    device_arrays,
    device_budget_bytes,
    eval_batches,
    example_order,
    fits_on_device,
    num_bytes,
    process_columns,
)
from bs_jax.data.streaming import stream
from bs_jax.errors import UserError

seeds = st.integers(0, 2**64 - 1)


def numbered_split(count: int) -> ArraySplit:
    images = np.random.default_rng(0).integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
    return ArraySplit(images, np.arange(count) % 7, 1 + np.arange(count) / 8)


@given(seed=seeds, num_examples=st.integers(1, 50), epoch=st.integers(0, 2**40))
def test_each_epoch_is_a_permutation(seed, num_examples, epoch):
    order = example_order(seed, num_examples, epoch * num_examples, num_examples)
    assert sorted(order.tolist()) == list(range(num_examples))


@given(
    seed=seeds,
    num_examples=st.integers(1, 30),
    start=st.integers(0, 100),
    first=st.integers(0, 70),
    second=st.integers(0, 70),
)
def test_windows_join(seed, num_examples, start, first, second):
    whole = example_order(seed, num_examples, start, first + second)
    parts = [
        example_order(seed, num_examples, start, first),
        example_order(seed, num_examples, start + first, second),
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@given(num_examples=st.integers(1, 40), batch_size=st.integers(1, 40), epochs=st.integers(1, 4))
def test_dropping_the_remainder(num_examples, batch_size, epochs):
    if batch_size > num_examples:
        with pytest.raises(UserError, match="does not fit"):
            example_order(0, num_examples, 0, 1, drop_remainder_batch_size=batch_size)
        return
    kept = num_examples // batch_size * batch_size
    order = example_order(
        3, num_examples, 0, epochs * kept, drop_remainder_batch_size=batch_size
    ).reshape(epochs, kept)
    for epoch in range(epochs):
        whole = example_order(3, num_examples, epoch * num_examples, num_examples)
        np.testing.assert_array_equal(order[epoch], whole[:kept])


def test_batch_size_does_not_change_the_stream():
    small = [example_order(1, 100, step * 4, 4) for step in range(75)]
    large = [example_order(1, 100, step * 30, 30) for step in range(10)]
    np.testing.assert_array_equal(np.concatenate(small), np.concatenate(large))


def test_epochs_and_seeds_differ():
    orders = [example_order(seed, 1000, epoch * 1000, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Of two independent permutations of 1,000, one place on average agrees.
            assert (one == other).sum() < 10


def test_order_never_changes():
    order = example_order(7, 8000, 7990, 100)
    assert order.dtype == np.int32
    assert (
        hashlib.sha256(order.astype("<i4").tobytes()).hexdigest()
        == "e3e36ccce85d97b894d63a645690f25065be7aa7b08106075c75946adbce1f04"
    )


def test_positions_are_uniform():
    places = [example_order(seed, 20, 0, 1).item() for seed in range(4000)]
    counts = np.bincount(places, minlength=20)
    # Chi-squared with 19 degrees of freedom: 50 is exceeded once in 10,000.
    assert ((counts - 200) ** 2 / 200).sum() < 50


def test_returned_window_is_free_to_change():
    order = example_order(5, 10, 0, 10)
    order[:] = -1
    assert sorted(example_order(5, 10, 0, 10).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("seed", "num_examples", "start", "count"),
    [(-1, 5, 0, 1), (2**64, 5, 0, 1), (0, 0, 0, 1), (0, 5, -1, 1), (0, 5, 0, -1)],
)
def test_impossible_orders_are_refused(seed, num_examples, start, count):
    with pytest.raises(UserError):
        example_order(seed, num_examples, start, count)


@pytest.mark.parametrize("batch_size", [-1, 0, 101])
def test_batch_size_out_of_range(batch_size):
    with pytest.raises(UserError, match=f"batch_size {batch_size} .* 100"):
        check_batch_size(batch_size, 100)
    check_batch_size(1, 100)
    check_batch_size(100, 100)


@given(num_examples=st.integers(1, 200), batch_size=st.integers(1, 64))
def test_evaluation_visits_each_example_once(num_examples, batch_size):
    indices, mask = eval_batches(num_examples, batch_size)
    assert indices.shape == mask.shape == (-(-num_examples // batch_size), batch_size)
    assert indices[mask].tolist() == list(range(num_examples))
    assert mask.any(axis=1).all()
    assert indices.min() >= 0
    assert indices.max() < num_examples


@pytest.mark.parametrize(("num_examples", "batch_size"), [(0, 4), (4, 0), (4, -2)])
def test_empty_evaluation_is_refused(num_examples, batch_size):
    with pytest.raises(UserError):
        eval_batches(num_examples, batch_size)


@given(local_size=st.integers(1, 16), process_count=st.integers(1, 8))
def test_processes_share_a_batch_without_overlap(local_size, process_count):
    batch = np.arange(local_size * process_count)
    parts = [batch[process_columns(len(batch), p, process_count)] for p in range(process_count)]
    np.testing.assert_array_equal(np.concatenate(parts), batch)


def test_uneven_share_names_sizes_that_work():
    with pytest.raises(UserError, match="multiple such as 96 or 104"):
        process_columns(100, 0, 8)
    with pytest.raises(UserError, match="process 2 of 2"):
        process_columns(8, 2, 2)


def test_resident_data_is_the_split():
    split = numbered_split(9)
    images, labels, aspects = device_arrays(split)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(aspects, split.aspects)
    np.testing.assert_array_equal(images, split.images)
    np.testing.assert_array_equal(labels, split.labels)


def test_resident_data_replicated_over_devices():
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    images, labels, _ = device_arrays(numbered_split(9), sharding)
    assert len(images.addressable_shards) == len(devices)
    assert labels.sharding.is_fully_replicated


def test_budget_decides_what_stays_resident():
    split = numbered_split(9)
    assert num_bytes(split) == 9 * 5 * 4 * 3
    assert fits_on_device(split, 540)
    assert not fits_on_device(split, 539)
    device = jax.local_devices()[0]
    assert device_budget_bytes(device, 0.5) == pytest.approx(
        2 * device_budget_bytes(device, 0.25), abs=2
    )


@pytest.mark.parametrize(("told", "limit"), [({"bytes_limit": 1 << 34}, 16), (None, 8), ({}, 8)])
def test_an_accelerator_counts_its_own_memory_and_never_the_machines(told, limit):
    device = types.SimpleNamespace(platform="tpu", memory_stats=lambda: told)
    assert device_budget_bytes(device, 0.5) == limit << 29


@pytest.mark.parametrize("start", [0, 3])
def test_streamed_batches_equal_resident_ones(start):
    pytest.importorskip("grain")
    split, seed, batch_size, steps = numbered_split(23), 4, 6, 3
    orders = [
        example_order(seed, len(split), step * batch_size, steps * batch_size).reshape(
            steps, batch_size
        )
        for step in range(start, start + 12, steps)
    ]
    resident = device_arrays(split)
    gather = jax.jit(lambda order: tuple(leaf[order] for leaf in resident))
    chunks = list(stream(split, orders))
    assert len(chunks) == len(orders)
    for order, chunk in zip(orders, chunks, strict=True):
        for streamed, gathered in zip(chunk, gather(order), strict=True):
            assert streamed.dtype == gathered.dtype
            np.testing.assert_array_equal(streamed, gathered)


def test_streamed_parts_of_processes_join():
    pytest.importorskip("grain")
    split = numbered_split(23)
    order = example_order(0, 23, 0, 24).reshape(3, 8)
    whole = next(stream(split, [order]))
    parts = [next(stream(split, [order[:, process_columns(8, p, 2)]])) for p in range(2)]
    for leaf in (0, 1, 2):
        joined = np.concatenate([part[leaf] for part in parts], axis=1)
        np.testing.assert_array_equal(joined, whole[leaf])


def test_streaming_reads_lazily_and_stops_when_dropped():
    pytest.importorskip("grain")

    class Orders(list):
        asked = 0

        def __getitem__(self, number):
            self.asked += 1
            return super().__getitem__(number)

    orders = Orders([np.arange(4)] * 500)
    before = set(threading.enumerate())
    chunks = stream(numbered_split(4), orders, num_threads=1, chunks_ahead=1)
    next(chunks)
    assert orders.asked < 20
    del chunks
    deadline = time.monotonic() + 60  # the reading threads notice soon
    while len(left := set(threading.enumerate()) - before) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(left) <= 1, left


def test_no_orders_give_no_chunks():
    assert list(stream(numbered_split(4), [])) == []


@pytest.mark.parametrize("counts", [{"num_threads": 0}, {"chunks_ahead": 0}])
def test_streaming_without_threads_is_refused(counts):
    with pytest.raises(UserError, match="at least 1"):
        stream(numbered_split(4), [np.arange(4)], **counts)
