"""The gradient of one batch, taken in parts, and what the parts say about its noise."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bs_jax.errors import UserError
from bs_jax.scaling.hyperparameters import ScalingWarning
from bs_jax.scaling.noise import MicrobatchStats, abs_square
from bs_jax.scaling.rules import PyTree


def value_grad_and_stats(
    loss_fn: Callable[..., Any],
    *,
    microbatches: int,
    axis_name: str | None = None,
    has_aux: bool = False,
    weighted: bool = False,
    method: Literal["scan", "vmap"] = "scan",
    unroll: int = 1,
    interleave: bool = False,
) -> Callable[..., tuple[Any, PyTree, MicrobatchStats | None]]:
    r"""Return a function that gives loss, gradient and micro-batch statistics of one batch.

    The batch is split into ``microbatches`` equal parts whose gradients are averaged (gradient
    accumulation); the mean of their squares is gathered beside it. With ``weighted``, part i
    returns a sum :math:`S_i` and a weight :math:`n_i` (valid tokens, say), and::

        loss = sum S_i / sum n_i,    grads = sum grad S_i / sum n_i

    which is the whole batch's gradient however the weights are spread over the parts. Its
    ``mean_square`` is ``sum n_i |g_i|^2 / sum n_i`` with ``g_i = grad S_i / n_i``: so the split
    into signal and noise stays unbiased for parts of unequal weight.

    Args:
        loss_fn: ``loss_fn(params, batch, *args) -> loss``, a mean over the examples of its batch.
            With ``weighted``: ``-> (sum, weight)``. With ``has_aux``: ``-> (loss, aux)``, or
            ``-> ((sum, weight), aux)``. ``params`` may also be a ``flax.nnx`` module.
        microbatches: parts that this device's batch is split into. Shuffle the data: the parts
            must be random (see ``MicrobatchStats``).
        axis_name: a mapped axis (``pmap``, ``shard_map``) to average over as well; each device
            then counts as further micro-batches.
        has_aux: whether ``loss_fn`` also returns auxiliary output. Its leaves are averaged over
            the parts; PRNG keys and unsigned integers (counters), and all integers and booleans
            of an nnx state, are those of the last part.
        weighted: whether ``loss_fn`` returns a sum and its weight instead of a mean. A mean over
            valid tokens (a mask) needs it, since its parts do not count alike.
        method: ``"scan"``: one part at a time, lean on memory; ``"vmap"``: all at once.
        unroll: of the scan.
        interleave: whether part i holds examples i, i + n, i + 2 n, ... instead of the i-th n-th
            of the batch. For a batch that ``jit`` shards over devices: each part then lies on all
            of them, where one whole piece lies on few, and the scan has every device compute it.

    Returns:
        ``f(params, batch, *args, rng=None) -> (value, grads, stats)`` with value the loss or
        ``(loss, aux)``. Every leaf of batch has a leading dimension divisible by ``microbatches``.
        A given ``rng`` is folded with the index of the part (and the device) and passed to
        ``loss_fn`` as ``rng=``; so are typed keys (``jax.random.key``) among ``args``, in an nnx
        state say. A module given as ``params`` is updated in place, as ``nnx.value_and_grad``
        does. stats is ``None`` if there is one part and one device.

    Raises:
        UserError: if the batch cannot be split evenly, or the loss returns something else.

    Example:
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> f = value_grad_and_stats(loss, microbatches=2)
        >>> value, grads, stats = f(jnp.ones(3), jnp.eye(3).repeat(2, axis=0))
        >>> value.shape, grads.shape, stats.count
        ((), (3,), 2)

        A mean over valid tokens:

        >>> def sum_and_weight(w, batch):
        ...     return jnp.sum(batch["mask"] * (batch["x"] @ w) ** 2), jnp.sum(batch["mask"])
        >>> f = value_grad_and_stats(sum_and_weight, microbatches=2, weighted=True)
        >>> batch = {"x": jnp.ones((4, 3)), "mask": jnp.array([1.0, 1.0, 1.0, 0.0])}
        >>> value, grads, stats = f(jnp.ones(3), batch)
        >>> float(value)
        9.0

    Reference:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018 (appendix A).
    """
    whole = isinstance(cast(object, microbatches), int | np.integer) and not isinstance(
        microbatches, bool
    )
    if not whole or microbatches < 1:
        raise UserError(f"microbatches is {microbatches!r}; give a whole number of at least 1")
    microbatches = int(microbatches)
    if method not in ("scan", "vmap"):
        raise UserError(f"method is {method!r}; choose 'scan' or 'vmap'")

    def fn(params: PyTree, batch: PyTree, *args: Any, rng: Any = None) -> Any:
        if _is_module(params):
            return _of_module(params, batch, args, rng)
        _warn_of_shared_randomness(loss_fn, args)
        # Under shard_map the gradient of replicated parameters is already summed over the devices:
        # of their own copies every device keeps its own gradient.
        params = params if axis_name is None else _own_copy(params, axis_name)
        index = 0 if axis_name is None else jax.lax.axis_index(axis_name) * microbatches
        several = microbatches > 1 or axis_name is not None

        def part(xs: tuple[Any, PyTree]) -> tuple[PyTree, PyTree]:
            i, piece = xs
            kwargs = {} if rng is None else {"rng": jax.random.fold_in(rng, index + i)}
            own_args = _fold_keys(args, index + i) if several else args

            def loss(params: PyTree) -> tuple[jax.Array, Any]:
                value, aux = _loss_and_aux(loss_fn(params, piece, *own_args, **kwargs), has_aux)
                total, weight = _sum_and_weight(value, weighted)
                return total, (weight, aux)

            (total, (weight, aux)), grads = jax.value_and_grad(loss, has_aux=True)(params)
            aux_sum, aux_last = _separate(aux)
            known = weight > 0 if weighted else True
            squares = jax.tree.map(
                lambda g: _divided(abs_square(g), weight, known) if weighted else abs_square(g),
                grads,
            )
            counted = jnp.asarray(known, jnp.float32) if weighted else ()
            return (total, weight, grads, squares, counted, aux_sum), aux_last

        if microbatches == 1:
            sums, last = part((0, batch))
        else:
            pieces = (jnp.arange(microbatches), _split(batch, microbatches, interleave))
            if method == "vmap":
                parts, lasts = jax.vmap(part)(pieces)
                sums = jax.tree.map(lambda x: jnp.sum(_wide(x), axis=0), parts)
                last = jax.tree.map(lambda x: x[-1], lasts)
            else:
                sums, last = _scan_sum(part, pieces, unroll, axis_name)
        count = microbatches
        if axis_name is not None:
            sums = jax.lax.psum(sums, axis_name)
            count = microbatches * jax.lax.axis_size(axis_name)
        total, weight, wide, squares, counted, aux_sum = sums
        share = weight if weighted else count
        if weighted or count > 1:
            total, wide, squares = jax.tree.map(lambda x: x / share, (total, wide, squares))
            aux_sum = jax.tree.map(lambda x: x / count, aux_sum) if count > 1 else aux_sum
        # The statistics keep the mean as it was summed: rounded to bfloat16 its square would differ
        # from the mean square by more than a small noise does. Where nothing is rounded, the two
        # trees hold the same arrays, which tells the optimizer that nothing rescaled them.
        grads = jax.tree.map(_as_dtype_of, wide, params)
        stats = None
        if count > 1:
            # A part without any weight says nothing; of fewer than two no noise can be told.
            of = jnp.maximum(counted, 2.0) if weighted else count
            stats = MicrobatchStats(squares, of, mean=wide)
        value = (total, _together(aux_sum, last)) if has_aux else total
        return value, grads, stats

    def _of_module(model: Any, batch: PyTree, args: tuple[Any, ...], rng: Any) -> Any:
        from flax import nnx

        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def pure(params: PyTree, batch: PyTree, rest: PyTree, *args: Any, **kwargs: Any) -> Any:
            net = nnx.merge(graph, params, rest, copy=True)
            value, aux = _loss_and_aux(loss_fn(net, batch, *args, **kwargs), has_aux)
            return value, (aux, nnx.split(net, nnx.Param, ...)[2])

        run = value_grad_and_stats(
            pure,
            microbatches=microbatches,
            axis_name=axis_name,
            has_aux=True,
            weighted=weighted,
            method=method,
            unroll=unroll,
            interleave=interleave,
        )
        (value, (aux, new_rest)), grads, stats = run(params, batch, rest, *args, rng=rng)
        # The parts drew from folded keys; the module keeps its own, and its counters go on.
        nnx.update(model, _with_keys_of(new_rest, rest))
        return ((value, aux) if has_aux else value), grads, stats

    return fn


class GradientAccumulator(NamedTuple):
    """Gradients of micro-batches that arrive one at a time, from a loader say.

    A pytree: carry it through ``jit``, and begin a new one for each update. ``optax.microbatch``
    and ``optax.MultiSteps`` accumulate too, but keep no squares, which ``"invariant"`` and
    ``"noise_aware"`` need. Where the whole batch is at hand, ``value_grad_and_stats`` is simpler.

    Attributes:
        total: sum of weight times gradient, float32 at least; a tree like the parameters.
        square: sum of weight times squared gradient.
        weight: sum of the weights.
        count: micro-batches with a weight above zero.

    Example:
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> w, gathered = jnp.ones(3), GradientAccumulator.zeros_like(jnp.ones(3))
        >>> for x in jnp.eye(3).repeat(2, axis=0).reshape(2, 3, 3):
        ...     gathered = gathered.add(jax.grad(loss)(w, x))
        >>> grads, stats = gathered.result(w)
        >>> grads.shape, int(stats.count)
        ((3,), 2)
    """

    total: PyTree
    square: PyTree
    weight: jax.Array
    count: jax.Array

    @classmethod
    def zeros_like(cls, params: PyTree) -> GradientAccumulator:
        """Return the accumulator before any micro-batch.

        Args:
            params: the parameters, or a tree of the gradients' shapes.
        """
        total = jax.tree.map(
            lambda x: jnp.zeros_like(x, jnp.promote_types(jnp.result_type(x), "float32")), params
        )
        square = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        return cls(total, square, jnp.zeros(()), jnp.zeros(()))

    def add(self, grads: PyTree, weight: Any = 1.0) -> GradientAccumulator:
        """Take one micro-batch in.

        Args:
            grads: its mean gradient.
            weight: what it counts in the mean of the batch: its examples or valid tokens, or 1
                where all micro-batches count alike. One of weight 0 is passed over.

        Returns:
            The accumulator with it.

        Raises:
            UserError: for gradients of other shapes, or a weight that is no number from 0 up.
        """
        _check_added(self.total, grads, weight)
        weight = jnp.asarray(weight, jnp.float32)
        known = weight != 0  # one that is not a number shows in the result
        add = lambda sums, x: sums + jnp.where(known, weight * x, 0.0).astype(sums.dtype)  # noqa: E731
        return GradientAccumulator(
            jax.tree.map(add, self.total, grads),
            jax.tree.map(lambda sums, g: add(sums, abs_square(g)), self.square, grads),
            self.weight + weight,
            self.count + known.astype(jnp.float32),
        )

    def result(self, params: PyTree | None = None) -> tuple[PyTree, MicrobatchStats]:
        """Return the batch's gradient and the statistics for ``update(..., microbatch=)``.

        Args:
            params: gives the gradients their dtypes; ``None``: as they were summed.

        Raises:
            UserError: if it is known that fewer than two micro-batches were added.
        """
        if not isinstance(self.count, Tracer) and self.count < 2:
            raise UserError(
                f"{int(self.count)} micro-batches were added: the noise shows only between"
                " micro-batches; add 2 or more before each update"
            )
        mean, square = jax.tree.map(lambda x: x / self.weight, (self.total, self.square))
        grads = mean if params is None else jax.tree.map(_as_dtype_of, mean, params)
        return grads, MicrobatchStats(square, jnp.maximum(self.count, 2.0), mean=mean)


def _check_added(total: PyTree, grads: PyTree, weight: Any) -> None:
    """Raise a ``UserError`` unless these gradients and this weight can be added."""
    same = jax.tree.structure(total) == jax.tree.structure(grads)
    if not same or [*map(jnp.shape, jax.tree.leaves(total))] != [
        *map(jnp.shape, jax.tree.leaves(grads))
    ]:
        raise UserError(
            "the gradients added have another structure or other shapes than the tree given to"
            " GradientAccumulator.zeros_like; give it the parameters"
        )
    number = jnp.shape(weight) == ()
    if number and not isinstance(weight, Tracer):
        number = float(weight) >= 0
    if not number:
        raise UserError(
            f"the weight of a micro-batch is {weight}; give one number, its examples or valid"
            " tokens, from 0 up"
        )


def _loss_and_aux(found: Any, has_aux: bool) -> tuple[Any, Any]:
    if not has_aux:
        return found, ()
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise UserError(
            f"has_aux=True, but the loss returned a {type(found).__name__}; return the pair"
            " (loss, aux)"
        )
    return found[0], found[1]


def _sum_and_weight(value: Any, weighted: bool) -> tuple[Any, Any]:
    pair = isinstance(value, tuple | list) and len(value) == 2
    if weighted and not pair:
        raise UserError(
            f"weighted=True, but the loss returned a {type(value).__name__}; return the pair"
            " (sum of the losses, sum of the weights)"
        )
    if not weighted and isinstance(value, tuple | list):
        raise UserError(
            "the loss returned a tuple; pass has_aux=True where it is (loss, aux), or weighted=True"
            " where it is (sum, weight)"
        )
    if not weighted:
        return value, ()
    total, weight = value
    return total, jax.lax.stop_gradient(jnp.asarray(weight, jnp.float32))


def _divided(x: jax.Array, weight: Any, known: Any) -> jax.Array:
    return jnp.where(known, x / jnp.where(known, weight, 1.0), 0.0)


def _is_counter(x: Any) -> bool:
    """Whether a leaf of auxiliary output has no mean: a PRNG key, or an unsigned integer."""
    dtype = jnp.asarray(x).dtype if not hasattr(x, "dtype") else x.dtype
    return jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.issubdtype(dtype, jnp.unsignedinteger)


def _separate(aux: PyTree) -> tuple[PyTree, PyTree]:
    """Split auxiliary output into what is averaged and what the last part decides."""
    leaves, treedef = jax.tree.flatten(aux)
    kept = _in_nnx_state(aux)
    passed_on = [
        _is_counter(x) or (k and not jnp.issubdtype(jnp.result_type(x), jnp.inexact))
        for x, k in zip(leaves, kept, strict=True)
    ]
    averaged = [() if p else x for x, p in zip(leaves, passed_on, strict=True)]
    last = [x if p else () for x, p in zip(leaves, passed_on, strict=True)]
    dtypes = tuple(jnp.result_type(x) if k else None for x, k in zip(leaves, kept, strict=True))
    return (averaged, _Structure(treedef, dtypes)), last


def _in_nnx_state(tree: PyTree) -> list[bool]:
    """Tell of each leaf whether it is part of an nnx state, whose types must stay."""
    nnx = _nnx()
    is_state = lambda x: nnx is not None and isinstance(x, nnx.State)  # noqa: E731
    kept = lambda x: jax.tree.map(lambda _: is_state(x), x)  # noqa: E731
    return jax.tree.leaves(jax.tree.map(kept, tree, is_leaf=is_state))


def _together(separated: tuple[list[Any], _Structure], last: list[Any]) -> PyTree:
    averaged, structure = separated
    leaves = [
        b if isinstance(a, tuple) else a if dtype is None else a.astype(dtype)
        for a, b, dtype in zip(averaged, last, structure.dtypes, strict=True)
    ]
    return jax.tree.unflatten(structure.treedef, leaves)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Structure:
    """A tree's structure, carried beside its leaves through a scan; dtypes that must stay."""

    treedef: Any
    dtypes: tuple[Any, ...]


def _nnx() -> Any:
    """Return flax.nnx where the caller has imported it: this package does not need it."""
    return sys.modules.get("flax.nnx")


def _is_module(params: Any) -> bool:
    nnx = _nnx()
    return nnx is not None and isinstance(params, nnx.Module)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _fold_keys(tree: PyTree, index: Any) -> PyTree:
    """Give each part keys of its own: else dropout masks every part alike."""
    fold = jax.random.fold_in

    def folded(key: jax.Array) -> jax.Array:
        flat = jax.vmap(fold, (0, None))(key.reshape(-1), index)
        return flat.reshape(key.shape)

    return jax.tree.map(lambda x: folded(x) if _is_key(x) else x, tree)


def _with_keys_of(new: PyTree, old: PyTree) -> PyTree:
    nnx = _nnx()
    is_key = lambda x: isinstance(x, nnx.RngKey)  # noqa: E731
    return jax.tree.map(lambda n, o: o if is_key(o) else n, new, old, is_leaf=is_key)


def _warn_of_shared_randomness(loss_fn: Callable[..., Any], args: PyTree) -> None:
    """Warn of randomness that every micro-batch would share.

    A key or an nnx state with random streams that the loss reads from outside its arguments; an
    untyped key among these, which looks like any other array.
    """
    if any(map(_is_untyped_key, jax.tree.leaves(args))):
        warnings.warn(
            "an argument of the loss looks like a key of jax.random.PRNGKey (uint32, shape (2,)):"
            " every micro-batch gets the same one; pass it as rng=, or make it by jax.random.key",
            ScalingWarning,
            stacklevel=3,
        )
    if not inspect.isfunction(loss_fn):
        return
    nnx = _nnx()
    try:
        enclosed = inspect.getclosurevars(loss_fn)
    except ValueError:  # a variable without a value yet
        return
    for name, value in {**enclosed.globals, **enclosed.nonlocals}.items():
        if _is_key(value):
            what, who, instead = "is a random key", "", "pass it as rng="
        elif nnx is not None and _holds_streams(value, nnx):
            what, who = "holds random streams (dropout)", " and every step"
            instead = "pass it as a further argument, or give the module itself as params"
        else:
            continue
        warnings.warn(
            f"the loss reads {name!r}, which {what}, from outside its arguments: every micro-batch"
            f"{who} draws the same mask; {instead}",
            ScalingWarning,
            stacklevel=3,
        )


def _holds_streams(value: Any, nnx: Any) -> bool:
    is_random = lambda x: isinstance(x, nnx.RngState)  # noqa: E731
    held = isinstance(value, nnx.Module | nnx.State)
    return held and any(map(is_random, jax.tree.leaves(value, is_leaf=is_random)))


def _is_untyped_key(x: Any) -> bool:
    return getattr(x, "dtype", None) == np.uint32 and jnp.shape(x) == (2,)


def _as_dtype_of(gradient: jax.Array, param: Any) -> jax.Array:
    dtype = jnp.result_type(param)
    return gradient if gradient.dtype == dtype else gradient.astype(dtype)


def _wide(x: jax.Array) -> jax.Array:
    # Sums of bfloat16 lose the small terms, sums of integers their mean.
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _split(batch: PyTree, parts: int, interleave: bool) -> PyTree:
    sizes = {x.shape[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(batch)}
    if len(sizes) > 1:
        found = " and ".join(str(size) if size else "no" for size in sorted(sizes))
        raise UserError(
            f"the batch's arrays hold {found} examples: each needs the same number in front; pass"
            " what is no example as a further argument of the loss"
        )
    size = sizes.pop() if sizes else 0
    if not size or size % parts:
        raise UserError(
            f"a batch of {size or 'no'} examples cannot be split into {parts} equal micro-batches;"
            f" use a batch size divisible by {parts} or another number of micro-batches"
        )
    if interleave:
        return jax.tree.map(
            lambda x: x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
        )
    for x in jax.tree.leaves(batch):
        axes = _explicit_axes(x)
        if axes:
            raise UserError(
                f"the batch's examples are sharded over the mesh axis {axes!r}, so that a"
                " consecutive part would lie on few devices; pass interleave=True"
            )
    return jax.tree.map(lambda x: x.reshape(parts, size // parts, *x.shape[1:]), batch)


def _explicit_axes(x: Any) -> Any:
    """Return the mesh axes that an array's examples are sharded over, where its type says so."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", None)
    return spec[0] if spec else None


def _own_copy(tree: PyTree, axis_name: str) -> PyTree:
    """Let values that are the same on every device of a ``shard_map`` count as each device's."""

    def own(x: Any) -> Any:
        try:
            return jax.lax.pcast(x, axis_name, to="varying")
        except ValueError:  # they are so already, or the axis is a vmap's
            return x

    return jax.tree.map(own, tree)


def _scan_sum(
    fn: Callable[[Any], Any], xs: Any, unroll: int, axis_name: str | None
) -> tuple[Any, Any]:
    """Sum what ``fn`` returns first over the leading axis; keep what it returns second last."""
    shapes, _ = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], xs))

    def zeros(s: jax.ShapeDtypeStruct) -> jax.Array:
        # Over an explicit mesh a sum of sharded gradients is sharded as they are.
        dtype = jnp.promote_types(s.dtype, jnp.float32)
        return jnp.zeros(s.shape, dtype, device=_explicit_sharding(s.sharding))

    first = jax.tree.map(zeros, shapes)
    first = first if axis_name is None else _own_copy(first, axis_name)

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        sums, last = fn(x)
        return jax.tree.map(lambda c, v: c + _wide(v), carry, sums), last

    total, lasts = jax.lax.scan(body, first, xs, unroll=unroll)
    return total, jax.tree.map(lambda x: x[-1], lasts)


def _explicit_sharding(sharding: Any) -> Any:
    """Return a sharding that is part of an array's type, else ``None``: the compiler chooses."""
    types = getattr(getattr(sharding, "mesh", None), "axis_types", ())
    return sharding if jax.sharding.AxisType.Explicit in types else None
