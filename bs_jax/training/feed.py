"""What the devices are fed: data held on them, the batches of a chunk, the evaluation batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bs_jax.data import pipeline
from bs_jax.data.image_data import ImageData
from bs_jax.run import ResolvedRun
from bs_jax.training import parallel, plan
from bs_jax.training.lanes import Lanes
from bs_jax.training.plan import Chunk

_RESIDENT_SHARE = 0.4  # of a device's memory, for training images held there


class Feed:
    """The arguments of the compiled programs that come from the data.

    Training images are held on the devices where they fit, and a batch is the numbers of its
    examples; otherwise they are streamed, and a batch is the images themselves.

    Args:
        run: any run of the cohort.
        data: its data set.
        devices: of all processes that train together.
        lanes: of the programs.

    Attributes:
        streamed: whether training images are streamed.
        train_data: what is held on the devices; ``()`` if streamed.
        eval_data: the evaluation images, held on the devices.
        eval_batches: the numbers of their examples, and which of them are padding.
    """

    def __init__(
        self, run: ResolvedRun, data: ImageData, devices: parallel.Devices, lanes: Lanes
    ) -> None:
        self._data, self._devices, self._lanes = data, list(devices), lanes
        self._local = parallel.local_devices(devices)
        self._drop_remainder = run.drop_remainder
        self._batch_size = run.batch_size
        budget = self.budget_bytes(_RESIDENT_SHARE)
        self.streamed = run.data.streamed or not pipeline.fits_on_device(data.train, budget)
        self.train_data: tuple[jax.Array, ...] = () if self.streamed else self._hold(data.train)
        self.eval_data = self._hold(data.eval)
        wanted = min(run.eval_batch_size, len(data.eval))
        size = -(-wanted // len(devices)) * len(devices)
        batches = pipeline.eval_batches(len(data.eval), size)
        self.eval_batches = parallel.spread(tuple(map(self._own, batches)), self._devices)

    def batches(self, seeds: Sequence[int], chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Any]]:
        """Each chunk with its batches, for the runs of these seeds.

        Yields:
            The chunk and the last argument of ``train_chunk``.
        """
        if not self.streamed:
            for chunk in chunks:
                parts = [_filled(self._own(self._order(seed, chunk)), chunk) for seed in seeds]
                yield chunk, parallel.spread(self._lanes.join_batches(parts), self._devices)
            return
        from bs_jax.data import streaming

        chunks = list(chunks)
        streams = [
            streaming.stream(
                self._data.train, [self._columns(self._order(seed, chunk)) for chunk in chunks]
            )
            for seed in seeds
        ]
        for chunk, *read in zip(chunks, *streams, strict=True):
            parts = [
                jax.tree.map(lambda rows: _filled(self._per_device(rows), chunk), part)  # noqa: B023
                for part in read
            ]
            yield chunk, parallel.spread(self._lanes.join_batches(parts), self._devices)

    def budget_bytes(self, share: float) -> int:
        """A share of the memory that a device may use."""
        return pipeline.device_budget_bytes(self._local[0], share)

    def batch_shapes(self, chunk: Chunk) -> Any:
        """The shapes of what `batches` yields for one run, on the devices of this process."""
        own = chunk.batch_size // len(self._devices)
        order = (len(self._local), chunk.longest, own)
        if not self.streamed:
            return jax.ShapeDtypeStruct(order, np.int32)
        shapes = [(*order, *self._data.train.image_shape), order, order]
        return tuple(map(jax.ShapeDtypeStruct, shapes, (np.uint8, np.int32, np.float32)))

    def _order(self, seed: int, chunk: Chunk) -> np.ndarray:
        """The chunk's examples, [steps, examples of a batch]."""
        order = pipeline.example_order(
            seed,
            len(self._data.train),
            chunk.examples,
            chunk.updates * chunk.batch_size,
            drop_remainder_batch_size=self._batch_size if self._drop_remainder else None,
        )
        return order.reshape(-1, chunk.batch_size)

    def _columns(self, batches: np.ndarray) -> np.ndarray:
        """The columns of batches [steps, examples] that this process feeds."""
        processes = len(self._devices) // len(self._local)
        position = self._devices.index(self._local[0]) // len(self._local)
        return batches[:, pipeline.process_columns(batches.shape[1], position, processes)]

    def _per_device(self, batches: np.ndarray) -> np.ndarray:
        return plan.per_device(batches, len(self._local))

    def _own(self, batches: np.ndarray) -> np.ndarray:
        return self._per_device(self._columns(batches))

    def _hold(self, split: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return parallel.replicate(pipeline.device_arrays(split), self._devices)


def _filled(batches: np.ndarray, chunk: Chunk) -> np.ndarray:
    """A chunk's batches [devices, steps, ...] with empty ones after them, up to `chunk.longest`."""
    missing = chunk.longest - batches.shape[1]
    if not missing:
        return batches  # streamed images are large: no copy where none is needed
    return np.pad(batches, [(0, 0), (0, missing), *[(0, 0)] * (batches.ndim - 2)])
