"""Run ids are the names of what users have on disk: a change of the code must not change them.

They change with the numbers that a run comes to, as when rules were guarded and schedules read in
the middle of an update; runs at the base batch size and under the published arms kept theirs then.
"""

import importlib.util
import json
import pathlib

import pytest

from bs_jax.sweep import plan

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "run_ids.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_run_ids_are_what_they_were(name):
    path, sweep = name.split(" ")
    path, _, form = path.partition(":")
    spec = importlib.util.spec_from_file_location("recipe", ROOT / path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = json.loads((recipe.get_config(form) if form else recipe.get_config()).to_json())
    planned = plan.plan_sweep(sweep, config, getattr(recipe, f"sweep_{sweep}")())
    assert sorted(run.run_id for run in planned.runs) == sorted(GOLDEN[name])
