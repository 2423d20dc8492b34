"""A run that goes on from another run's checkpoint, at another batch size if wanted."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from bs_jax.errors import UserError
from bs_jax.recipe import Recipe
from bs_jax.records import metrics_file, run_files, stores
from bs_jax.run import ResolvedRun
from bs_jax.scaling import ScaleByBatchState, moments
from bs_jax.scaling.clock import ExampleClock
from bs_jax.scaling.hyperparameters import Noise, NoiseScaleNeeded, Scaled
from bs_jax.training import optimizers, step
from bs_jax.training.checkpoint import Checkpoints
from bs_jax.training.state import TrainState


class OtherRun:
    """The newest state of another run, to go on from.

    Args:
        path: folder of that run.
        recipe: of the run that goes on: its rule says how moments change. The other run is taken
            to have been trained under that rule too, or at the base batch size.

    Its files are read when they are needed: by `check` and `state_for`.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self._recipe = path, recipe

    @functools.cached_property
    def _run(self) -> ResolvedRun:
        try:
            with stores.disk_errors(self.path):
                config = run_files.read_config(self.path)
            if config is None:
                raise UserError("missing or damaged")
            return ResolvedRun.from_json({"config": config})
        except (OSError, UserError) as error:
            raise UserError(
                f"--restore_from={self.path}: no run with a readable config.json ({error}); give "
                "the folder of a run, which holds config.json and checkpoints/"
            ) from None

    def check(self, workdir: Path) -> None:
        """Read its config.json, unless the run in `workdir` has begun: that one goes on without.

        Raises:
            UserError: there is no such run.
        """
        with stores.disk_errors(workdir):
            begun = stores.exists(workdir / "config.json")
        if not begun:
            self._run  # noqa: B018

    def state_for(
        self, run: ResolvedRun, fresh: TrainState, num_classes: int, image_shape: Any
    ) -> TrainState:
        """The other run's state as the state of this one.

        Weights and averages are taken as they are, the optimizer's moments by `moments.carry`. The
        clock of examples goes on: schedules, data order and metrics with it.

        Args:
            run: this one.
            fresh: a state of this run, for its structure.
            num_classes: of the data.
            image_shape: of the data's images as stored.

        Returns:
            The state, of numpy arrays.

        Raises:
            UserError: nothing to restore, another model or optimizer, or examples seen that this
                batch size does not divide.
        """
        if run.ramps:
            raise UserError(
                f"--restore_from={self.path} with config.batch_ramp.kind {run.batch_ramp.kind!r}: "
                "begin a ramp with the run, or go on at one batch size (kind off)"
            )
        source = self._newest(num_classes, image_shape)
        examples, batch = int(source.examples), run.batch_size
        if examples % batch or examples >= run.train_examples:
            raise UserError(
                f"--restore_from={self.path}: its checkpoint has seen {examples:,} examples; going "
                f"on needs a multiple of batch_size {batch}, below train_examples "
                f"{run.train_examples:,}"
            )
        state = TrainState(
            step=cast(Any, np.asarray(examples // batch, np.int32)),
            examples=cast(Any, np.asarray(examples, np.int32)),
            params=source.params,
            batch_stats=source.batch_stats,
            opt_state=self._optimizer_state(source, fresh, examples, examples // batch),
            ema_params=(source.ema_params or source.params) if fresh.ema_params else (),
        )
        self._check_like(state, fresh)
        return jax.tree.map(lambda leaf, like: np.asarray(leaf, like.dtype), state, fresh)

    def _newest(self, num_classes: int, image_shape: Any) -> TrainState:
        programs = step.make_programs(self._run, num_classes, image_shape, jax.devices()[:1])
        shapes = jax.eval_shape(programs.init, step.run_inputs(self._run))
        template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        metrics = self.path / "metrics.jsonl"
        checkpoints = Checkpoints(
            self.path / "checkpoints", lambda seen: metrics_file.metrics_digest(metrics, seen)
        )
        try:
            found = checkpoints.restore(template, set_aside=False)
        finally:
            checkpoints.close()
        if found is None:
            raise UserError(
                f"--restore_from={self.path}: no checkpoint that can be read; train that run with "
                "--config.checkpoint_every_examples above 0"
            )
        return found

    def _optimizer_state(
        self, source: TrainState, fresh: TrainState, examples: int, count: int
    ) -> Any:
        old, new = source.opt_state, fresh.opt_state
        inner = old.inner_state if isinstance(old, ScaleByBatchState) else old
        if self._run.batch_size != self._recipe.batch_size:
            measured = old.noise if isinstance(old, ScaleByBatchState) else ()
            inner = moments.carry(inner, *self._scaled(measured))
        # Counts are updates done: of the new size, which is what their schedules are read at.
        inner = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.asarray(count, leaf.dtype) if _is_count(path) else leaf, inner
        )
        if not isinstance(new, ScaleByBatchState):
            return inner
        kept: dict[str, Any] = {
            "clock": ExampleClock.at(examples, self._recipe.base_batch_size),
            "inner_state": inner,
        }
        if isinstance(old, ScaleByBatchState):
            for field in (
                "noise",
                "limit",
                "variance",
            ):  # all are told in terms of the base batch size
                if jax.tree.structure(getattr(old, field)) == jax.tree.structure(
                    getattr(new, field)
                ):
                    kept[field] = getattr(old, field)
        return new._replace(**kept)

    def _scaled(self, measured: Any) -> tuple[Scaled, Scaled]:
        recipe = self._recipe
        base, noise_scale = recipe.base_batch_size, recipe.scaling.noise_scale
        noise = None
        if noise_scale:
            noise = Noise.from_scale(noise_scale, base)
        elif measured:
            noise = Noise(max(float(measured.signal), 0.0), float(measured.noise) / base)
        rule, call = optimizers.rule_of(recipe.scaling), optimizers.call_of(recipe.optimizer)
        old, new = (
            call.at(rule, size / base, noise) for size in (self._run.batch_size, recipe.batch_size)
        )
        try:
            old.denominator_factor(old.k)
            new.denominator_factor(new.k)
        except NoiseScaleNeeded:
            raise UserError(
                f"rule {recipe.scaling.rule!r} carries moments over by the noise scale, "
                "which the other run did not measure; give --config.scaling.noise_scale=EXAMPLES"
            ) from None
        return old, new

    def _check_like(self, state: TrainState, fresh: TrainState) -> None:
        if jax.tree.structure(state) == jax.tree.structure(fresh) and all(
            np.shape(ours) == np.shape(theirs)
            for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True)
        ):
            return
        raise UserError(
            f"--restore_from={self.path}: that run has another model or optimizer "
            f"({self._run.model.name}, {self._run.optimizer.name})"
        )


def _is_count(path: Any) -> bool:
    return getattr(path[-1], "name", "") == "count"
