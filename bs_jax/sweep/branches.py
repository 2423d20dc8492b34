"""Branches of a run: a trunk that stops at given points, and short runs that start from there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bs_jax.errors import UserError
from bs_jax.recipe import Recipe
from bs_jax.records import metrics_file, run_files
from bs_jax.records.json_files import Unreadable, number
from bs_jax.records.run_folder import RunFolder
from bs_jax.run import ResolvedRun
from bs_jax.sweep.cohorts import CohortTrainer
from bs_jax.sweep.points import apply_overrides, resolve


@dataclasses.dataclass(frozen=True)
class Branching:
    """What is branched, where, and how.

    Attributes:
        points: examples seen where the branches start, ascending; multiples of `examples`.
        batch_sizes: of the branches, ascending; each divides `examples`.
        examples: that a branch sees.
        seeds: each trains one branch a batch size and point: its order of the examples and its
            augmentation, the same at every batch size.
    """

    points: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    examples: int
    seeds: tuple[int, ...]

    @classmethod
    def plan(
        cls,
        recipe: Recipe,
        *,
        shares: Sequence[float],
        batch_sizes: Sequence[int],
        examples: int,
        seeds: Sequence[int],
    ) -> Branching:
        """Plan branches of a recipe.

        Args:
            recipe: the recipe, whose batch size the trunk has.
            shares: of the training, where the branches start; rounded to whole branches.
            batch_sizes: of the branches; none: 1, 2, 4 and 8 times the recipe's.
            examples: that a branch sees; 0: a tenth of the training. Rounded up so that every
                batch size divides it.
            seeds: of the branches.

        Raises:
            UserError: numbers that do not go together.

        >>> from configs import fashion_mnist
        >>> recipe = Recipe.parse(fashion_mnist.get_config().to_dict())
        >>> Branching.plan(recipe, shares=[0.2], batch_sizes=[], examples=0, seeds=[0, 1])
        Branching(points=(6144,), batch_sizes=(64, 128, 256, 512), examples=3072, seeds=(0, 1))
        """
        if recipe.batch_ramp.kind != "off":
            raise UserError(
                f"config.batch_ramp.kind is {recipe.batch_ramp.kind!r}, but a branch keeps one "
                "batch size; give --config.batch_ramp.kind=off"
            )
        sizes = sorted(set(batch_sizes)) or [recipe.batch_size * factor for factor in (1, 2, 4, 8)]
        if min(sizes) < 1 or len(sizes) < 2:
            raise UserError(
                f"--branch_batch_sizes={','.join(map(str, sizes))}: give two or more different "
                "batch sizes, positive whole numbers; the smallest is what the others are held to"
            )
        if len(set(seeds)) < 2:
            raise UserError(
                f"--seeds={','.join(map(str, seeds))}: give two or more different seeds; the "
                "difference between them is what tells a larger loss from chance"
            )
        if examples < 0:
            raise UserError(f"--branch_examples={examples}: give a positive number, or 0")
        whole = math.lcm(*sizes, recipe.batch_size)
        length = -(-(examples or recipe.train_examples // 10) // whole) * whole
        if 2 * length > recipe.train_examples:
            raise UserError(
                f"a branch of {length:,} examples (every batch size of "
                f"{', '.join(map(str, sizes))} divides it) and the training before it do not fit "
                f"into {recipe.train_examples:,} examples; branch at smaller batch sizes, or train "
                "longer"
            )
        last = recipe.train_examples // length - 1
        points = set()
        for share in shares:
            if not 0 < share < 1:
                raise UserError(
                    f"--branch_at={share:g}: give shares of the training above 0 and below 1"
                )
            points.add(min(max(round(share * recipe.train_examples / length), 1), last) * length)
        if not points:
            raise UserError("--branch_at names no point; give shares of the training: 0.1,0.5")
        return cls(tuple(sorted(points)), tuple(sizes), length, tuple(dict.fromkeys(seeds)))


class Branches:
    """Trains a trunk and its branches, a folder each; what is done is not trained again.

    Args:
        recipe: the recipe, nested, with the overrides of the command line.
        branching: what is branched, where, and how.
        trunk: the run of the recipe that is branched.
        workdir: folder of the records: ``EXAMPLES/trunk`` and ``EXAMPLES/RUN_ID`` for each point.
        should_stop: see `train.Trainer.train`.
        tell: called with a line about each branch.

    Raises:
        UserError: a branch cannot be trained; nothing was trained yet.
    """

    def __init__(
        self,
        recipe: Mapping[str, Any],
        branching: Branching,
        trunk: ResolvedRun,
        workdir: Path,
        should_stop: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:
        self._recipe, self._branching, self._workdir = recipe, branching, workdir
        self._should_stop, self._tell = should_stop, tell
        self._trainer = CohortTrainer()
        self._loss = Recipe.parse(recipe).report.loss_metric
        cadence = branching.examples
        self._trunk = dataclasses.replace(
            trunk, eval_every_examples=cadence, checkpoint_every_examples=cadence
        )
        cadences = {"eval_every_examples": cadence, "checkpoint_every_examples": cadence}
        self._recipes = {
            size: apply_overrides(recipe, {**cadences, "batch_size": size})
            for size in branching.batch_sizes
        }
        self._runs = {
            size: [resolve(own, {"seed": seed}) for seed in branching.seeds]
            for size, own in self._recipes.items()
        }

    @property
    def runs(self) -> list[ResolvedRun]:
        """The branches, by batch size and seed; the same at every point."""
        return [run for runs in self._runs.values() for run in runs]

    def train_trunk(self, point: int) -> list[dict[str, Any]]:
        """Train the trunk up to a point, from the point before if there is one.

        Args:
            point: one of the plan's; those before it were trained.

        Returns:
            The rows of the trunk's metrics, from the beginning.

        Raises:
            Interrupted: `should_stop` said so; the state is saved.
            UserError: it diverged, or cannot be trained.
        """
        earlier = [at for at in self._branching.points if at < point]
        start = self._trunk_folder(earlier[-1]) if earlier else None
        self._train(self._trunk_folder(point), self._trunk, self._recipe, point, start)
        rows = [
            row
            for at in (*earlier, point)  # each begins its records where the one before stopped
            for row in metrics_file.read_rows(self._trunk_folder(at) / run_files.METRICS)
        ]
        if not rows or rows[-1]["examples"] < point:
            raise UserError(
                f"the run diverged before {point:,} examples: there is nothing to branch; lower "
                "the learning rate, or branch earlier"
            )
        return rows

    def train_branches(self, point: int) -> dict[int, list[float]]:
        """Train the branches of a point.

        Args:
            point: one of the plan's, whose trunk was trained.

        Returns:
            Batch size -> the loss of each seed at the end of its branch; NaN if it diverged.

        Raises:
            Interrupted: `should_stop` said so; the states are saved.
            UserError: one cannot be trained.
        """
        losses = {}
        for size, runs in self._runs.items():
            losses[size] = []
            for run in runs:
                folder = self._workdir / str(point) / run.run_id
                end = point + self._branching.examples
                self._train(folder, run, self._recipes[size], end, self._trunk_folder(point))
                loss = self._loss_at(folder, end)
                self._tell(
                    f"at {point:,} examples: batch size {size}, seed {run.seed}: "
                    f"{self._loss} {loss:.4f}"
                )
                losses[size].append(loss)
        return losses

    def _trunk_folder(self, point: int) -> Path:
        return self._workdir / str(point) / "trunk"

    def _train(
        self,
        path: Path,
        run: ResolvedRun,
        recipe: Mapping[str, Any],
        until: int,
        start: Path | None,
    ) -> None:
        """Train a run up to a count of examples, unless its records say that it was."""
        from bs_jax.training.carry_over import OtherRun

        folder = RunFolder(path, run)
        try:
            summary = run_files.Summary.read(path)
            if summary.status == run_files.DIVERGED or summary.examples >= until:
                return
        except Unreadable:
            pass
        other = OtherRun(start, Recipe.parse(recipe)) if start else None
        self._trainer.train([folder], False, lambda event: None, self._should_stop, other, until)

    def _loss_at(self, folder: Path, examples: int) -> float:
        for row in metrics_file.read_rows(folder / run_files.METRICS):
            if row["examples"] == examples and self._loss in row:
                found = number(row[self._loss])
                return math.nan if found is None else found
        return math.nan
