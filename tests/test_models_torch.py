"""XResNets give what an independent PyTorch network gives with the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bs_jax import models

torch = pytest.importorskip("torch", reason="the reference networks need PyTorch: .[torch]")

from helpers import torch_xresnet  # noqa: E402

# A short memory: by statistics far from the batch's, evaluation grows beyond all bounds.
EXAMPLES, SIZE, DECAY = 8, 64, 0.2
# PyTorch computes in float64, so these are our own float32 errors; 50 layers add up.
LOGIT_ERROR, GRADIENT_ERROR, STATISTICS_ERROR = 3e-4, 3e-3, 1e-4


def random_variables(model, rng):
    """Nothing hides behind a zero: scales, biases, gamma and the statistics are random too."""

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        name = path[-1].key
        if name in ("scale", "var"):
            value = np.exp(0.3 * noise)
        elif name in ("bias", "mean"):
            value = 0.1 * noise
        elif name == "gamma":
            value = np.full(leaf.shape, 2e-3)
        elif name == "kernel":
            value = noise * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:  # the vectors of the power iteration
            value = noise / np.linalg.norm(noise)
        return value.astype(np.float32)

    image = jnp.zeros((1, SIZE, SIZE, 3))
    shapes = jax.eval_shape(lambda key: model.init(key, image, False), jax.random.key(0))
    return jax.tree.map_with_path(draw, shapes)


# Not the deep blurred one: two values within a rounding of each other swap as a window's maximum
# there, and PyTorch's own float32 gradients are off by .63 from its float64 ones.
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "xse_resnext50",
            {"stage_sizes": (2, 1), "widths": (64, 128), "shortcut_pool": "max_blur"},
        ),
        pytest.param("xresnet10_small", {"shortcut_pool": "max_blur"}, marks=pytest.mark.long),
        pytest.param("xresnet18", {}, marks=pytest.mark.long),
        pytest.param(
            "xse_resnext50", {"stage_sizes": (2, 1), "widths": (64, 128)}, marks=pytest.mark.long
        ),
        pytest.param("xse_resnext50", {"stage_sizes": (2, 1, 1, 1)}, marks=pytest.mark.long),
        pytest.param("xresnet50", {}, marks=pytest.mark.long),
        pytest.param("xse_resnext50", {}, marks=pytest.mark.long),
    ],
)
def test_logits_gradients_and_statistics_are_pytorchs(name, changes):
    model = dataclasses.replace(models.create(name, num_classes=10), **changes)
    rng = np.random.default_rng(0)
    variables = random_variables(model, rng)
    images = rng.standard_normal((EXAMPLES, SIZE, SIZE, 3)).astype(np.float32)
    slopes = rng.standard_normal((EXAMPLES, 10)).astype(np.float32)

    @jax.jit
    def passes(variables):
        def loss(params):
            logits, updated = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                bn_decay=DECAY,
                mutable=["batch_stats"],
            )
            return jnp.sum(logits * slopes), (logits, updated["batch_stats"])

        gradients, (logits, stats) = jax.grad(loss, has_aux=True)(variables["params"])
        evaluated = model.apply({**variables, "batch_stats": stats}, images, train=False)
        return logits, evaluated, gradients, stats

    logits, evaluated, gradients, stats = passes(variables)

    theirs = torch_xresnet.XResNet(model, DECAY).double().train()
    torch_xresnet.carry_over(theirs, variables)
    batch = torch.from_numpy(np.float64(images)).permute(0, 3, 1, 2)
    want = theirs(batch)
    (want * torch.from_numpy(np.float64(slopes))).sum().backward()
    np.testing.assert_allclose(logits, want.detach(), atol=LOGIT_ERROR)

    errors = torch_xresnet.errors(theirs, {"params": gradients}, lambda leaf: leaf.grad)
    assert len(errors) == len(jax.tree.leaves(variables["params"]))
    assert max(errors.values()) < GRADIENT_ERROR, errors

    torch_xresnet.make_variances_biased(theirs)
    errors = torch_xresnet.errors(theirs, {"batch_stats": stats})
    assert len(errors) == len(jax.tree.leaves(variables["batch_stats"]))
    assert max(errors.values()) < STATISTICS_ERROR, errors
    with torch.no_grad():
        want = theirs.eval()(batch).numpy()
    np.testing.assert_allclose(evaluated, want, atol=LOGIT_ERROR * np.abs(want).max())
