"""Where metrics go beside the records: each tracker told what it should be, also after a kill."""

import csv
import importlib.machinery
import json
import struct
import sys
import types

import pytest
from helpers.training import tiny_config, trainer_of

from bs_jax.errors import UserError
from bs_jax.records.run_folder import RunFolder
from bs_jax.sweep.points import resolve
from bs_jax.training import trackers
from bs_jax.training.train import Interrupted

LONG = {"train_examples": 288}  # three chunks, each with three rows


def run_of(**overrides):
    return resolve(tiny_config(**LONG, **overrides))


def interrupted_and_resumed(folder, run):
    trainer = trainer_of(run)
    calls = iter(range(9))
    with pytest.raises(Interrupted):
        trainer.train([RunFolder(folder, run)], should_stop=lambda: next(calls) >= 1)
    trainer.train([RunFolder(folder, run)])


def shown(folder):
    """The steps of train/loss that TensorBoard shows: a session's start drops those from it on."""
    from tensorboardX.proto import event_pb2

    steps = []
    for path in sorted(folder.glob("events*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event()
            event.ParseFromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log") and event.session_log.status == 1:
                steps = [step for step in steps if step < event.step]
            if any(value.tag == "train/loss" for value in event.summary.value):
                steps.append(event.step)
    return steps


def test_tensorboard_shows_every_row_of_a_run_that_was_interrupted(tmp_path):
    interrupted_and_resumed(tmp_path, run_of(tensorboard=True))
    assert shown(tmp_path / "tensorboard") == list(range(32, 289, 32))


def test_a_run_that_goes_on_within_a_second_keeps_what_tensorboard_has(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.7e9)  # the files are named by it
    for examples in (0, 96, 1056):
        tracker = trackers.TensorBoard(run_of(), tmp_path, examples)
        tracker.log(examples + 32, {"train/loss": 1.0})
        tracker.log(examples + 64, {"train/loss": 1.0})
        tracker.flush()
        tracker.close()
    assert shown(tmp_path / "tensorboard") == [32, 64, 128, 160, 1088, 1120]


def test_the_csv_file_holds_every_row(tmp_path):
    interrupted_and_resumed(tmp_path, run_of())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    with open(tmp_path / "metrics.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [int(row["examples"]) for row in found] == [row["examples"] for row in rows]
    assert [row["eval/accuracy"] != "" for row in found] == ["eval/accuracy" in r for r in rows]
    assert float(found[-1]["train/loss"]) == rows[-1]["train/loss"]


class Service:
    """Stands for W&B and MLflow: keeps what it is told."""

    def __init__(self, fails=False):
        self.started, self.rows, self.ended, self.fails = [], [], 0, fails

    def modules(self):
        service = self

        class Run:
            def log(self, values, step):
                if service.fails:
                    raise ConnectionError("no network")
                service.rows.append((step, values))

            def finish(self):
                service.ended += 1

        def init(**settings):
            service.started.append(settings)
            return Run()

        class Client:
            def get_experiment_by_name(self, name):
                return types.SimpleNamespace(experiment_id="7") if service.started else None

            def create_experiment(self, name):
                return "7"

            def search_runs(self, experiments, query):
                same = [one for one in service.started if one["tags"]["bs_jax.run"] in query]
                return [types.SimpleNamespace(info=types.SimpleNamespace(run_id="r")) for _ in same]

            def create_run(self, experiment, tags, run_name):
                service.started.append({"tags": tags, "name": run_name})
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

            def log_dict(self, run_id, content, file):
                assert content["batch_size"]

            def log_batch(self, run_id, metrics):
                service.rows.append((metrics[0].step, {m.key: m.value for m in metrics}))

            def set_terminated(self, run_id):
                service.ended += 1

        class Metric:
            def __init__(self, key, value, timestamp, step):
                self.key, self.value, self.step = key, value, step

        return {
            "wandb": {"init": init},
            "mlflow": {"MlflowClient": Client},
            "mlflow.entities": {"Metric": Metric},
        }


@pytest.fixture
def service(monkeypatch):
    found = Service()
    for name, content in found.modules().items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_is_told_every_row_of_one_run_across_an_interruption(tmp_path, service, name):
    run = run_of(trackers=(name,))
    interrupted_and_resumed(tmp_path, run)
    assert [step for step, _ in service.rows] == list(range(32, 289, 32))
    assert all("train/loss" in values and "examples" not in values for _, values in service.rows)
    assert service.ended == 2
    assert all(one["name"] == run.run_id for one in service.started)
    # W&B is given the same id again; MLflow finds the run by its tag.
    identities = {one.get("id", one.get("tags", {}).get("bs_jax.run")) for one in service.started}
    assert len(identities) == 1
    assert len(service.started) == {"wandb": 2, "mlflow": 1}[name]


def test_a_service_that_fails_costs_a_warning_and_not_the_run(tmp_path, service, caplog):
    service.fails = True
    interrupted_and_resumed(tmp_path, run_of(trackers=("wandb",)))
    assert (tmp_path / "DONE").exists()
    assert "tracker wandb fails (ConnectionError: no network)" in caplog.text


def test_trackers_do_not_change_what_a_run_is():
    assert run_of(trackers=("wandb",)).run_id == run_of(tensorboard=True).run_id == run_of().run_id


def test_an_unknown_or_missing_tracker_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"unknown tracker in config.trackers 'wand'; did you mean"):
        trackers.check([run_of(trackers=("wand",))])
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", (trackers.MLflow, "no_such_package"))
    with pytest.raises(UserError, match="not installed; run pip install no_such_package"):
        trackers.check([run_of(trackers=("mlflow",))])
