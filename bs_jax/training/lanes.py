"""Runs side by side in one program: a leading run axis on every tree, or none for a single run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bs_jax.training import memory


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How the trees of runs that advance together become the arguments of one program.

    Attributes:
        vmapped: whether the program advances many runs; otherwise a tree is one run's.
    """

    vmapped: bool

    def join(self, trees: Sequence[Any]) -> Any:
        """The runs' trees as one, with a leading run axis if vmapped."""
        if not self.vmapped:
            return trees[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    def split(self, tree: Any, count: int) -> list[Any]:
        """The trees of the first `count` runs, of numpy arrays."""
        if not self.vmapped:
            return [tree]
        return [jax.tree.map(lambda leaf, at=at: np.asarray(leaf[at]), tree) for at in range(count)]

    def join_batches(self, batches: Sequence[Any]) -> Any:
        """The runs' batches [devices, steps, ...] as one, the run axis after the device axis."""
        if not self.vmapped:
            return batches[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *batches)

    def at_once(
        self,
        program: Callable[..., Any],
        one: Any,
        batches: Any,
        *,
        held: Sequence[jax.Array],
        budget_bytes: int,
        other_bytes: int,
        wanted: int,
    ) -> int:
        """How many runs one program advances: as many as fit on a device side by side.

        Args:
            program: ``train_chunk``, of any number of lanes.
            one: one run's state and inputs.
            batches: the shapes of its batches, [devices, steps, ...].
            held: training images on the device, which all runs share.
            budget_bytes: memory of the device.
            other_bytes: of what else is held on the device.
            wanted: runs that there are.
        """
        if not self.vmapped:
            return 1
        lane = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), one)
        batches = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], 1, *leaf.shape[1:]), leaf.dtype),
            batches,
        )
        held_bytes = sum(leaf.nbytes for leaf in held)
        updates = jax.ShapeDtypeStruct((), np.int32)
        own = memory.peak_bytes(program, *lane, tuple(held), updates, batches) - held_bytes
        return memory.runs_at_once(own, held_bytes + other_bytes, budget_bytes, wanted)
