"""Which example comes when: the run's stream of examples, exact evaluation batches, residence."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bs_jax.data.image_data import ArraySplit, Split
from bs_jax.errors import UserError

_LEAST_MEMORY = 8 << 30  # bytes, of an accelerator that does not tell its own


def example_order(
    seed: int,
    num_examples: int,
    start: int,
    count: int,
    *,
    drop_remainder_batch_size: int | None = None,
) -> np.ndarray:
    """Return the examples at positions [start, start + count) of a run's stream.

    The stream is one permutation of all examples after another, an epoch each:
    `stream[p] = permutation(seed, p // N)[p % N]`. Nothing else is remembered, so any window is
    found directly, a resumed run needs only its count of examples seen, and every batch size with
    the same seed sees the same examples in the same order.

    Args:
      seed: the run's data seed, 0 <= seed < 2**64.
      num_examples: N, examples in the training split.
      start: first position (examples seen before the window).
      count: positions in the window.
      drop_remainder_batch_size: if given, each epoch ends with its last whole batch of this size,
        and the N mod B examples left over are dropped (other ones each epoch).

    Returns:
      int32 [count], positions in the split.

    Raises:
      UserError: a number is out of range.

    >>> order = example_order(seed=0, num_examples=5, start=0, count=10)
    >>> sorted(order[:5].tolist()), sorted(order[5:].tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    >>> bool((example_order(0, 5, 3, 4) == order[3:7]).all())
    True
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"data seed {seed} is out of range; use 0 <= seed < 2**64")
    if num_examples < 1 or start < 0 or count < 0:
        raise UserError(
            f"cannot take {count} examples from position {start} of {num_examples} examples; "
            "all three must be non-negative and the data set not empty"
        )
    epoch_examples = num_examples
    if drop_remainder_batch_size is not None:
        check_batch_size(drop_remainder_batch_size, num_examples)
        epoch_examples -= num_examples % drop_remainder_batch_size
    window = np.empty(count, np.int32)
    filled = 0
    while filled < count:
        epoch, offset = divmod(start + filled, epoch_examples)
        taken = min(count - filled, epoch_examples - offset)
        permutation = _epoch_permutation(seed, epoch, num_examples)
        window[filled : filled + taken] = permutation[offset : offset + taken]
        filled += taken
    return window


@functools.lru_cache(maxsize=16)
def _epoch_permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    # Sorting Philox's raw output, not Generator.permutation: NumPy keeps only the former the same
    # from version to version, and a resumed run must find its old order.
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    permutation = np.argsort(raw, kind="stable").astype(np.int32)
    permutation.flags.writeable = False
    return permutation


def check_batch_size(batch_size: int, num_examples: int) -> None:
    """Refuse a batch that is empty or larger than an epoch.

    Args:
      batch_size: global batch, examples an update.
      num_examples: examples in the training split.

    Raises:
      UserError: `batch_size` is not in 1..num_examples.

    >>> check_batch_size(64, 8000)
    """
    if not 1 <= batch_size <= num_examples:
        raise UserError(
            f"batch_size {batch_size} does not fit {num_examples} training examples; "
            f"use 1 <= batch_size <= {num_examples}"
        )


def eval_batches(num_examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return batches that visit each example exactly once, the last one padded and masked.

    Args:
      num_examples: N, examples to evaluate.
      batch_size: B, examples a batch.

    Returns:
      `indices`, int32 [S, B] with S = ceil(N / B), padded with 0; `mask`, bool [S, B], False where
      padded. Sums over `mask` divided by N are exact.

    Raises:
      UserError: a number is below 1.

    >>> indices, mask = eval_batches(5, 2)
    >>> indices.tolist(), mask.sum().item()
    ([[0, 1], [2, 3], [4, 0]], 5)
    """
    if num_examples < 1 or batch_size < 1:
        raise UserError(
            f"cannot evaluate {num_examples} examples in batches of {batch_size}; both must be >= 1"
        )
    num_batches = -(-num_examples // batch_size)
    positions = np.arange(num_batches * batch_size, dtype=np.int32)
    mask = positions < num_examples
    indices = np.where(mask, positions, 0).astype(np.int32)
    return indices.reshape(num_batches, batch_size), mask.reshape(num_batches, batch_size)


def process_columns(batch_size: int, process_index: int, process_count: int) -> slice:
    """Return the columns of a global batch that one process feeds to its devices.

    Args:
      batch_size: global batch, examples.
      process_index: this process, 0 <= process_index < process_count.
      process_count: processes that share each batch.

    Raises:
      UserError: the batch does not divide evenly.

    >>> process_columns(8, process_index=1, process_count=2)
    slice(4, 8, None)
    """
    local_size, rest = divmod(batch_size, process_count)
    if rest or not 0 <= process_index < process_count:
        lower = max(batch_size - rest, process_count)
        raise UserError(
            f"batch_size {batch_size} cannot be shared by process {process_index} of "
            f"{process_count}; use a multiple such as {lower} or {lower + process_count}"
        )
    return slice(process_index * local_size, (process_index + 1) * local_size)


def num_bytes(split: Split) -> int:
    """Return the bytes of all images of `split` as uint8.

    >>> num_bytes(ArraySplit(np.zeros((4, 2, 2, 3), np.uint8), np.zeros(4, np.int32)))
    48
    """
    height, width, channels = split.image_shape
    return len(split) * height * width * channels


def fits_on_device(split: Split, budget_bytes: int) -> bool:
    """Tell whether `split` may stay on the device as uint8 within `budget_bytes`.

    >>> fits_on_device(ArraySplit(np.zeros((4, 2, 2, 3), np.uint8), np.zeros(4, np.int32)), 47)
    False
    """
    return num_bytes(split) <= budget_bytes


def device_budget_bytes(device: Any, fraction: float) -> int:
    """Return `fraction` of the memory that `device` may use, in bytes.

    Args:
      device: a local `jax.Device`; a CPU device counts the machine's physical memory, one that
        does not tell its memory counts 8 GiB, the least of today's accelerators.
      fraction: share of it to give to resident data, in (0, 1].

    >>> device_budget_bytes(jax.local_devices()[0], 0.25) > 0
    True
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if device.platform == "cpu":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        limit = (stats or {}).get("bytes_limit", _LEAST_MEMORY)
    return int(limit * fraction)


def device_arrays(
    split: Split, sharding: jax.sharding.Sharding | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Put all of `split` on the device(s), to be gathered inside the jitted step.

    Args:
      split: what to place.
      sharding: where, for example replicated over a mesh; `None` means the default device.

    Returns:
      Images, uint8 [N, H, W, C], labels, int32 [N], and aspects, float32 [N].

    >>> split = ArraySplit(np.zeros((4, 2, 2, 3), np.uint8), np.zeros(4, np.int32))
    >>> [x.dtype.name for x in device_arrays(split)]
    ['uint8', 'int32', 'float32']
    """
    images = split.images if isinstance(split, ArraySplit) else split.read(np.arange(len(split)))
    arrays = jax.device_put((np.asarray(images), split.labels, split.aspects), sharding)
    images, labels, aspects = arrays
    return jnp.asarray(images), jnp.asarray(labels), jnp.asarray(aspects)
