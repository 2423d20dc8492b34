"""A batch size that grows while training: sizes, numbers in force, resume, devices, refusals."""

import itertools
import json
import math

import jax
import numpy as np
import pytest
from helpers.training import PLAIN, rows, tiny_config, tiny_data, train, trainer_of
from hypothesis import given
from hypothesis import strategies as st

from bs_jax.errors import UserError
from bs_jax.recipe import Recipe
from bs_jax.records.run_folder import RunFolder
from bs_jax.run import ScaledWhileTraining
from bs_jax.sweep.plan import listing, plan_sweep
from bs_jax.sweep.points import Point, resolve
from bs_jax.training import step
from bs_jax.training.ramp import FollowNoise, Stages, planned_chunks
from bs_jax.training.train import Interrupted, Trainer

two_devices = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
STAGES = {
    "batch_size": 32,
    "train_examples": 160,
    "batch_ramp.kind": "stages",
    "batch_ramp.stages": ((0, 8), (0.3, 16), (96, 32)),
    "scaling.rule": "sqrt",
    "schedule.name": "constant",
    "ema_decay": 0.9,
    "checkpoint_every_examples": 48,
}
NOISE = PLAIN | {
    "batch_size": 64,
    "train_examples": 320,
    "batch_ramp.kind": "noise",
    "batch_ramp.share": 50.0,  # so that the few, noisy updates of a test let it grow
    "scaling.rule": "noise_aware",
    "checkpoint_every_examples": 48,
}


def sizes(found):
    return [(row["examples"], row["batch_size"]) for row in found]


class Whole:
    """A ramp that nobody disturbed."""

    def __init__(self, overrides, path):
        self.run = resolve(tiny_config(**overrides))
        self.trainer = trainer_of(self.run)
        self.path = path
        self.trainer.train([RunFolder(path, self.run)])
        self.rows = rows(path)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return Whole(STAGES, tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return Whole(NOISE, tmp_path_factory.mktemp("noise"))


@pytest.fixture(params=["stages", "noise"])
def whole(request):
    return request.getfixturevalue(request.param)


def test_given_stages_begin_at_the_first_update_past_their_start(stages):
    found = stages.rows
    # From 48 examples on 16 an update, from 96 on 32; a logging point every 32 examples.
    assert sizes(found) == [(32, 8), (48, 8), (64, 16), (96, 16), (128, 32), (160, 32)]
    assert [row["step"] for row in found] == [4, 6, 7, 9, 10, 11]
    assert [row["examples"] for row in found if "eval/loss" in row] == [96, 160]
    assert "batch_size" not in json.loads((stages.path / "summary.json").read_text())["final"]


def test_hyperparameters_follow_the_size_in_force(stages):
    found, run = stages.rows, stages.run
    config = tiny_config(**STAGES)
    base = config["optimizer"]["hyperparams"]
    for row in found:
        k = row["batch_size"] / 16
        if row["examples"] in (48, 96):  # windows that end at a change hold one size too
            assert row["optim/b1"] == pytest.approx(base["b1"] ** k, rel=1e-5)
        assert row["optim/learning_rate"] == pytest.approx(base["learning_rate"] * k**0.5, rel=1e-5)
    for size in run.batch_sizes:
        own = step.run_inputs(run, size).hyperparams
        assert float(own["bn_decay"]) == pytest.approx(config["bn_decay"] ** (size / 16))
        assert float(own["ema_decay"]) == pytest.approx(0.9 ** (size / 16))


@pytest.mark.long
def test_a_ramp_of_one_size_trains_as_that_size_does(tmp_path):
    """The numbers come another way, from the rule in each update: equal up to rounding."""
    # Of a schedule that bends, the library reads the line between two base-size updates.
    constant = {"batch_size": 32, "scaling.rule": "sqrt", "schedule.name": "linear"}
    one = {"batch_ramp.kind": "stages", "batch_ramp.stages": ((0, 32),)}
    wanted, found = train(tmp_path / "a", constant), train(tmp_path / "b", constant | one)
    for name in ("train/loss", "eval/loss", "optim/learning_rate"):
        np.testing.assert_allclose(
            [row[name] for row in found if name in row],
            [row[name] for row in wanted if name in row],
            rtol=1e-3,
        )


def test_the_batch_follows_the_noise_and_the_record_says_why(noise):
    found = noise.rows
    assert found[0]["batch_size"] == 16
    assert found[-1]["batch_size"] == 64
    for before, after in itertools.pairwise(found):
        high = before["noise_scale_high"]  # null: infinite
        assert before["noise_scale_low"] <= before["noise_scale"] <= (high or math.inf)
        grown = after["batch_size"] > before["batch_size"]
        low = before["noise_scale_low"]
        assert grown == (before["batch_size"] < 64 and 2 * before["batch_size"] <= 50 * low)


def stop_after(chunks):
    calls = iter(range(1000))
    return lambda: next(calls) + 1 >= chunks


def test_a_ramp_goes_on_to_the_same_bits_from_every_chunk(tmp_path, whole):
    """Interrupted at each chunk's end, changes of size among them."""
    changes = {b for a, b in itertools.pairwise(row["batch_size"] for row in whole.rows)}
    assert len(changes) > 1
    folder, interruptions = RunFolder(tmp_path, whole.run), 0
    while not folder.done:
        try:
            whole.trainer.train([folder], should_stop=stop_after(1))
        except Interrupted:
            interruptions += 1
    assert interruptions >= 2
    assert rows(folder.path) == whole.rows


class Killed(BaseException):
    """Stands for a signal that no handler sees: nothing is saved after it."""


def test_a_ramp_that_is_killed_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path, whole):
    changed = [
        after["examples"]
        for before, after in itertools.pairwise(whole.rows)
        if before["batch_size"] != after["batch_size"]
    ]
    assert len(changed) == 2
    folder = RunFolder(tmp_path, whole.run)

    def kill(event):
        if event["event"] == "progress" and event["examples"] >= changed[0]:
            changed.pop(0)
            raise Killed

    for _ in range(2):  # as soon as the first update of the new size is recorded
        with pytest.raises(Killed):
            whole.trainer.train([folder], kill)
    whole.trainer.train([folder])
    assert rows(folder.path) == whole.rows


@two_devices
def test_two_devices_agree_on_the_size_and_train_like_one(tmp_path, noise):
    grown = next(i for i, row in enumerate(noise.rows) if row["batch_size"] > 16)
    end = noise.rows[grown]["examples"]  # each further size would be another program to compile
    trainer = Trainer(noise.run, tiny_data(), jax.devices()[:2])
    trainer.train([RunFolder(tmp_path, noise.run)], until_examples=end)
    one, two = noise.rows[: grown + 1], rows(tmp_path)
    assert sizes(two) == sizes(one)
    losses = [[row["train/loss"] for row in found] for found in (one, two)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-3)


@pytest.mark.long
def test_checkpoints_and_streaming_do_not_move_a_change(tmp_path):
    pytest.importorskip("grain")
    plain = train(tmp_path / "plain", NOISE | {"checkpoint_every_examples": 0})
    often = {"checkpoint_every_examples": 48, "data.streamed": True}
    found = train(tmp_path / "often", NOISE | often)
    assert set(sizes(plain)) <= set(sizes(found))
    shared = [row for row in found if row["examples"] in {r["examples"] for r in plain}]
    assert [row["eval/loss"] for row in shared if "eval/loss" in row] == [
        row["eval/loss"] for row in plain if "eval/loss" in row
    ]


later_stages = st.lists(
    st.tuples(st.integers(1, 400), st.integers(1, 64)), max_size=4, unique_by=lambda pair: pair[0]
)


@given(later_stages, st.integers(1, 64))
def test_every_stage_begins_as_soon_as_an_update_ends_past_its_start(later, first):
    given_stages = ((0, first), *sorted(later))
    most = max(size for _, size in given_stages)
    run = resolve(
        tiny_config(
            batch_size=most, ghost_batch_size=0, micro_batch_size=1, train_examples=500,
            **{"batch_ramp.kind": "stages", "batch_ramp.stages": given_stages},
        )
    )  # fmt: skip
    chunks = list(planned_chunks(run))
    assert chunks[0].examples == 0
    for before, after in itertools.pairwise(chunks):
        assert (before.end, before.end_examples) == (after.start, after.examples)
    for chunk in chunks:
        wanted = Stages(given_stages).batch_size(chunk.examples, 0, float)
        assert chunk.batch_size == wanted
        inside = [s for s, _ in given_stages if chunk.examples < s <= chunk.end_examples]
        # No update of the old size begins past a start.
        assert all(chunk.end_examples - s < chunk.batch_size for s in inside)


@pytest.mark.parametrize("low", [math.nan, math.inf, -math.inf, 0.0])
def test_a_noise_scale_that_is_not_known_never_lets_the_batch_grow(low):
    ramp = FollowNoise((16, 32), share=1e9, every_examples=16)
    assert ramp.batch_size(16, 16, lambda: low) == 16
    assert ramp.batch_size(16, 16, lambda: 1.0) == 32
    assert FollowNoise((16, 32), share=0.5, every_examples=16).batch_size(16, 16, lambda: 63) == 16


def test_a_ramp_is_part_of_a_runs_name_only_where_it_is_on():
    off = resolve(tiny_config(batch_size=32))
    assert resolve(tiny_config(batch_size=32, **{"batch_ramp.share": 0.1})).run_id == off.run_id
    assert "batch_ramp" not in off.config
    on = resolve(tiny_config(**STAGES))
    assert on.run_id != resolve(tiny_config(**STAGES | {"batch_ramp.kind": "off"})).run_id
    assert isinstance(on.optimizer, ScaledWhileTraining)
    assert (on.bn_decay, on.scaled.values["bn_decay"]) == (0.9, pytest.approx(0.9**2))
    assert type(on).from_json(json.loads(json.dumps(on.to_json()))) == on
    without = tiny_config()
    del without["batch_ramp"]  # recipes of the first build have none
    assert resolve(without).run_id == resolve(tiny_config()).run_id


def test_the_listing_counts_the_updates_of_a_ramp():
    points = [
        Point("stages", STAGES),
        Point("noise", NOISE),
    ]
    text = listing(plan_sweep("ramps", tiny_config(), points))
    assert "11 " in text.splitlines()[1]
    assert "5+" in text.splitlines()[2]


MISTAKES = [
    ({"batch_ramp.kind": "stags"}, "did you mean 'stages'"),
    ({"batch_ramp.kind": "stages"}, r"begin at \[\] examples"),
    ({"batch_ramp.stages": ((8, 16), (16, 32))}, "the first with start 0"),
    ({"batch_ramp.stages": ((0, 16), (0.5, 16), (0.2, 32))}, "in order"),
    ({"batch_ramp.stages": ((0, 16), (192, 32))}, "the last begins at 192 examples"),
    ({"batch_ramp.stages": ((0, 16), (96, 64))}, "reach 64 and config.batch_size is 32"),
    ({"batch_ramp.stages": ((0, 16), (1.5, 32))}, "a list of pairs"),
    ({"batch_ramp.stages": ((0, 16), (96, 32.0))}, "a list of pairs"),
    ({"batch_ramp.stages": ((0, 10), (96, 32))}, "ghost_batch_size 4 does not divide"),
    ({"batch_ramp.kind": "noise", "batch_ramp.start": 64}, "above the largest batch size"),
    ({"batch_ramp.kind": "noise", "batch_ramp.growth": 1.0}, "growth above 1"),
    ({"batch_ramp.kind": "noise", "batch_ramp.share": 0.0}, "share above 0"),
    ({"batch_ramp.kind": "noise", "batch_ramp.start": 4}, "two micro-batches|does not divide"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_a_ramp_that_cannot_be_is_refused_in_one_line(overrides, message):
    kind = {"batch_ramp.kind": "stages"} if "batch_ramp.kind" not in overrides else {}
    own = {"batch_ramp.stages": ()} | kind | overrides
    config = tiny_config(**{"batch_size": 32, "scaling.rule": "noise_aware"} | own)
    with pytest.raises(UserError, match=message) as caught:
        resolve(config)
    assert "\n" not in str(caught.value)


@two_devices
def test_every_size_must_divide_by_the_devices():
    stages = {"batch_ramp.stages": ((0, 15), (96, 30)), "ghost_batch_size": 0}
    run = resolve(tiny_config(**STAGES | stages | {"batch_size": 30}))
    with pytest.raises(UserError, match="batch_size 15 is not divisible by 2 devices"):
        Trainer(run, tiny_data(), jax.devices()[:2])


def test_a_ramp_does_not_go_on_from_another_run(tmp_path):
    from bs_jax.training.carry_over import OtherRun

    run = resolve(tiny_config(**STAGES))
    other = OtherRun(tmp_path / "other", Recipe.parse(tiny_config(**STAGES)))
    with pytest.raises(UserError, match="begin a ramp with the run"):
        trainer_of(run).train([RunFolder(tmp_path / "new", run)], other_run=other)
