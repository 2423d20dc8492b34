"""The typed recipe: read once, strictly; written as the first records were; frozen."""

import dataclasses
import json
import pathlib

import pytest
from helpers.training import tiny_config

from bs_jax.errors import UserError
from bs_jax.recipe import BatchRamp, Recipe
from bs_jax.records.run_files import NOT_IDENTITY, Summary
from bs_jax.records.run_folder import RunFolder
from bs_jax.run import FixedValues, ResolvedRun, ScaledWhileTraining
from bs_jax.sweep.points import resolve

FIRST = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "first_records.json").read_text(encoding="utf-8")
)
each_first_record = pytest.mark.parametrize("first", FIRST, ids=[first["name"] for first in FIRST])


@each_first_record
def test_the_first_records_are_read_and_written_as_they_are(first):
    record = first["record"]
    run = ResolvedRun.from_json(record)
    assert run.to_json() == record
    if not run.measures_noise:
        assert run.content_id == run.run_id
    kind = FixedValues if record["config"]["scaling"]["rule"] == "fixed" else ScaledWhileTraining
    assert isinstance(run.optimizer, kind)
    if kind is FixedValues:
        assert run.optimizer.schedule_ahead == 0.0
    else:
        assert not run.optimizer.scaling.guard


@each_first_record
def test_a_run_goes_on_in_a_folder_of_the_first_records(first, tmp_path):
    record = first["record"]
    for name in ("config", "hparams"):
        (tmp_path / f"{name}.json").write_text(json.dumps(record[name]), encoding="utf-8")
    folder = RunFolder(tmp_path, ResolvedRun.from_json(record))  # another's is refused here
    assert not folder.done
    other = dataclasses.replace(folder.run, label_smoothing=0.25)
    with pytest.raises(UserError, match="holds a run of another config"):
        RunFolder(tmp_path, other)


def test_what_does_not_change_the_numbers_may_differ_in_a_finished_run(tmp_path):
    config = {"title": "Another", "tensorboard": True, "parallel": "jit", "report.margin": 0.02}
    config |= {"checkpoint_every_examples": 0, "trackers": ("tensorboard",), "name": "other"}
    assert {field.partition(".")[0] for field in config} == set(NOT_IDENTITY)
    before, after = resolve(tiny_config()), resolve(tiny_config(**config))
    folder = RunFolder(tmp_path, before)
    folder.begin()
    (tmp_path / "metrics.jsonl").touch()
    folder.finish(Summary(status="done", final={}, run_id=before.run_id))
    assert before.config != after.config
    assert RunFolder(tmp_path, after).done


def test_only_the_config_of_a_record_is_needed():
    record = FIRST[0]["record"]
    run = ResolvedRun.from_json({"config": record["config"]})
    assert run.config == record["config"]


def test_what_came_later_may_be_absent():
    config = tiny_config()
    for path in LATER:
        *parent, name = path.split(".")
        del section(config, ".".join(parent))[name]
    recipe = Recipe.parse(config)
    assert (recipe.batch_ramp, recipe.trackers) == (LATER["batch_ramp"], LATER["trackers"])
    assert recipe.scaling.guard is LATER["scaling.guard"]
    assert resolve(config) == resolve(tiny_config())


def sections(node, path=""):
    yield path
    for name, value in node.items():
        if isinstance(value, dict) and name != "hyperparams":
            yield from sections(value, f"{path}.{name}".strip("."))


def section(config, path):
    for name in filter(None, path.split(".")):
        config = config[name]
    return config


@pytest.mark.parametrize("path", list(sections(tiny_config())))
def test_an_unknown_field_of_a_config_is_refused_with_the_nearest_name(path):
    config = tiny_config()
    known = sorted(section(config, path))[0]
    section(config, path)[known + "x"] = 1
    full = f"{path}.{known}x".strip(".")
    with pytest.raises(UserError, match=rf"no field '{full}'; did you mean '\w+'\?"):
        Recipe.parse(config)


# Fields that recipes of the first build do not have, with what their absence means.
LATER = {"batch_ramp": BatchRamp(), "trackers": (), "scaling.guard": True, "parallel": "pmap"}


def test_every_field_must_be_there_but_those_that_came_later():
    for path in sections(tiny_config()):
        for name in section(tiny_config(), path):
            config = tiny_config()
            if path == "batch_ramp" or f"{path}.{name}".strip(".") in LATER:
                continue
            del section(config, path)[name]
            full = f"{path}.{name}".strip(".")
            with pytest.raises(UserError, match=rf"^config\.{full} is missing; it holds "):
                Recipe.parse(config)


@pytest.mark.parametrize("name", ["config", "hparams"])
def test_what_a_run_shows_as_json_does_not_change_the_run(name):
    run = resolve(tiny_config())
    before = json.dumps(run.to_json())
    shown = getattr(run, name)
    for value in shown.values():
        if isinstance(value, dict):
            value.clear()
    shown.clear()
    assert json.dumps(run.to_json()) == before


def test_a_run_is_frozen():
    run = resolve(tiny_config())
    for thing in (run, run.optimizer, run.schedule, run.data, run.model, run.report, run.scaled):
        field = dataclasses.fields(thing)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "config is missing"),
        ({"config": {}}, r"config\.optimizer is missing"),
        ({"batch_size": "16"}, r"config\.batch_size is '16'"),
        ({"scaling": 3}, r"config\.scaling is 3; it must be a section of fields"),
        ({"batch_size": 17}, "batch_size 17 is not divisible by micro_batch_size"),
        ({"widht": 3}, "no field 'widht'"),
    ],
)
def test_a_record_that_is_no_runs_is_refused_in_one_line(changes, message):
    content = {"config": resolve(tiny_config()).config}
    if "config" in changes:
        content = changes
    else:
        content["config"] |= changes
    with pytest.raises(UserError, match=message):
        ResolvedRun.from_json(content)
