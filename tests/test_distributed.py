"""Processes that train one run: the same numbers as one process, and one end for all of them."""

import json
import signal

import jax.numpy as jnp
import pytest
from helpers.commands import finish, joined, lines, run, wait_for
from helpers.training import rows

from bs_jax.errors import UserError
from bs_jax.training import distributed

TRAIN = "--mode=train"


def assert_same_training(found, wanted):
    """Equal up to the order in which devices' numbers are added."""
    assert [row["examples"] for row in found] == [row["examples"] for row in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=2e-5), (name, ours["examples"])


def until_end(processes):
    return [finish(process) for process in processes]


@pytest.mark.processes
def test_a_run_in_two_processes_survives_the_loss_of_one(tmp_path):
    code, out = run(TRAIN, f"--workdir={tmp_path / 'one'}", devices=2)
    assert code == 0, out
    wanted = rows(tmp_path / "one")
    for number in range(4):  # on a busy machine the run may be over before it is hit
        workdir = tmp_path / f"two-{number}"
        with joined(2, TRAIN, f"--workdir={workdir}") as processes:
            assert wait_for(lambda at=workdir: lines(at / "metrics.jsonl") >= 2)
            processes[1].kill()
            code, out = finish(processes[0])
        if not (workdir / "DONE").exists():
            break
    assert code in (distributed.EXIT_LOST, -signal.SIGABRT), out  # or by JAX's own watch
    assert not (workdir / "DONE").exists()
    with joined(2, TRAIN, f"--workdir={workdir}") as processes:
        ends = until_end(processes)
    assert [code for code, _ in ends] == [0, 0], ends
    assert "eval/accuracy" in ends[0][1]
    assert "eval/accuracy" not in ends[1][1]  # one process reports
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["resumed_at_step"] > 0
    assert_same_training(rows(workdir), wanted)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("count", "devices", "flags"),
    [
        (4, 1, ()),
        (2, 2, ("--config.data.streamed=True",)),
        (
            2,
            1,
            (
                "--config.scaling.rule=noise_aware",
                "--config.batch_size=64",
                "--config.batch_ramp.kind=noise",
                "--config.batch_ramp.share=50.0",
                "--config.micro_batch_size=4",
            ),
        ),
        (
            4,
            1,
            (
                "--config.data.streamed=True",
                "--config.scaling.rule=invariant",
                "--config.batch_size=32",
                "--config.micro_batch_size=8",
            ),
        ),
    ],
)
def test_many_processes_train_like_one_with_as_many_devices(tmp_path, count, devices, flags):
    code, out = run(TRAIN, *flags, f"--workdir={tmp_path / 'one'}", devices=count * devices)
    assert code == 0, out
    with joined(count, TRAIN, *flags, f"--workdir={tmp_path / 'many'}", devices=devices) as many:
        ends = until_end(many)
    assert [code for code, _ in ends] == [0] * count, ends
    found = rows(tmp_path / "many")
    assert_same_training(found, rows(tmp_path / "one"))
    ramps = "--config.batch_ramp.kind=noise" in flags
    assert {row["batch_size"] for row in found} == (
        {16, 32, 64} if ramps else {found[0]["batch_size"]}
    )


@pytest.mark.processes
def test_a_signal_to_one_process_stops_all_and_other_numbers_of_them_go_on(tmp_path):
    code, out = run(TRAIN, f"--workdir={tmp_path / 'one'}", devices=4)
    assert code == 0, out
    workdir = tmp_path / "many"
    for count in (2, 4, 1):
        seen = lines(workdir / "metrics.jsonl")
        with joined(count, TRAIN, f"--workdir={workdir}", devices=4 // count) as processes:
            assert wait_for(lambda seen=seen: lines(workdir / "metrics.jsonl") >= seen + 2)
            processes[-1].terminate()
            ends = until_end(processes)
        assert [code for code, _ in ends] == [143] * count, ends
        assert json.loads((workdir / "summary.json").read_text())["status"] == "interrupted"
    with joined(2, TRAIN, f"--workdir={workdir}", devices=2) as processes:
        ends = until_end(processes)
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_training(rows(workdir), rows(tmp_path / "one"))


@pytest.mark.processes
def test_a_sweep_and_a_divergence_in_two_processes(tmp_path):
    recipe = ("--config=tests/faults/recipe.py", "--sweep=tiny")
    flags = ("--config.optimizer.hyperparams.learning_rate=1e30", f"--workdir={tmp_path}")
    with joined(2, *flags, recipe=recipe) as processes:
        ends = [finish(process, 400) for process in processes]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "Report:" in ends[0][1]
    statuses = [json.loads(p.read_text())["status"] for p in tmp_path.glob("runs/*/summary.json")]
    assert set(statuses) == {"diverged"}


@pytest.mark.processes
def test_an_error_of_one_process_ends_all(tmp_path):
    (tmp_path / "file").write_text("")
    with joined(2, TRAIN, f"--workdir={tmp_path / 'file' / 'below'}") as processes:
        ends = until_end(processes)
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("give a --workdir that can be written" in out for _, out in ends)


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "Slurm"),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # the batch script, outside srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1", "JAX_PLATFORMS": "tpu,cpu"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1", "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_PROCESS_ADDRESSES": "host-0:1,host-1:1"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "host-0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "host-0", "MEGASCALE_NUM_SLICES": "2"}, "Cloud TPU"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that stands alone
    ],
)
def test_clusters_are_told_by_their_variables(variables, kind):
    assert distributed.cluster_of(variables) == kind


@pytest.mark.parametrize(
    ("files", "there"),
    [
        ({}, False),
        ({"dev/accel0": ""}, True),
        ({"dev/vfio/vfio": "", "dev/vfio/3": "", "vendor": "0x1ae0"}, True),
        ({"dev/vfio/vfio": "", "dev/vfio/3": "", "vendor": "0x15b3"}, False),  # a network card
        ({"dev/vfio/vfio": "", "vendor": "0x1ae0"}, False),  # Google's own network card
    ],
)
def test_tpu_chips_are_told_by_their_devices(tmp_path, monkeypatch, files, there):
    folder = "sys/kernel/iommu_groups/3/devices/0000:00:05.0"
    for name, content in files.items():
        path = tmp_path / (f"{folder}/{name}" if name == "vendor" else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    found = distributed.has_tpu(tmp_path)
    assert found == there
    # On a TPU VM no variable tells of the other hosts; the metadata server does, if it is asked.
    monkeypatch.setattr(distributed, "has_tpu", lambda: found)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert distributed.cluster_of({}) == ("Cloud TPU" if there else None)
    for variables in ({"TPU_SKIP_MDS_QUERY": "1"}, {"JAX_PLATFORMS": "cuda,cpu"}):
        assert distributed.cluster_of(variables) is None
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    assert distributed.cluster_of({}) is None


def test_pods_of_an_indexed_job_need_the_kubernetes_package(monkeypatch):
    variables = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    for installed in (True, False):
        monkeypatch.setattr(
            distributed.importlib.util,
            "find_spec",
            lambda name, there=installed: (there or None) if name == "kubernetes" else None,
        )
        if installed:
            assert distributed.cluster_of(variables) == "Kubernetes"
        else:
            with pytest.raises(UserError, match=r"install 'jax\[k8s\]' or give --coordinator"):
                distributed.cluster_of(variables)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", None, None), "go together; given: h:1, None, None"),
        (("host", 2, 0), "coordinator_address is 'host'; give HOST:PORT"),
        (("host:99999", 2, 0), "give HOST:PORT"),
        (("host:1234", 2, 2), "process_id is 2 of --num_processes 2; number the processes from 0"),
        (("host:1234", 0, 0), "number the processes from 0 to 0"),
    ],
)
def test_impossible_numbers_of_processes_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize("auto", *given)
    with pytest.raises(UserError, match="--distributed=off excludes"):
        distributed.initialize("off", *given)


@pytest.mark.parametrize("first", [True, False])
def test_a_failure_of_process_0_reaches_all(monkeypatch, first):
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "is_first", lambda: first)
    told = b'{"failure": "process 0: OSError: no route"}'

    def broadcast(content):
        assert content == (told if first else b"{}")
        return told

    monkeypatch.setattr(distributed, "_broadcast", broadcast)

    def fails():
        assert first, "an action of process 0"
        raise OSError("no route")

    expected, message = (OSError, "^no route") if first else (RuntimeError, "^process 0: OSError")
    with pytest.raises(expected, match=message):
        distributed.on_first(fails)


def test_alone_there_is_nothing_to_agree_on():
    assert distributed.initialize("auto", environment={}) is False
    tree = {"a": jnp.ones(2)}
    assert distributed.arrays_of_first(tree) is tree
    with pytest.raises(UserError, match="mine"):
        distributed.on_first(lambda: (_ for _ in ()).throw(UserError("mine")))
