"""XResNets give what an independent PyTorch network gives; the benchmark's peers are ours."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import networks

from bs_jax import models

# Imported in the tests: it takes seconds, in every process that collects.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="the reference networks need PyTorch: .[torch]",
)

# A short memory: by statistics far from the batch's, evaluation grows beyond all bounds.
EXAMPLES, DECAY = 8, 0.2
# PyTorch computes in float64, so these are our own float32 errors; 50 layers add up.
LOGIT_ERROR, GRADIENT_ERROR, STATISTICS_ERROR = 3e-4, 3e-3, 1e-4


# Not the deep blurred one: two values within a rounding of each other swap as a window's maximum
# there, and PyTorch's own float32 gradients are off by .63 from its float64 ones.
@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [
        (  # every kind of layer: a block that keeps its shape, one that strides, each part of them
            "xse_resnext50_blur",
            {"stage_sizes": (2, 1), "widths": (32, 64), "groups": 8},
            32,
        ),
        *(
            pytest.param(name, changes, 64, marks=pytest.mark.long)
            for name, changes in [
                ("xse_resnext50_blur", {"stage_sizes": (2, 1), "widths": (64, 128)}),
                ("xresnet10_small", {"shortcut_pool": "max_blur"}),
                ("xresnet18", {}),
                ("xse_resnext50", {"stage_sizes": (2, 1), "widths": (64, 128)}),
                ("xse_resnext50", {"stage_sizes": (2, 1, 1, 1)}),
                ("xresnet50", {}),
                ("xse_resnext50", {}),
            ]
        ),
    ],
)
def test_logits_gradients_and_statistics_are_pytorchs(name, changes, size):
    import torch
    from helpers import torch_xresnet

    model = dataclasses.replace(models.create(name, num_classes=10), **changes)
    rng = np.random.default_rng(0)
    variables = networks.random_variables(model, (1, size, size, 3), rng, train=False)
    images = rng.standard_normal((EXAMPLES, size, size, 3)).astype(np.float32)
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


# Each kind of block and stem.
@pytest.mark.parametrize("name", ["resnet18", "xresnet10_small", "xresnet50"])
def test_the_peers_networks_are_ours(name):
    """The same number of parameters: a ratio between different networks would say nothing."""
    from benchmarks import torch_models

    peer = torch_models.create(name, 10)
    module = models.create(name, num_classes=10)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
    )
    ours = models.count_parameters(shapes["params"])
    assert ours == sum(parameter.numel() for parameter in peer.parameters())
