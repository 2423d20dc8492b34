"""Batches for data that does not fit on the device: read ahead by grain, in threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from bs_jax.data.image_data import Split
from bs_jax.errors import UserError


def stream(
    split: Split,
    orders: Sequence[np.ndarray],
    *,
    num_threads: int = 2,
    chunks_ahead: int = 2,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield images, labels and aspects for one array of indices after another, reading ahead.

    The result is what gathering the same indices from resident data gives, bit for bit. A run
    resumes, at any step, by passing the orders that are left; a process that feeds only some
    devices passes its columns of them (`process_columns`).

    Args:
      split: to read from.
      orders: positions in the split, integer arrays of any shapes [...], as from `example_order`;
        asked for one at a time, so a lazy sequence serves.
      num_threads: that read; each holds one chunk.
      chunks_ahead: chunks kept ready; no fewer than there are threads.

    Yields:
      `(images, labels, aspects)`: uint8 [..., H, W, C], int32 [...] and float32 [...].

    Raises:
      UserError: grain is not installed, or a count is below 1.

    >>> from bs_jax.data import example_order, load
    >>> split = load("synthetic:2x16", image_size=8).train
    >>> orders = [example_order(0, 16, start, 8).reshape(2, 4) for start in (0, 8)]
    >>> [images.shape for images, _, _ in stream(split, orders)]
    [(2, 4, 8, 8, 3), (2, 4, 8, 8, 3)]
    """
    if min(num_threads, chunks_ahead) < 1:
        raise UserError(
            f"cannot stream with {num_threads} threads and {chunks_ahead} chunks ahead; "
            "both must be at least 1"
        )
    try:
        import grain
    except ImportError as error:
        raise UserError(
            f"streamed data needs grain ({error}); install it: pip install 'bs_jax[stream]'"
        ) from error
    if not orders:
        return iter(())

    def read(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order = np.asarray(orders[int(number)])
        images = split.read(order.reshape(-1))
        images = images.reshape(*order.shape, *split.image_shape)
        return images, split.labels[order], split.aspects[order]

    ahead = max(chunks_ahead, num_threads)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.range(len(orders)).map(read).to_iter_dataset(options))
