"""Imagenette at 128 px: the published recipe for batch size 64 and the sweeps that question it.

Command:  python main.py --config=configs/imagenette.py --mode=train
          --config.data.name=folder:PATH/imagenette2-160.tgz
Forms:    configs/imagenette.py:WORD[,WORD...] with an architecture (xresnet50, xse_resnext50), a
          length (20epochs, 5epochs) or quick (a small model, small images, few epochs)
Sweeps:   --mode=sweep --sweep=seed (or anchor, study, controls, ghost, limit, quick); --dry_run
          lists them
Run time and expected accuracy: docs/imagenette.md
"""

from typing import Any

import ml_collections

from bs_jax.errors import UserError
from bs_jax.sweep.points import Point, prioritized, product

ARCHITECTURES = ("xresnet50", "xse_resnext50", "xse_resnext50_blur")
EPOCHS = {"20epochs": 20.0, "5epochs": 5.0}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The recipe as it was tuned, at batch size 64.

    Args:
        form: words joined by commas: an architecture, a length, or "quick".
    """
    words = [word for word in form.split(",") if word]
    for word in words:
        if word not in (*ARCHITECTURES, *EPOCHS, "quick"):
            known = ", ".join((*ARCHITECTURES, *EPOCHS, "quick"))
            raise UserError(f"configs/imagenette.py has no form {word!r}; known: {known}")
    # The quick form is the same recipe on a network and images small enough for a CPU.
    quick = "quick" in words
    architecture = "xresnet10_small" if quick else ARCHITECTURES[0]
    architecture = next((word for word in words if word in ARCHITECTURES), architecture)
    epochs = next((EPOCHS[word] for word in words if word in EPOCHS), 3.0 if quick else 20.0)

    config = ml_collections.ConfigDict()
    config.name = "-".join(["imagenette", *words])
    setting = "quick form" if quick else "128 px"
    config.title = f"Imagenette, {setting}: which hyperparameters must follow the batch size?"
    config.seed = 0  # initial weights, order of the examples, augmentation

    config.batch_size = 64  # examples per update, over all devices together
    config.base_batch_size = 64  # the batch size that the numbers below were tuned at
    config.train_examples = 0  # length of training in examples seen; one of the two lengths is 0
    config.train_epochs = epochs  # length of training in epochs
    config.drop_remainder = True  # 1183, 591, 295, 147, 73, 36 updates an epoch at 8 to 256

    config.scaling = ml_collections.ConfigDict()
    config.scaling.rule = "none"  # none, linear, sqrt, noise_aware, invariant, seed, seed_sqrt, ...
    config.scaling.offset = 1.0  # multiplies k = batch_size / base_batch_size for everything scaled
    config.scaling.off = ()  # hyperparameters that the rule leaves as they are, e.g. ("b2",)
    config.scaling.offsets = ()  # pairs (hyperparameter, factor on its k), e.g. (("eps", 2.0),)
    # Gradient noise scale in examples, where it is known; 0: estimated while training.
    config.scaling.noise_scale = 0.0
    # Steps grow with the batch only up to the noise scale, where that is measured or given.
    config.scaling.guard = True
    # Examples per gradient sample, for the rules that compare gradients (and for accumulation);
    # 0: the base batch size or half the batch, whichever is smaller.
    config.micro_batch_size = 0

    config.batch_ramp = ml_collections.ConfigDict()  # a batch size that grows up to batch_size
    config.batch_ramp.kind = "off"  # "off", "stages" as given, "noise": as the noise scale allows
    # Pairs (start, batch size), e.g. ((0, 64), (0.3, 128)): a share of the length, or examples.
    config.batch_ramp.stages = ()
    config.batch_ramp.start = 0  # batch size that "noise" begins with; 0: base_batch_size
    config.batch_ramp.share = 0.5  # of the noise scale's lower end that a batch may reach
    config.batch_ramp.growth = 2.0  # factor of one rise; each size is a compiled program
    config.batch_ramp.every_examples = 0  # how often "noise" asks; 0: at every logging point

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "ranger"  # Lookahead around RAdam
    config.optimizer.decay_mask = "kernels"  # no weight decay on biases and BatchNorm parameters
    config.optimizer.hyperparams = ml_collections.ConfigDict()  # the factory's own names
    config.optimizer.hyperparams.learning_rate = 8e-3  # peak, per update
    config.optimizer.hyperparams.b1 = 0.95  # decay per update
    config.optimizer.hyperparams.b2 = 0.99  # decay per update
    config.optimizer.hyperparams.eps = 1e-6
    config.optimizer.hyperparams.weight_decay = 1e-2  # multiplied by the learning rate
    config.optimizer.hyperparams.sync_period = 6  # updates between joins of fast and slow weights
    config.optimizer.hyperparams.slow_step_size = 0.5  # share of the way that slow weights move

    config.schedule = ml_collections.ConfigDict()
    config.schedule.name = "flat_cosine"  # flat, then cosine; or "constant", "linear"
    config.schedule.warmup_examples = 0  # linear from 0
    config.schedule.flat_fraction = 0.75  # of the length before the decay begins
    config.schedule.final_fraction = 1e-5  # of the peak, at the end

    config.bn_decay = 0.9  # running statistics' decay per update
    config.ghost_batch_size = 0  # examples normalised together; 0: a whole micro-batch
    config.bn_cross_device = False  # normalise over all devices' examples together
    config.ema_decay = 0.0  # of the weights, per update; 0: evaluate the weights themselves
    config.label_smoothing = 0.1

    config.data = ml_collections.ConfigDict()
    # The official archive of any size (or its folder), or tfds:imagenette/160px-v2.
    config.data.name = "folder:~/data/imagenette2-160.tgz"
    config.data.train_size = 9_469  # examples in the training split: what an epoch is; checked
    config.data.image_size = 32 if quick else 128  # pixels, as the model sees them
    config.data.train_storage_size = 40 if quick else 160  # pixels, as kept before random crops
    config.data.eval_storage_size = 38 if quick else 152  # pixels, as kept before the centre crop
    config.data.fit = "squash"  # how images of another shape come to that size; or "crop"
    # True: read through grain. False: held on the device, unless it does not fit.
    config.data.streamed = False
    config.data.flip = True
    config.data.crop_padding = 0  # pixels on each side before a random crop
    config.data.crop_area = (0.35, 1.0)  # random resized crop: share of the area, low and high
    # Per channel, of pixels in [0, 1]: the recipe does not normalise. ImageNet's would be
    # (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225).
    config.data.mean = (0.0, 0.0, 0.0)
    config.data.std = (1.0, 1.0, 1.0)

    config.model = ml_collections.ConfigDict()
    config.model.name = architecture
    config.model.dtype = "float32"  # of the computation; parameters are always float32

    config.parallel = "pmap"  # over several devices; or "jit" over a mesh, with the same numbers
    config.eval_batch_size = (
        500 if quick else 256
    )  # examples, over all devices; has no effect on the result
    config.eval_every_examples = 47_040 if quick else 9_408  # 147 updates of 64: an epoch
    config.log_every_examples = 2_352  # training metrics are means over this many examples
    config.checkpoint_every_examples = 0 if quick else 47_040  # 0: only where a signal interrupts
    config.tensorboard = False
    config.trackers = ()  # more places for the metrics: "tensorboard", "wandb", "mlflow"

    config.report = ml_collections.ConfigDict()
    config.report.accuracy_metric = "eval/accuracy"
    config.report.smoothed_metric = "eval/smoothed_accuracy"  # beside it; "": none
    config.report.loss_metric = "eval/loss"
    config.report.curve_metric = "train/loss"
    config.report.margin = 0.01  # accuracies closer than this count as equal
    return config


# --- the arms: which hyperparameters follow the scale s = (batch size / 64 x offset), or its root.
# Learning rate and weight decay are multiplied by s, a momentum m becomes m**s, eps never moves.

LR, WD, MOM, SQMOM, BN = "learning_rate", "weight_decay", "b1", "b2", "bn_decay"
_NEVER = ("eps", "sync_period", "slow_step_size", "ema_decay")


def _arm(*scaled: str, rule: str = "seed") -> dict[str, Any]:
    off = [name for name in (LR, WD, MOM, SQMOM, BN) if name not in scaled]
    return {"scaling.rule": rule, "scaling.off": (*off, *_NEVER)}


ARMS: dict[str, dict[str, Any]] = {
    "no": {"scaling.rule": "none"},
    "all_lin": _arm(LR, WD, MOM, SQMOM),
    "all_sqrt": _arm(LR, WD, MOM, SQMOM, rule="seed_sqrt"),
    "lr_lin": _arm(LR),
    "wd_lin": _arm(WD),
    "moms_lin": _arm(MOM, SQMOM),
    "mom_lin": _arm(MOM),
    "sqmom_lin": _arm(SQMOM),
    "not_lr_lin": _arm(WD, MOM, SQMOM),
    "not_wd_lin": _arm(LR, MOM, SQMOM),
    "not_moms_lin": _arm(LR, WD),
    "bn_lin": _arm(BN),
}
# Rules that measure the gradient's noise, on the same points. They leave nothing out.
MEASURED: dict[str, dict[str, Any]] = {
    "noise_aware": {"scaling.rule": "noise_aware"},
    "invariant": {"scaling.rule": "invariant"},
}
OFFSETS = {
    8: (0.5, 1.0, 2.0, 4.0),
    16: (0.5, 1.0, 2.0, 4.0),
    32: (0.5, 1.0, 2.0, 4.0),
    64: (0.25, 0.5, 1.0, 2.0, 4.0),
    128: (0.25, 0.5, 1.0, 2.0),
    256: (0.25, 0.5, 1.0, 2.0),
}
SEEDS = (0, 1, 2)


def _select(*names: str) -> dict[str, dict[str, Any]]:
    return {name: (ARMS | MEASURED)[name] for name in names}


def _grid(arms: dict[str, dict[str, Any]], seeds: tuple[int, ...]) -> list[Point]:
    """25 points an arm and seed: every batch size with its offsets."""
    return _ordered(
        [
            Point(name, {**overrides, "batch_size": size, "scaling.offset": offset, "seed": seed})
            for name, overrides in arms.items()
            for size, offsets in OFFSETS.items()
            for offset in offsets
            for seed in seeds
        ]
    )


def _ordered(points: list[Point]) -> list[Point]:
    """What decides most comes first: the base, the arms at 16 and 256, then the rest."""
    return prioritized(
        points,
        lambda point: point["batch_size"] == 64 and point["scaling.offset"] == 1.0,
        lambda point: point["batch_size"] in (16, 256) and point["scaling.offset"] == 1.0,
    )


def sweep_seed() -> list[Point]:
    """300 points: the published twelve arms x 25, one seed as published.

    Points that come to the same numbers share a run (`no` is the same at every offset).
    """
    return _grid(ARMS, seeds=(0,))


def sweep_study() -> list[Point]:
    """1,053 points: the same 25 points and the noise-measuring rules, the controls, three seeds."""
    return [
        *_grid(ARMS | MEASURED, SEEDS),
        *_points("wd_lin", batch_size=(64,), offset=(8.0,), seed=SEEDS),
    ]


def sweep_controls() -> list[Point]:
    """81 points: what tells the learning rate from the decay that it multiplies; three seeds.

    (a) weight decay alone x 1/4 to 8 at 64; at the other sizes (b) lr x k, (c) lr and weight decay
    x k, (d) weight decay x k; and neither. By the names of the arms (a) and (d) are `wd_lin`, (b)
    is `lr_lin`, (c) `not_moms_lin`, neither `no`.
    """
    away = tuple(size for size in OFFSETS if size != 64)
    return [
        *_points("wd_lin", batch_size=(64,), offset=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0), seed=SEEDS),
        *_points("lr_lin", "not_moms_lin", "wd_lin", batch_size=away, seed=SEEDS),
        *_points("no", batch_size=tuple(OFFSETS), seed=SEEDS),
    ]


def sweep_ghost() -> list[Point]:
    """75 points: BatchNorm normalises 8 examples together at every batch size; three seeds.

    What is left of an effect here does not come from BatchNorm's own noise. A rule that compares
    gradients within a batch of 8 could only normalise 4, so the sizes begin at 16.
    """
    ghost: dict[str, Any] = {"ghost_batch_size": 8}
    arms = _select("no", "lr_lin", "all_lin", "noise_aware", "invariant")
    return product(
        {name: overrides | ghost for name, overrides in arms.items()},
        batch_size=(16, 32, 64, 128, 256),
        seed=SEEDS,
    )


# From 64 to 256 while training, as the noise scale allows.
RAMP = {"batch_ramp.kind": "noise"}


def sweep_limit() -> list[Point]:
    """39 points: what happens beyond the noise scale; three seeds, ghost batches of 8.

    The base; the rule that measures the noise with its guard, without it, and with a batch that
    grows with the noise; the square-root and the linear rule. At 256, 128 and 16.
    """
    arms: dict[str, dict[str, Any]] = {
        "invariant": {"scaling.rule": "invariant"},
        "sqrt": {"scaling.rule": "sqrt"},
        "unguarded invariant": {"scaling.rule": "invariant", "scaling.guard": False},
        "linear": {"scaling.rule": "linear"},
        "invariant, ramp": {"scaling.rule": "invariant"} | RAMP,
    }
    arms = {name: overrides | {"ghost_batch_size": 8} for name, overrides in arms.items()}
    both_ways = {name: arms[name] for name in ("invariant", "sqrt")}
    up = {name: arms[name] for name in ("invariant", "sqrt", "unguarded invariant", "linear")}
    points = [
        *product(both_ways, batch_size=(64,), seed=SEEDS),
        *product(arms, batch_size=(256,), seed=SEEDS),
        *product(up, batch_size=(128,), seed=SEEDS),
        *product(both_ways, batch_size=(16,), seed=SEEDS),
    ]
    return prioritized(
        points,
        lambda point: point["batch_size"] == 64,
        lambda point: point["batch_size"] == 256,
    )


def sweep_anchor() -> list[Point]:
    """5 points: the recipe itself, five seeds, to be held against the published accuracy."""
    return _points("no", batch_size=(64,), seed=(0, 1, 2, 3, 4))


def sweep_quick() -> list[Point]:
    """124 points: the same questions at 16 and 256, four seeds; for the form `quick`.

    Every combination of learning rate, weight decay and momenta, so that each effect is seen beside
    all settings of the others; each momentum, BatchNorm's, and the rules that measure noise; the
    learning rate half way back to the base's, weight decay alone at 64.
    """
    seeds = (0, 1, 2, 3)
    arms = [name for name in ARMS | MEASURED if name != "all_sqrt"]
    return [
        *_points(*arms, batch_size=(16, 256), seed=seeds),
        *_points("lr_lin", batch_size=(16,), offset=(2.0,), seed=seeds),
        *_points("lr_lin", batch_size=(256,), offset=(0.5,), seed=seeds),
        *_points("wd_lin", batch_size=(64,), offset=(0.25, 4.0), seed=seeds),
        *_points("no", batch_size=(64,), seed=seeds),
    ]


def _points(
    *names: str,
    batch_size: tuple[int, ...],
    seed: tuple[int, ...],
    offset: tuple[float, ...] = (1.0,),
) -> list[Point]:
    axes = {"batch_size": batch_size, "scaling.offset": offset, "seed": seed}
    return _ordered(product(_select(*names), **axes))
