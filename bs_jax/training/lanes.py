"""Runs side by side in one program: a leading run axis on every tree, or none for a single run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


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

    def shapes(self, tree: Any, count: int) -> Any:
        """The shapes of what `join` makes of so many trees like a run's."""
        lead = (count,) if self.vmapped else ()
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), tree
        )

    def batch_shapes(self, batches: Any, count: int) -> Any:
        """The shapes of what `join_batches` makes of so many runs' batches."""
        lead = (count,) if self.vmapped else ()
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], *lead, *leaf.shape[1:]), leaf.dtype),
            batches,
        )
