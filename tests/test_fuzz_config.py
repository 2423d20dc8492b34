"""Any value in any field of a config: a plan or one line of error, never a traceback."""

import json

import pytest
from helpers.training import tiny_config
from hypothesis import given, note, settings
from hypothesis import strategies as st

from bs_jax.errors import UserError
from bs_jax.sweep.points import apply_overrides, resolve
from bs_jax.training.plan import Plan

SMALL = tiny_config()


def leaves(node, path=""):
    """Every field that holds no fields, dotted; those that hold some as well."""
    for name, value in node.items():
        inner = f"{path}.{name}".strip(".")
        yield inner
        if isinstance(value, dict) and value:
            yield from leaves(value, inner)


FIELDS = sorted(leaves(SMALL))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2, 16, 48, 2**31, 2**32, 10**400]),
    st.floats(),
    st.sampled_from([0.0, 1.0, 0.5, -0.5, 1e-300, 1e300]),
    st.text(max_size=8),
    st.sampled_from(["sqrt", "none", "invariant", "adamw", "sgd", "power(2)", "__import__('os')"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


def plan_or_one_line(overrides):
    try:
        run = resolve(SMALL, overrides)
    except UserError as error:
        assert str(error).strip()  # noqa: PT017 (most values are refused)
        assert "\n" not in str(error)  # noqa: PT017
        return
    json.dumps(run.config)
    chunks = list(Plan.of(run).chunks(run.batch_size)) if run.train_examples < 10**6 else []
    assert all(chunk.end > chunk.start for chunk in chunks)


@settings(max_examples=40)
@given(value=values)
def test_any_value_in_any_one_field(value):
    for field in FIELDS:
        note(field)  # of those that a failure prints, the last is the one
        plan_or_one_line({field: value})


@settings(max_examples=150)
@given(overrides=st.dictionaries(st.sampled_from(FIELDS), values, min_size=2, max_size=3))
def test_any_values_in_several_fields(overrides):
    plan_or_one_line(overrides)


@given(path=st.text(max_size=12), value=scalars)
def test_any_name_of_a_field(path, value):
    if path not in FIELDS:
        with pytest.raises(UserError, match="config has no field"):
            apply_overrides(SMALL, {path: value})
