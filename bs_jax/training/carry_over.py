"""A run that goes on from another run's checkpoint, at another batch size if wanted."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from bs_jax.errors import UserError
from bs_jax.records import run_folder as records
from bs_jax.records.stores import storage
from bs_jax.scaling.carry import carry_moments
from bs_jax.scaling.formulas import Noise, NoiseScaleNeeded, Scaler
from bs_jax.scaling.optimizer import ScaleByBatchState
from bs_jax.training import optimizers, step
from bs_jax.training.checkpoint import Checkpoints
from bs_jax.training.state import TrainState


class OtherRun:
    """The newest state of another run, to go on from.

    Args:
        path: folder of that run.
        recipe: the config of the run that goes on, before scaling: its rule says how moments
            change. The other run is taken to have been trained under that rule too, or at the
            base batch size.

    Its files are read when they are needed: by `check`, `batch_size` and `state_for`.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any]) -> None:
        self.path, self._recipe = path, recipe

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        try:
            with records.disk_errors(self.path, missing=True):
                config = json.loads(storage.read_bytes(self.path / "config.json"))
            return {**config, "batch_size": int(config["batch_size"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--restore_from={self.path}: no run with a readable config.json ({error}); give "
                "the folder of a run, which holds config.json and checkpoints/"
            ) from None

    def check(self, workdir: Path) -> None:
        """Read its config, unless the run in `workdir` has begun: that one goes on without.

        Raises:
            UserError: there is no such run.
        """
        with records.disk_errors(workdir):
            begun = storage.exists(workdir / "config.json")
        if not begun:
            self.batch_size  # noqa: B018

    @property
    def batch_size(self) -> int:
        """What it was trained with."""
        return self._config["batch_size"]

    def state_for(
        self, config: Mapping[str, Any], fresh: TrainState, num_classes: int, image_shape: Any
    ) -> TrainState:
        """The other run's state as the state of this one.

        Weights and averages are taken as they are, the optimizer's moments by `carry_moments`. The
        clock of examples goes on: schedules, data order and metrics with it.

        Args:
            config: this run's, resolved.
            fresh: a state of this run, for its structure.
            num_classes: of the data.
            image_shape: of the data's images as stored.

        Returns:
            The state, of numpy arrays.

        Raises:
            UserError: nothing to restore, another model or optimizer, or examples seen that this
                batch size does not divide.
        """
        source = self._newest(num_classes, image_shape)
        examples, batch = int(source.examples), config["batch_size"]
        if examples % batch or examples >= config["train_examples"]:
            raise UserError(
                f"--restore_from={self.path}: its checkpoint has seen {examples:,} examples; going "
                f"on needs a multiple of batch_size {batch}, below train_examples "
                f"{config['train_examples']:,}"
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
        programs = step.make_programs(self._config, num_classes, image_shape, jax.devices()[:1])
        shapes = jax.eval_shape(programs.init, step.run_inputs(self._config))
        template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        metrics = self.path / "metrics.jsonl"
        checkpoints = Checkpoints(
            self.path / "checkpoints", lambda seen: records.metrics_digest(metrics, seen)
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
        if self.batch_size != self._recipe["batch_size"]:
            measured = old.noise if isinstance(old, ScaleByBatchState) else ()
            inner = carry_moments(inner, *self._scalers(measured))
        # Counts are updates done: of the new size, which is what their schedules are read at.
        inner = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.asarray(count, leaf.dtype) if _is_count(path) else leaf, inner
        )
        if not isinstance(new, ScaleByBatchState):
            return inner
        kept: dict[str, Any] = {"examples": np.asarray(examples, np.int32), "inner_state": inner}
        if isinstance(old, ScaleByBatchState):
            for field in ("noise", "variance"):  # both are told in terms of the base batch size
                if jax.tree.structure(getattr(old, field)) == jax.tree.structure(
                    getattr(new, field)
                ):
                    kept[field] = getattr(old, field)
        return new._replace(**kept)

    def _scalers(self, measured: Any) -> tuple[Scaler, Scaler]:
        recipe = self._recipe
        base = recipe["base_batch_size"]
        values = dict(recipe["optimizer"]["hyperparams"])
        spec = optimizers.spec_of(recipe)
        noise = None
        if recipe["scaling"]["noise_scale"]:
            noise = Noise.from_scale(recipe["scaling"]["noise_scale"], base)
        elif measured:
            noise = Noise(max(float(measured.signal), 0.0), float(measured.noise) / base)
        scaled = {name: values[name] for name in spec.roles if name in values}
        rule = optimizers.rule_of(recipe)
        old, new = (
            Scaler(rule, spec, scaled, size / base, noise)
            for size in (self.batch_size, recipe["batch_size"])
        )
        try:
            old.denominator_factor(old.k)
            new.denominator_factor(new.k)
        except NoiseScaleNeeded:
            raise UserError(
                f"rule {recipe['scaling']['rule']!r} carries moments over by the noise scale, "
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
            f"({self._config['model']['name']}, {self._config['optimizer']['name']})"
        )


def _is_count(path: Any) -> bool:
    return getattr(path[-1], "name", "") == "count"
