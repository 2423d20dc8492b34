"""The compiled programs of one run: initialise, train a chunk of steps, evaluate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp

from bs_jax import models, recipe, scaling
from bs_jax.data import AugmentSpec, RandomResizedCrop, augment, prepare_eval
from bs_jax.run import ResolvedRun
from bs_jax.training import optimizers, parallel
from bs_jax.training.state import TrainState


class RunInputs(NamedTuple):
    """The values in which runs of one compiled program may differ.

    Attributes:
        seed: uint32 scalar; initial weights and augmentation come from it.
        hyperparams: name -> float32 scalar.
    """

    seed: jax.Array
    hyperparams: dict[str, jax.Array]


class Programs(NamedTuple):
    """Compiled functions that serve every run with the same `optimizers.cohort_key`.

    Attributes:
        init: RunInputs -> TrainState.
        train_chunk: (state, RunInputs, data, updates, batches) -> (state, metrics with a leading
            step axis). The first `updates` of the batches are trained on, and the metrics of the
            others are 0: chunks of any length share a program, filled up to one number of batches.
            None: all of them, in a loop whose length is known to the compiler.
            The batch size is that of the batches; another one is another compiled program.
            `data` is ``(images, labels, aspects)`` held on the device and `batches` the numbers,
            int32 [devices, steps, examples a device]; or `data` is ``()`` and `batches` the
            arrays (uint8 images, int32 labels, float32 aspects) with those leading axes.
        evaluate: (state, RunInputs, data, (indices, mask)) -> sums over the marked examples.
    """

    init: Callable[..., Any]
    train_chunk: Callable[..., Any]
    evaluate: Callable[..., Any]


def run_inputs(run: ResolvedRun, batch_size: int | None = None) -> RunInputs:
    """The arrays that stand for one run's seed and hyperparameters.

    Args:
        run: the run.
        batch_size: examples per update, of a run whose batch ramps; the run's by default.
    """
    return RunInputs(
        jnp.asarray(run.seed % 2**32, jnp.uint32),
        {
            name: jnp.asarray(value, jnp.float32)
            for name, value in optimizers.traced_values(run, batch_size).items()
        },
    )


def make_programs(
    run: ResolvedRun,
    num_classes: int,
    image_shape: tuple[int, int, int],
    devices: parallel.Devices,
    *,
    vmapped: bool = False,
) -> Programs:
    """Build the programs of a run; nothing compiles before the first call.

    Args:
        run: the run. Its seed and numeric hyperparameters are not read here: they come with every
            call (`RunInputs`), so one program serves a whole cohort.
        num_classes: of the data set.
        image_shape: (height, width, channels) of its images.
        devices: to spread every batch over; the batch must divide by their number.
        vmapped: state, inputs and batches carry a leading run axis (after the device axis in
            `batches`), and many runs advance together.

    Returns:
        The programs.
    """
    model = models.create(
        run.model.name,
        num_classes=num_classes,
        dtype=jnp.dtype(run.model.dtype),
        ghost_batch_size=run.ghost_batch_size,
        axis_name=parallel.BATCH_AXIS if run.bn_cross_device else None,
    )
    spec = _augment_spec(run.data)
    eval_shape = (
        1,
        *jax.eval_shape(
            lambda images: prepare_eval(images, spec),
            jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8),
        ).shape[1:],
    )

    def init(inputs: RunInputs) -> TrainState:
        key = jax.random.fold_in(jax.random.key(inputs.seed), 0)
        variables = model.init(key, jnp.zeros(eval_shape, jnp.float32), train=False)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        optimizer = optimizers.make_optimizer(run, inputs.hyperparams)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            examples=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            ema_params=jax.tree.map(jnp.copy, params) if run.ema_decay else (),
        )

    train_chunk = _train_chunk(run, model, spec, len(devices))
    evaluate = _evaluate(run, model, spec)
    if vmapped:
        init = jax.vmap(init)
        train_chunk = jax.vmap(train_chunk, in_axes=(0, 0, None, None, 0))
        evaluate = jax.vmap(evaluate, in_axes=(0, 0, None, None))
    spread = functools.partial(parallel.data_parallel, devices=devices, by=run.parallel)
    return Programs(
        init=jax.jit(init),
        train_chunk=spread(train_chunk, replicated=4, donate=(0,)),
        evaluate=spread(evaluate, replicated=3),
    )


def _augment_spec(data: recipe.Data) -> AugmentSpec:
    low, high = data.crop_area
    return AugmentSpec(
        image_size=data.image_size,
        flip=data.flip,
        crop_padding=data.crop_padding,
        random_resized_crop=RandomResizedCrop(low, high) if low < 1 else None,
        mean=data.mean,
        std=data.std,
    )


def _train_chunk(
    run: ResolvedRun, model: Any, spec: AugmentSpec, num_devices: int
) -> Callable[..., Any]:
    """(state, inputs, data, updates, batches of one device) -> (state, metrics per step)."""
    smoothing = run.label_smoothing
    axis = parallel.BATCH_AXIS
    measures_noise = run.measures_noise

    def loss_fn(params, batch, batch_stats, seed, bn_decay):
        # A key given as an argument would differ in every micro-batch; here an example's position
        # alone decides how it is augmented.
        augment_key = jax.random.fold_in(jax.random.key(seed), 1)
        images = augment(
            augment_key, batch["positions"], batch["images"], spec, aspects=batch["aspects"]
        )
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            bn_decay=bn_decay,
            mutable=["batch_stats"],
        )
        losses = cross_entropy(logits, batch["labels"], smoothing)
        correct = jnp.argmax(logits, axis=-1) == batch["labels"]
        aux = {"batch_stats": updated["batch_stats"], "accuracy": jnp.mean(correct)}
        return jnp.mean(losses), aux

    def noise_metrics(
        grads: Any, stats: scaling.MicrobatchStats | None, batch_size: int
    ) -> dict[str, jax.Array]:
        if not measures_noise or stats is None:
            return {}
        found = scaling.noise_sample(grads, stats, batch_size=batch_size)
        return {f"noise/{name}": value for name, value in found.items()}

    def train_chunk(
        state: TrainState, inputs: RunInputs, data: Any, updates: jax.Array | None, batches: Any
    ):
        hyperparams = inputs.hyperparams
        optimizer = optimizers.make_optimizer(run, hyperparams)
        local_size = jax.tree.leaves(batches)[0].shape[1]  # [steps, examples of this device, ...]
        batch_size = local_size * num_devices
        resized = {"batch_size": batch_size} if run.ramps else {}
        loss_and_grads = scaling.value_grad_and_stats(
            loss_fn,
            microbatches=local_size // min(run.micro_batch_size, local_size),
            axis_name=axis if num_devices > 1 else None,  # an average over one device still copies
            has_aux=True,
        )
        offset = jax.lax.axis_index(axis) * local_size

        def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            images, labels, aspects = (leaf[batch] for leaf in data) if data else batch
            batch = {
                "images": images,
                "labels": labels,
                "aspects": aspects,
                "positions": state.examples + offset + jnp.arange(local_size, dtype=jnp.int32),
            }
            (loss, aux), grads, stats = loss_and_grads(
                state.params, batch, state.batch_stats, inputs.seed, hyperparams["bn_decay"]
            )
            change, opt_state = optimizer.update(
                grads, state.opt_state, state.params, microbatch=stats, **resized
            )
            params = jax.tree.map(jnp.add, state.params, change)
            ema_params = state.ema_params
            if run.ema_decay:
                decay = hyperparams["ema_decay"]
                ema_params = jax.tree.map(
                    lambda mean, new: decay * mean + (1 - decay) * new, ema_params, params
                )
            metrics = {
                "train/loss": loss,
                "train/accuracy": aux["accuracy"],
                **optimizers.metrics(run, hyperparams, state, opt_state),
                **noise_metrics(grads, stats, batch_size),
            }
            new_state = TrainState(
                step=state.step + 1,
                examples=state.examples + batch_size,
                params=params,
                batch_stats=aux["batch_stats"],
                opt_state=opt_state,
                ema_params=ema_params,
            )
            return new_state, metrics

        if updates is None:
            return jax.lax.scan(step, state, batches)
        return _first(step, state, batches, updates)

    return train_chunk


def _first(step: Callable[..., Any], state: Any, batches: Any, count: jax.Array) -> Any:
    """``jax.lax.scan(step, state, batches)`` over the first `count` batches alone.

    The number is an argument of the program; the length that scan goes by is a part of it. What
    lies past the count is 0.
    """
    length = len(jax.tree.leaves(batches)[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
    # Traced once: the shapes of the metrics are needed before the loop that fills them.
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(state, like)
    results = jax.tree.structure(shapes)

    def body(number: jax.Array, carried: tuple[Any, Any]) -> tuple[Any, Any]:
        state, filled = carried
        batch = jax.tree.map(lambda leaf: leaf[number], batches)
        flat = jax.extend.core.jaxpr_as_fun(traced)(*jax.tree.leaves((state, batch)))
        state, metrics = jax.tree.unflatten(results, flat)
        return state, jax.tree.map(lambda rows, row: rows.at[number].set(row), filled, metrics)

    rows = jax.tree.map(lambda one: jnp.zeros((length, *one.shape), one.dtype), shapes[1])
    return jax.lax.fori_loop(0, count, body, (state, rows))


def _evaluate(run: ResolvedRun, model: Any, spec: AugmentSpec) -> Callable[..., Any]:
    """(state, inputs, data, batches of one device) -> sums over all devices' marked examples."""

    def evaluate(state: TrainState, inputs: RunInputs, data: Any, batches: Any):
        del inputs  # nothing in evaluation depends on a hyperparameter
        params = state.ema_params if run.ema_decay else state.params
        variables = {"params": params, "batch_stats": state.batch_stats}

        def batch_sums(sums, batch):
            source, mask = batch
            images, labels, _ = (leaf[source] for leaf in data) if data else source
            logits = model.apply(variables, prepare_eval(images, spec), train=False)
            found = {
                "loss": cross_entropy(logits, labels, 0.0),
                "accuracy": (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32),
                # A smoother yardstick than accuracy: softmax(3 logits) at the true class.
                "smoothed_accuracy": jnp.exp(-cross_entropy(3.0 * logits, labels, 0.0)),
                "count": jnp.ones(labels.shape, jnp.float32),
            }
            # where, not a product: a padded example must not bring in an infinity.
            added = {name: jnp.sum(jnp.where(mask, value, 0.0)) for name, value in found.items()}
            return jax.tree.map(jnp.add, sums, added), None

        names = ("loss", "accuracy", "smoothed_accuracy", "count")
        zeros = {name: jnp.zeros((), jnp.float32) for name in names}
        sums, _ = jax.lax.scan(batch_sums, zeros, batches)
        return jax.lax.psum(sums, parallel.BATCH_AXIS)

    return evaluate


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross entropy with label smoothing e: (1 - e) nll + e mean over classes of -log p.

    Args:
        logits: float [batch, classes].
        labels: int [batch].
        smoothing: e, share of the target spread evenly over all classes.

    Returns:
        float32 [batch].

    >>> import jax.numpy as jnp
    >>> float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), 0.1)[0])  # ln 4 at any smoothing
    1.3862943649291992

    Reference: Szegedy et al., Rethinking the Inception architecture (2016), section 7.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return (1 - smoothing) * nll - smoothing * jnp.mean(log_p, axis=-1)
