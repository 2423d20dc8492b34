"""What a network costs: multiply-adds, counted in the traced program."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

from bs_jax.errors import UserError
from bs_jax.models.conv import conv_general_dilated


def count_multiply_adds(function: Callable[..., Any], *args: Any) -> int:
    """Multiply-adds of the convolutions and matrix products in one call of a function.

    Traces, but neither compiles nor runs. A convolution counts as it is written down, products with
    the padding's zeros included, and not in the form that the back end takes
    (`bs_jax.models.conv`). Everything else (activations, maxima, sums) counts nothing, as is the
    custom.

    Args:
        function: of arrays.
        args: its arguments: arrays, or their shapes as `jax.ShapeDtypeStruct`; pytrees of them.

    Returns:
        The number. Loops count every round, and of branches the costliest counts.

    Raises:
        UserError: there are products in a loop whose rounds are not known beforehand.

    Example:
        >>> import jax.numpy as jnp
        >>> from bs_jax import models
        >>> model = models.create("xresnet18", num_classes=10)
        >>> image = jnp.zeros((1, 128, 128, 3))
        >>> variables = jax.eval_shape(lambda key: model.init(key, image, False), jax.random.key(0))
        >>> count_multiply_adds(lambda v: model.apply(v, image, False), variables)
        670438400
    """
    with nn.intercept_methods(_plain_convolution):
        return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _plain_convolution(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Put XLA's own convolution in the place of ours."""
    module = context.module
    ours = getattr(module, "conv_general_dilated", None) is conv_general_dilated
    if not ours or context.method_name != "__call__" or module.is_initializing():
        return call(*args, **kwargs)
    kernel = module.get_variable("params", "kernel")
    outputs = jax.lax.conv_general_dilated(
        args[0].astype(module.dtype),
        kernel.astype(module.dtype),
        module.strides,
        module.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=module.feature_group_count,
    )
    return outputs + module.get_variable("params", "bias") if module.use_bias else outputs


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += _size(equation) * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += _size(equation) * math.prod(kernel) // features
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(_count(part) for part in _jaxprs(params))
            if name == "while" and inner:
                raise UserError(
                    "count_multiply_adds: there are products in a while loop, whose rounds are not "
                    "known before it runs; use lax.scan, or fori_loop with constant bounds"
                )
            total += inner * params.get("length", 1) if name == "scan" else inner
    return total


def _size(equation: Any) -> int:
    return math.prod(equation.outvars[0].aval.shape)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)  # a closed one holds an open one
            if hasattr(part, "eqns"):
                yield part
