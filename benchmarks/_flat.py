"""An elementwise optimizer over two long vectors, not over every leaf: few large kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def over_vectors(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer on all kernels as one vector and all other parameters as another.

    The two keep the names by which the trainer tells what is weight-decayed. Only for optimizers
    that treat every coordinate by itself (not for Adafactor, Muon, LARS or LAMB).

    Args:
        optimizer: of parameters that share one dtype.

    Example:
        >>> flat = over_vectors(optax.with_extra_args_support(optax.sgd(1.0)))
        >>> params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
        >>> updates, _ = flat.update(params, flat.init(params), params)
        >>> updates["a"]["bias"].tolist()
        [-1.0, -1.0]
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if extra.get("microbatch") is not None:
            stats = extra["microbatch"]
            mean = None if stats.mean is None else _join(stats.mean)
            extra["microbatch"] = stats._replace(mean_square=_join(stats.mean_square), mean=mean)
        joined = None if params is None else _join(params)
        flat, state = optimizer.update(_join(updates), state, joined, **extra)
        return _split(flat, updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optimizer.init(_join(params)), update
    )


def _names(tree: Any) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return ["bias" if path[-1].key in ("bias", "scale") else "kernel" for path in paths]


def _join(tree: Any) -> dict[str, jax.Array]:
    parts: dict[str, list[jax.Array]] = {"kernel": [], "bias": []}
    for name, leaf in zip(_names(tree), jax.tree.leaves(tree), strict=True):
        parts[name].append(leaf.ravel())
    return {name: jnp.concatenate(leaves) for name, leaves in parts.items() if leaves}


def _split(flat: dict[str, jax.Array], like: Any) -> Any:
    leaves, treedef = jax.tree.flatten(like)
    used = dict.fromkeys(flat, 0)
    found = []
    for name, leaf in zip(_names(like), leaves, strict=True):
        part = jax.lax.slice_in_dim(flat[name], used[name], used[name] + leaf.size)
        found.append(part.reshape(leaf.shape))
        used[name] += leaf.size
    return jax.tree.unflatten(treedef, found)
