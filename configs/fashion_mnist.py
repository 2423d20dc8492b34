"""A small BatchNorm ResNet on the embedded 10,000 images of Fashion-MNIST's test files.

Command:  python main.py                      (this config, this file's `rules` sweep)
Run time: three to four minutes on two CPU cores
Expected: test accuracy about .84 at the base batch size; the report says what each rule does
          away from it
"""

import ml_collections

from bs_jax.sweep.points import Point, prioritized, product


def get_config() -> ml_collections.ConfigDict:
    """The recipe as it was tuned, at batch size 64."""
    config = ml_collections.ConfigDict()
    config.name = "fashion_mnist"
    config.title = "Fashion-MNIST (10k part), small BatchNorm ResNet, AdamW"
    config.seed = 0  # initial weights, order of the examples, augmentation

    config.batch_size = 64  # examples per update, over all devices together
    config.base_batch_size = 64  # the batch size that the numbers below were tuned at
    config.train_examples = 30_720  # length of training, in examples seen (3.84 epochs)
    config.train_epochs = 0.0  # the same in epochs, which needs data.train_size; one of them is 0
    config.drop_remainder = False  # leave out what an epoch has beyond its last whole batch

    config.scaling = ml_collections.ConfigDict()
    config.scaling.rule = "invariant"  # none, linear, sqrt, noise_aware, invariant, seed, power(a)
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
    config.optimizer.name = "adamw"  # an optax factory by name
    config.optimizer.decay_mask = "all"  # weight decay on "all" leaves, or on "kernels" only
    config.optimizer.hyperparams = ml_collections.ConfigDict()  # the factory's own names
    config.optimizer.hyperparams.learning_rate = 2e-3  # peak, per update
    config.optimizer.hyperparams.b1 = 0.9  # decay per update
    config.optimizer.hyperparams.b2 = 0.99  # decay per update
    config.optimizer.hyperparams.eps = 1e-8
    config.optimizer.hyperparams.weight_decay = 0.1  # multiplied by the learning rate

    config.schedule = ml_collections.ConfigDict()
    config.schedule.name = "flat_cosine"  # flat, then cosine; or "constant", "linear"
    config.schedule.warmup_examples = 0  # linear from 0
    config.schedule.flat_fraction = 0.0  # of train_examples before the decay begins
    config.schedule.final_fraction = 0.01  # of the peak, at the end

    config.bn_decay = 0.9  # running statistics' decay per update
    config.ghost_batch_size = 8  # examples normalised together; 0: a whole micro-batch
    config.bn_cross_device = False  # normalise over all devices' examples together
    config.ema_decay = 0.0  # of the weights, per update; 0: evaluate the weights themselves
    config.label_smoothing = 0.0

    config.data = ml_collections.ConfigDict()
    config.data.name = "fashion_mnist_10k"  # or folder:/path, tfds:cifar10, ...
    config.data.train_size = 0  # examples in the training split, checked; 0: as it comes
    config.data.image_size = 28  # pixels, as the model sees them
    config.data.train_storage_size = 0  # pixels, as kept before random crops; 0: image_size
    config.data.eval_storage_size = 0  # pixels, as kept before the centre crop; 0: image_size
    config.data.fit = "squash"  # how images of another shape come to that size; or "crop"
    # True: read through grain. False: held on the device, unless it does not fit.
    config.data.streamed = False
    config.data.flip = False
    config.data.crop_padding = 0  # pixels on each side before a random crop
    config.data.crop_area = (1.0, 1.0)  # random resized crop: share of the area, low and high
    config.data.mean = (0.286,)  # per channel, of pixels in [0, 1]
    config.data.std = (0.353,)

    config.model = ml_collections.ConfigDict()
    config.model.name = "resnet8_patch"
    config.model.dtype = "float32"  # of the computation; parameters are always float32

    config.parallel = "pmap"  # over several devices; or "jit" over a mesh, with the same numbers
    config.eval_batch_size = 500  # examples, over all devices; has no effect on the result
    config.eval_every_examples = 7_680
    config.log_every_examples = 768  # training metrics are means over this many examples
    # 0: only where a signal interrupts. A run takes seconds: a killed one begins again.
    config.checkpoint_every_examples = 0
    config.tensorboard = False
    config.trackers = ()  # more places for the metrics: "tensorboard", "wandb", "mlflow"

    config.report = ml_collections.ConfigDict()
    config.report.accuracy_metric = "eval/accuracy"
    config.report.smoothed_metric = "eval/smoothed_accuracy"  # beside it; "": none
    config.report.loss_metric = "eval/loss"
    config.report.curve_metric = "train/loss"
    config.report.margin = 0.01  # accuracies closer than this count as equal
    return config


RULES = ("none", "linear", "sqrt", "noise_aware", "invariant")


def sweep_rules() -> list[Point]:
    """125 points: five rules, batch sizes 16 to 256, five seeds.

    All rules agree at the base batch size, so these are 105 runs. Points are compared seed by seed.
    """
    points = product(
        arm={rule: {"scaling.rule": rule} for rule in RULES},
        batch_size=(16, 32, 64, 128, 256),
        seed=(0, 1, 2, 3, 4),
    )
    return prioritized(
        points,
        lambda overrides: overrides["batch_size"] == 64,  # the base, which all are held against
        lambda overrides: overrides["batch_size"] in (16, 256),  # where rules differ most
    )


RAMP = {"batch_ramp.kind": "stages", "batch_ramp.stages": ((0, 64), (0.3, 128), (0.45, 256))}


def sweep_ramp() -> list[Point]:
    """27 points: from 64 to 256 while training, beside 256 from the start; three seeds.

    Every rule carries the optimizer's moments over at a change. The base is at 64 throughout.
    """
    rules = ("none", "sqrt", "noise_aware", "invariant")
    arms = {rule: {"scaling.rule": rule} for rule in rules}
    ramps = {f"{rule}, ramp": {"scaling.rule": rule} | RAMP for rule in rules}
    seeds = (0, 1, 2)
    return [
        *product(arm={"none": arms["none"]}, batch_size=(64,), seed=seeds),
        *product(arm=arms | ramps, batch_size=(256,), seed=seeds),
    ]


def sweep_short() -> list[Point]:
    """30 points: the same rules at 32, 64 and 128, two seeds; to see that everything runs."""
    return product(
        arm={rule: {"scaling.rule": rule} for rule in RULES},
        batch_size=(32, 64, 128),
        seed=(0, 1),
    )
