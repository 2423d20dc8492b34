"""Flax networks whose BatchNorm takes its decay as an argument and its group size as a choice."""

from bs_jax.models.costs import count_multiply_adds
from bs_jax.models.normalization import BatchNorm
from bs_jax.models.registry import count_parameters, create, names

__all__ = ["BatchNorm", "count_multiply_adds", "count_parameters", "create", "names"]
