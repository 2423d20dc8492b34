"""The benchmarks run, at a size where they measure nothing, and write what the docs read."""

import argparse
import csv
import gzip
import importlib.util
import json
import time

import numpy as np
import pytest

from benchmarks import (
    _kernels,
    _programs,
    _workers,
    compiled,
    conv_forms,
    gpu,
    input,
    scaling,
    sweep_config,
    train_step,
    transform_overhead,
)
from bs_jax.sweep.points import resolve

_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
SMALL = ["--model=resnet4_patch", "--image_size=8", "--batch_size=4"]


def written(module, arguments, path):
    module.main([*arguments, f"--json={path}"])
    return json.loads(path.read_text())


def test_train_step_tells_its_share_of_the_peak(tmp_path):
    result = written(
        train_step, [*SMALL, "--rounds=2", "--steps=1", "--matmul=64"], tmp_path / "r.json"
    )
    assert result["programs"]["ours"]["seconds"] > 0
    assert result["share_of_peak"] == pytest.approx(
        result["flops_per_second"] / result["peak_flops_per_second"]
    )
    assert result["environment"]["versions"]["jax"]
    assert "ratio_torch_over_ours" not in result


@pytest.mark.long
def test_all_that_a_gpu_is_to_measure_runs_here(tmp_path, monkeypatch):
    tiny = gpu.Size(
        model="resnet4_patch",
        image_size=8,
        batch_sizes=(4,),
        steps=1,
        rounds=2,
        matmul=64,
        copied_floats=4096,
    )
    monkeypatch.setattr(gpu, "TINY", tiny)
    monkeypatch.setattr(gpu, "MODEL_FORMS", {"plain": gpu.MODEL_FORMS["XLA's plain forms"]})
    monkeypatch.setattr(gpu, "LAUNCH_FLAGS", {"bad": "--xla_no_such_flag=1"})
    monkeypatch.setattr(gpu, "KERNEL_FLAGS", {})
    arguments = ["--tiny", "--against=nothing", "--parts=steps,forms"]
    result = written(gpu, arguments, tmp_path / "sub" / "gpu.json")
    (step,) = result["steps"]
    assert step["roofline"]["bytes_per_step"] > 0
    assert step["images_per_second"] == pytest.approx(4 / step["programs"]["ours"]["seconds"])
    kernels = step["about_ours"]["kernels"]
    assert kernels["seconds"] == pytest.approx(
        sum(row["seconds"] for row in kernels["groups"].values())
    )
    (form,) = result["forms"]
    assert form["programs"]["ours"]["ratio"] == 1
    assert form["programs"]["all"]["rounds"] == 2
    assert "no_such_flag" in form["not_measured"]["bad"]


@pytest.mark.parametrize("change", gpu.RECIPE_FORMS.values(), ids=gpu.RECIPE_FORMS)
def test_what_the_recipe_adds_is_a_recipe(change):
    run = _programs.make_run("xresnet50", 128, 64, **change["overrides"])
    assert run.run_id != _programs.make_run("xresnet50", 128, 64).run_id


@pytest.mark.long
def test_runs_side_by_side_and_the_transform_are_measured_too(tmp_path, monkeypatch):
    transform = ("--model=resnet4_patch", "--image_size=8", "--batch_size=4", "--rounds=2")
    tiny = gpu.Size(
        matmul=64,
        copied_floats=4096,
        rounds=2,
        runs=(("resnet4_patch", 8, 4, (2,), 1),),
        transform=(transform, (*transform, "--no_such_flag")),
    )
    monkeypatch.setattr(gpu, "TINY", tiny)
    arguments = ["--tiny", "--against=nothing", "--parts=runs,transform"]
    result = written(gpu, arguments, tmp_path / "gpu.json")
    (row,) = result["runs"]
    assert set(row["images_per_second"]) == {"ours", "2 vmapped"}
    assert result["transform"][0]["results"]["against plain"]["static"]["ratio"] > 0
    assert "no_such_flag" in result["transform"][1]["not_measured"]


@pytest.mark.long
def test_the_transform_costs_the_same_updates_in_one_program_and_one_by_one():
    settings = {"batch_size": 4, "microbatches": 2, "devices": 1, "model": "gpt"}
    losses = []
    for steps, calls in ((1, 3), (3, 1)):
        problem = transform_overhead.Problem(argparse.Namespace(**settings, steps=steps))
        run = transform_overhead.make_step(problem, transform_overhead.CASES["invariant"])
        losses.append([float(run()) for _ in range(calls)][-1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_does_not_compile_in_time_is_ended_and_named(tmp_path):
    spec = {"kind": "ours", "model": "resnet4_patch"}
    with _workers.crew({"late": spec, "wrong": {"kind": "ours"}}, tmp_path) as crew:
        crew.start(["late", "wrong"])
        crew.wait(["late"], until=time.monotonic())
        crew.wait(["wrong"], until=time.monotonic() + 60)
        assert crew.able == []
        assert "not compiled in the 0 s" in crew.failures["late"]
        assert "KeyError" in crew.failures["wrong"]
        assert crew.turns(rounds=1, until=time.monotonic() + 1) == {}


def test_kernels_are_counted_by_what_they_do(tmp_path):
    """A card's streams alone count, an update's share of the trace, and bytes by the shapes."""
    program = """
HloModule jit_step
ENTRY %main {
  %x = bf16[4,2]{1,0} parameter(0)
  %loop.1 = (bf16[4,2]{1,0}, f32[2]{0}) fusion(%x), metadata={op_name="jvp(N)/BatchNorm_0/mul"}
  %conv.2 = (bf16[4,2], u8[0]) custom-call(%x, %x), custom_call_target="__cudnn$convBackwardFilter"
  %back.5 = bf16[4,2] fusion(%x), metadata={op_name="transpose(jvp(N))/block/BatchNorm_0/mul"}
  ROOT %add.3 = f32[2]{0} add(%y, %y), metadata={op_name="jit(f)/while/body/add"}
}
"""
    labels = {
        "jvp(N)/block/Conv_0/convert_element_type": "convolutions' casts and pads",
        "jvp(N)/block/convert_element_type": "activation, shortcut and pools, forward",
        "jvp(N)/block/BatchNorm_0/convert_element_type": "normalisation, forward",
    }
    for path, group in labels.items():
        line = f'  %fusion.9 = f32[2] fusion(%x), metadata={{op_name="{path}"}}'
        assert _kernels.instructions(line)["fusion.9"].group == group

    def named(kind, name, **ids):
        return {"ph": "M", "name": kind, "args": {"name": name}, **ids}

    def kernel(name, microseconds, pid, tid):
        return {"ph": "X", "pid": pid, "tid": tid, "dur": microseconds, "args": {"hlo_op": name}}

    events = [
        named("process_name", "/device:GPU:0", pid=1),
        named("thread_name", "Stream #7(Compute)", pid=1, tid=7),
        named("thread_name", "XLA Ops", pid=1, tid=8),
        named("process_name", "/host:CPU", pid=2),
        named("thread_name", "main", pid=2, tid=1),
        *[kernel("loop.1", 3, 1, 7), kernel("loop.1", 5, 1, 7), kernel("conv.2", 20, 1, 7)],
        *[kernel("add.3", 2, 1, 7), kernel("while.4", 99, 1, 7), kernel("back.5", 4, 1, 7)],
        *[kernel("loop.1", 99, 1, 8), kernel("loop.1", 99, 2, 1)],
        {"ph": "X", "pid": 1, "tid": 7, "dur": 6, "name": "add_3"},  # launched by a graph
        {"ph": "X", "pid": 1, "tid": 7, "dur": 1, "name": "sm90_xmma_wgrad_f32"},
    ]
    content = json.dumps({"traceEvents": events}).encode()
    (tmp_path / "perfetto_trace.json.gz").write_bytes(gzip.compress(content))
    found = _kernels.by_group(tmp_path, program, steps=2)
    assert found["seconds"] == pytest.approx(20.5e-6)
    assert list(found["groups"]) == [
        "convolution, kernels' gradient",
        "normalisation, forward",
        "optimizer, augmentation and the rest",
        "normalisation, backward",
        "convolution, unnamed",
    ]
    norm = found["groups"]["normalisation, forward"]
    assert (norm["seconds"], norm["kernels"]) == pytest.approx((4e-6, 1))
    assert norm["bytes"] == 16 + 16 + 8  # read, and written beside two float32
    assert "normalisation, forward" in _kernels.table(found)


def test_what_an_update_launches_is_counted_in_the_longest_loop():
    program = """
HloModule jit_step
%part.1 (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %sin.1 = f32[8]{0} sine(%a)
}
%draw.2 (d: (s32[])) -> (s32[]) {
  %d = (s32[]) parameter(0)
  ROOT %one.1 = s32[] add(%d, %d)
}
%turn.4 (u: (f32[8])) -> (f32[8]) {
  %u = (f32[8]{0}) parameter(0)
  %y.1 = f32[8]{0} get-tuple-element(%u), index=0
  %cos.1 = f32[8]{0} cosine(%y.1), backend_config={"estimated_cycles":"70"}
  ROOT %t.2 = (f32[8]{0}) tuple(%cos.1)
}
%body.3 (p: (f32[8])) -> (f32[8]) {
  %p = (f32[8]{0}) parameter(0)
  %x.1 = f32[8]{0} get-tuple-element(%p), index=0
  %dot.4 = f32[8]{0} dot(%x.1, %x.1)
  %call.5 = f32[8]{0} call(%dot.4), to_apply=%part.1
  %w.3 = (f32[8]{0}) while(%t.0), body=%turn.4, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %t.1 = (f32[8]{0}) tuple(%call.5)
}
ENTRY %main.9 (q: (f32[8])) -> (f32[8]) {
  %q = (f32[8]{0}) parameter(0)
  %w.1 = (f32[8]{0}) while(%q), condition=%c.1, body=%body.3
  ROOT %w.2 = (s32[]) while(%z), condition=%c.2, body=%draw.2
}
"""
    found = _kernels.in_an_update(program)
    assert (found["kernels"], found["bytes"]) == (5, 32 * 3 + 32 * 2 + 3 * 32 * 2)
    assert found["groups"]["matrix product"] == {"kernels": 1, "bytes": 96}
    assert found["cycles"] == 3 * 70
    assert _kernels.in_an_update("ENTRY %main () -> f32[] {\n}")["kernels"] == 0


def test_a_step_is_counted_for_a_device_without_running(tmp_path):
    flags = ["--device=cpu", "--model=resnet2_patch", "--image_size=8", "--batch_sizes=4"]
    (one,) = written(compiled, [*flags, "--runs=2"], tmp_path / "compiled.json")["programs"]
    assert one["kernels"] == sum(row["kernels"] for row in one["groups"].values()) > 0
    assert 0.4 * one["held_bytes"] < one["estimated_bytes"]  # as `memory` takes for granted
    assert {"convolution, forward", "matrix product"} & set(one["groups"])


def test_forms_that_do_not_fit_a_batch_size_are_left_out():
    flags = argparse.Namespace(
        batch_sizes="8,64", forms=True, model="resnet2_patch", image_size=8, dtype="float32", runs=0
    )
    names = [name for name, _ in compiled.forms(flags, compiled.target("cpu"))]
    assert "ghost batches of 16, 64" in names
    assert "ghost batches of 16, 8" not in names
    assert len(names) == len(set(names)) > 2 * len(gpu.MODEL_FORMS)


@pytest.mark.skipif(_PLUGIN, reason="JAX's plugin for CUDA is here")
def test_without_the_compiler_of_a_card_it_is_said_what_to_install():
    with pytest.raises(SystemExit, match=r"pip install 'bs_jax\[trainer,cuda13\]'"):
        compiled.main(["--device=h200"])


@pytest.mark.skipif(not _PLUGIN, reason="JAX's plugin for CUDA is not here")
def test_a_step_is_counted_for_a_card_that_is_not_here():
    flags = ["--device=h100", "--model=resnet2_patch", "--image_size=8", "--batch_sizes=4"]
    (one,) = compiled.main(flags)["programs"]
    assert one["kernels"] > 20


def test_without_a_gpu_the_gpu_benchmark_says_what_to_do():
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.main([])


@pytest.mark.long
def test_input_and_scaling_write_their_tables(tmp_path):
    result = written(
        input, [*SMALL, "--rounds=1", "--steps=1", "--chunks=2"], tmp_path / "input.json"
    )
    assert min(result["busy"].values()) > 0
    assert set(result["busy"]) == {"the page cache", "the disk"}
    assert result["images_per_second"]["needed by the training"] > 0
    result = written(scaling, [*SMALL, "--rounds=1", "--steps=1", "--runs=2"], tmp_path / "s.json")
    assert {"base", "batch_size 8", "image_size 16", "2 runs vmapped"} <= set(result["programs"])


def test_convolution_forms_are_timed_in_both_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(conv_forms, "CASES", {"small": [conv_forms.Case(1, 3, 2, 2)]})
    rows = written(conv_forms, ["--cases=small", "--rounds=1"], tmp_path / "c.json")["rows"]
    assert [row["pass"] for row in rows] == ["forward", "image gradient", "kernel gradient"]
    assert all(row["chosen"] in row["microseconds"] for row in rows)


def test_the_sweep_to_be_timed_is_sixteen_runs_of_four_programs():
    config = json.loads(sweep_config.get_config().to_json())
    runs = [resolve(config, point.overrides) for point in sweep_config.sweep_timed()]
    assert len({run.run_id for run in runs}) == 16
    assert {run.batch_size for run in runs} == {8, 16, 32, 64}


def test_a_rule_that_measures_follows_the_base_on_the_small_network(monkeypatch, tmp_path, capsys):
    from benchmarks import mlp  # which computes as it is imported

    short = {"BASE_UPDATES": 64, "KEYS": mlp.KEYS[:4], "RATES": np.array([4.0, 8.0])}
    for name, value in {**short, "SCALES": {4.0: 4}, "ARMS": ("sqrt", "invariant")}.items():
        monkeypatch.setattr(mlp, name, value)
    mlp.main(["--optimizers=sgd", f"--csv={tmp_path / 'rows.csv'}"])
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    off = {row["rule"]: abs(float(row["deviation"])) for row in rows}
    assert 0 < off["invariant"] < 0.1 * off["sqrt"]
    assert "| sgd, " in capsys.readouterr().out
