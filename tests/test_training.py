"""The trainer: one golden step, equal results however the work is cut, resume, divergence."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from helpers.training import (
    PLAIN,
    counted_compilations,
    rows,
    tiny_config,
    tiny_data,
    train,
    trainer_of,
)

from bs_jax import models
from bs_jax.data import pipeline
from bs_jax.errors import UserError
from bs_jax.records.run_folder import RunFolder
from bs_jax.sweep.points import resolve
from bs_jax.training import checks, feed, step
from bs_jax.training.lanes import Lanes
from bs_jax.training.train import Interrupted, Trainer

two_devices = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")


def losses(found):
    return np.array([row["train/loss"] for row in found])


def test_one_step_is_the_textbook_update_on_the_first_examples_of_the_stream():
    """The first update, computed again with nothing but the model, jax.grad and optax."""
    config = resolve(tiny_config(**PLAIN))
    data = tiny_data()
    programs = step.make_programs(config, 3, data.train.image_shape, jax.devices()[:1])
    inputs = step.run_inputs(config)
    state = programs.init(inputs)
    order = pipeline.example_order(0, len(data.train), 0, 16)

    model = models.create("resnet2_patch", num_classes=3, ghost_batch_size=4)
    images = data.train.read(order).astype(np.float32) / 255
    images = (images - 0.3) / 0.3

    def loss_fn(params):
        logits, _ = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            bn_decay=0.9,
            mutable=["batch_stats"],
        )
        one_hot = jax.nn.one_hot(data.train.labels[order], 3)
        return optax.softmax_cross_entropy(logits, one_hot).mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(state.params)
    optimizer = optax.adamw(2e-3, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1)

    @jax.jit
    def updated(grads, params):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    wanted = updated(grads, state.params)

    resident = pipeline.device_arrays(data.train)
    after, metrics = programs.train_chunk(
        state, inputs, resident, np.int32(1), order.reshape(1, 1, 16)
    )
    np.testing.assert_allclose(metrics["train/loss"], [loss], rtol=1e-5)
    jax.tree.map(
        # Adam's first update is the sign of the gradient: compare where that is well defined.
        lambda got, want, g: np.testing.assert_allclose(
            np.where(abs(g) > 1e-5, got, 0), np.where(abs(g) > 1e-5, want, 0), atol=2e-6
        ),
        *jax.device_get((after.params, wanted, grads)),
    )
    assert int(after.step) == 1
    assert int(after.examples) == 16


def test_crops_know_the_shape_that_an_image_had_before_it_was_stored():
    config = resolve(tiny_config(**PLAIN, **{"data.crop_area": (0.35, 1.0)}))
    split = tiny_data().train
    programs = step.make_programs(config, 3, split.image_shape, jax.devices()[:1])
    inputs, order = step.run_inputs(config), np.arange(16).reshape(1, 1, 16)
    resident = pipeline.device_arrays(split)
    found = []
    for aspects in (resident[2], 2 * resident[2], resident[2]):
        data = (*resident[:2], aspects)
        _, metrics = programs.train_chunk(programs.init(inputs), inputs, data, None, order)
        found.append(float(metrics["train/loss"][0]))
    assert found[0] == found[2] != found[1]


def test_the_first_updates_of_a_filled_up_chunk_are_those_of_a_chunk_of_their_own():
    run, split = resolve(tiny_config()), tiny_data().train
    programs = step.make_programs(run, 3, split.image_shape, jax.devices()[:1])
    inputs, data = step.run_inputs(run), pipeline.device_arrays(split)
    order = np.arange(80, dtype=np.int32).reshape(1, 5, 16)
    filled, metrics = programs.train_chunk(programs.init(inputs), inputs, data, np.int32(3), order)
    wanted, rows = programs.train_chunk(programs.init(inputs), inputs, data, None, order[:, :3])
    jax.tree.map(np.testing.assert_array_equal, filled, wanted)
    for name, values in metrics.items():
        np.testing.assert_array_equal(values, [*rows[name], 0.0, 0.0])


def test_training_learns_and_records(tmp_path):
    length = {"train_examples": 960, "optimizer.hyperparams.learning_rate": 1e-2}
    found = train(tmp_path, {**length, "model.name": "resnet4_patch"})  # a network with a block
    assert found[-1]["eval/accuracy"] > 0.8
    assert losses(found)[-1] < 0.8 * losses(found)[0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["final"]["eval/accuracy"] == found[-1]["eval/accuracy"]
    assert (summary["step"], summary["examples"]) == (60, 960)
    assert (tmp_path / "DONE").exists()


@two_devices
def test_two_devices_train_like_one(tmp_path):
    one = train(tmp_path / "one")
    two = train(tmp_path / "two", devices=2)
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-3)
    # Evaluation is exact: 20 examples in batches of 8 over two devices, padded and masked.
    assert abs(one[-1]["eval/loss"] - two[-1]["eval/loss"]) < 5e-3


def test_accumulation_trains_like_the_whole_batch(tmp_path):
    whole = train(tmp_path / "whole")
    pieces = train(tmp_path / "pieces", {"micro_batch_size": 4})
    np.testing.assert_allclose(losses(pieces), losses(whole), rtol=2e-3)


def test_evaluation_does_not_depend_on_its_batch_size(tmp_path):
    # Of 20 examples, in batches one of which is padded, and in one batch that would hold more.
    parts, whole = (train(tmp_path / str(n), {"eval_batch_size": n})[-1] for n in (8, 1000))
    assert parts["eval/accuracy"] == whole["eval/accuracy"]
    assert parts["eval/loss"] == pytest.approx(whole["eval/loss"], rel=1e-5)


def test_streamed_data_give_the_same_numbers_as_resident(tmp_path):
    pytest.importorskip("grain")
    resident = train(tmp_path / "resident")
    streamed = train(tmp_path / "streamed", {"data.streamed": True})
    shared = [row for row in streamed if row["examples"] in {r["examples"] for r in resident}]
    assert losses(shared).tolist() == losses(resident).tolist()


def test_data_that_do_not_fit_on_the_device_are_streamed(monkeypatch):
    made_of = resolve(tiny_config()), tiny_data(), jax.devices()[:1], Lanes(False)
    assert not feed.Feed(*made_of).streamed
    monkeypatch.setattr(feed, "_RESIDENT_SHARE", 0.0)
    assert feed.Feed(*made_of).streamed


RULES = ["none", "noise_aware", "invariant"]
# `invariant` measures and carries the most; the others take the same way. Those are interrupted in
# the tests below (`none`) and in test_ramp.py (`noise_aware`).
ONE_AND_ALL = [
    rule if rule == "invariant" else pytest.param(rule, marks=pytest.mark.long) for rule in RULES
]


@pytest.fixture(scope="module", params=ONE_AND_ALL)
def side_by_side(request, tmp_path_factory):
    """The folders of three finished runs that one program advanced, three chunks of it."""
    shape = {"scaling.rule": request.param, "batch_size": 32, "train_examples": 288}
    runs = [resolve(tiny_config(**shape, ema_decay=0.9, seed=seed)) for seed in (0, 1, 2)]
    path = tmp_path_factory.mktemp(request.param)
    folders = [RunFolder(path / str(run.seed), run) for run in runs]
    trainer_of(runs[0], vmapped=True).train(folders)
    return folders


def begun_again(folders, path):
    """The same runs, untrained."""
    return [RunFolder(path / str(folder.run.seed), folder.run) for folder in folders]


def test_vmapped_runs_equal_looped_ones(tmp_path, side_by_side):
    looped = begun_again(side_by_side, tmp_path)
    trainer_of(looped[0].run).train(looped)
    found, wanted = (
        [losses(rows(folder.path)) for folder in folders] for folders in (side_by_side, looped)
    )
    np.testing.assert_allclose(found, wanted, rtol=5e-3)
    assert not np.allclose(wanted[0], wanted[1], rtol=1e-3)  # two seeds, two runs


def stop_after(chunks):
    calls = iter(range(1000))
    return lambda: next(calls) + 1 >= chunks


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, side_by_side):
    run = side_by_side[0].run
    trainer = trainer_of(run)
    whole, parts = RunFolder(tmp_path / "whole", run), RunFolder(tmp_path / "parts", run)
    trainer.train([whole])
    with pytest.raises(Interrupted):
        trainer.train([parts], should_stop=stop_after(1))
    assert parts.summary().status == "interrupted"
    assert not parts.done
    trainer.train([parts])
    assert parts.summary().resumed_at_step == 3
    assert_same_records(parts, whole)


def assert_same_records(folder, other):
    one, two = ((f.path / "metrics.jsonl").read_text() for f in (folder, other))
    assert one == two


def test_interrupted_runs_side_by_side_go_on_to_the_same_bits(tmp_path, side_by_side):
    parts = begun_again(side_by_side, tmp_path)
    trainer = trainer_of(parts[0].run, vmapped=True)
    with pytest.raises(Interrupted):
        trainer.train(parts, should_stop=stop_after(1))
    assert {part.summary().status for part in parts} == {"interrupted"}
    trainer.train(parts)
    for part, whole in zip(parts, side_by_side, strict=True):
        assert part.summary().resumed_at_step == 3
        assert_same_records(part, whole)


def test_vmapped_runs_meet_at_a_step_that_all_have_and_keep_their_lanes(tmp_path, side_by_side):
    """One run is ahead by a checkpoint, one has finished: what is left has the same bits."""
    parts = begun_again(side_by_side, tmp_path)
    trainer = trainer_of(parts[0].run, vmapped=True)
    with pytest.raises(Interrupted):
        trainer.train(parts, should_stop=stop_after(2))
    newest = max(int(path.name) for path in (parts[0].path / "checkpoints").iterdir())
    shutil.rmtree(parts[1].path / "checkpoints" / str(newest))
    shutil.rmtree(parts[2].path)
    shutil.copytree(side_by_side[2].path, parts[2].path)
    assert parts[2].done
    with counted_compilations() as found:
        trainer.train(parts)
    assert not found  # a program of two lanes would be another one
    assert parts[0].summary().resumed_at_step == parts[1].summary().resumed_at_step == 3
    for part, whole in zip(parts, side_by_side, strict=True):
        assert_same_records(part, whole)


def test_epochs_without_their_remainder_go_on_to_the_same_bits(tmp_path, monkeypatch):
    """Epochs of 4 updates of 20 examples from 96; the 16 left over are others each time."""
    taken = []

    def recording(*args, **kwargs):
        taken.append(example_order(*args, **kwargs))
        return taken[-1]

    example_order = pipeline.example_order
    monkeypatch.setattr(pipeline, "example_order", recording)
    lengths = {"train_examples": 0, "train_epochs": 2.0, "data.train_size": 96}
    config = tiny_config(batch_size=20, drop_remainder=True, eval_every_examples=40, **lengths)
    config["checkpoint_every_examples"] = 40  # every chunk of two updates: one program
    run = resolve(config)
    assert run.train_examples == 160
    trainer = Trainer(run, tiny_data(), jax.devices()[:1])
    trainer.train([RunFolder(tmp_path / "whole", run)])
    order = np.concatenate(taken)
    first, second = set(order[:80].tolist()), set(order[80:].tolist())
    assert len(first) == len(second) == 80
    assert first != second
    folder = RunFolder(tmp_path / "parts", run)
    with pytest.raises(Interrupted):
        trainer.train([folder], should_stop=stop_after(3))
    trainer.train([folder])
    assert folder.summary().resumed_at_step == 6  # in the second epoch
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert rows(tmp_path / "whole")[-1]["examples"] == 160


def test_another_number_of_examples_than_the_config_says_is_refused():
    config = resolve(tiny_config(**{"data.train_size": 100}))
    with pytest.raises(UserError, match=r"train_size is 100 but .* has 96 training examples"):
        Trainer(config, tiny_data(), jax.devices()[:1])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    whole = train(tmp_path / "whole", {"train_examples": 288})
    run = resolve(tiny_config(train_examples=288))
    folder = RunFolder(tmp_path / "damaged", run)
    trainer = trainer_of(run)
    with pytest.raises(Interrupted):
        trainer.train([folder], should_stop=stop_after(2))
    newest = max((folder.path / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    trainer.train([folder])
    assert "trying the previous one" in caplog.text
    assert rows(folder.path) == whole
    assert 0 < folder.summary().resumed_at_step < int(newest.name)


def test_divergence_is_a_result(tmp_path):
    found = train(tmp_path, {"optimizer.hyperparams.learning_rate": 1e30})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged"
    assert summary["diverged_at_step"] is not None
    assert summary["final"] == {}
    assert found[-1]["train/loss"] is None
    assert (tmp_path / "DONE").exists()


def test_a_finished_run_is_not_trained_again(tmp_path):
    train(tmp_path)
    before = (tmp_path / "summary.json").read_bytes()
    train(tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == before


def test_a_run_that_was_killed_before_it_was_marked_done_ends(tmp_path):
    train(tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    for name in ("DONE", "summary.json"):
        (tmp_path / name).unlink()
    train(tmp_path)
    assert (tmp_path / "DONE").exists()
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_the_data_do_not_fit_the_batch(tmp_path):
    with pytest.raises(UserError, match=r"batch_size 128 is larger than the training set of 96"):
        train(tmp_path, {"batch_size": 128, "train_examples": 256})


@two_devices
def test_the_batch_does_not_divide_by_the_devices(tmp_path):
    with pytest.raises(UserError, match=r"batch_size 15 is not divisible by 2 devices; use 14 or"):
        train(tmp_path, {"batch_size": 15, "ghost_batch_size": 0}, devices=2)


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ({}, 4),  # 16 examples in ghost batches of 4
        ({"batch_size": 15, "ghost_batch_size": 0}, 5),
        ({"batch_size": 32, "scaling.rule": "invariant"}, 2),  # in micro-batches of 16
        ({"batch_size": 13, "ghost_batch_size": 0}, 1),
        ({"batch_size": 32, "ghost_batch_size": 0}, 8),
    ],
)
def test_a_sweep_takes_as_many_devices_as_a_batch_can_be_split_among(overrides, most):
    run = resolve(tiny_config(**overrides))
    assert checks.most_devices(run, 8) == most
    checks.check_devices(run, most)
