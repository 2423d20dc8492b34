"""The benchmarks run, at a size where they measure nothing, and write what the docs read."""

import json

import pytest

from benchmarks import conv_forms, gpu, input, scaling, sweep_config, train_step
from bs_jax.sweep.points import resolve

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


def test_all_that_a_gpu_is_to_measure_runs_here(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu, "TINY", gpu.Size("resnet4_patch", 8, (4,), 1, 2, 2, matmul=64, copied_floats=4096)
    )
    result = written(
        gpu, ["--tiny", "--dtype=bfloat16", "--against=nothing"], tmp_path / "sub" / "gpu.json"
    )
    (step,) = result["steps"]
    assert step["dtype"] == "bfloat16"
    assert step["roofline"]["bytes_per_step"] > 0
    assert [row["runs"] for row in result["side_by_side"]] == [1, 2]
    assert result["recipe_minutes"]["4"] > 0


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


def test_the_peers_networks_are_ours(monkeypatch):
    """The same number of parameters: a ratio between different networks would say nothing."""
    pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'bs_jax[bench]'")
    import jax
    import jax.numpy as jnp

    from benchmarks import torch_models
    from bs_jax import models

    for name in ("resnet18", "xresnet18", "xresnet50"):
        peer = torch_models.create(name, 10)
        module = models.create(name, num_classes=10)
        shapes = jax.eval_shape(
            lambda m=module: m.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
        )
        ours = models.count_parameters(shapes["params"])
        assert ours == sum(parameter.numel() for parameter in peer.parameters())
