"""The manifests of docs/cluster: they parse, and hold what their readers require."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import commands

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "cluster"
SCRIPTS = sorted([*FOLDER.glob("*.sbatch"), *FOLDER.glob("*.sh")])
MANIFESTS = sorted(FOLDER.glob("*.yaml"))


def documents(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def main_commands(text):
    """The flags of every call of main.py in a text."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [shlex.split(found)[0:] for found in re.findall(r"main\.py ([^|\n'>]*)", joined)]


def test_all_are_there():
    assert len(SCRIPTS) == 3
    assert len(MANIFESTS) == 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "set -euo pipefail" in text


@pytest.mark.parametrize("name", ["slurm_one_run.sbatch", "slurm_sweep.sbatch"])
def test_slurm_jobs_ask_for_what_they_need(name):
    text = (FOLDER / name).read_text()
    header = text.split("set -euo")[0]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", header, re.M))
    assert {"job-name", "time", "requeue", "signal", "open-mode"} <= set(options)
    assert {"nodes", "ntasks"} & set(options)
    assert "TERM@60" in options["signal"]


def pods(spec, path=""):
    """Every pod template in a manifest."""
    if isinstance(spec, dict):
        if "template" in spec:
            yield spec["template"]["spec"]
        for value in spec.values():
            yield from pods(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from pods(value)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_name_their_kind_and_mount_what_they_use(path):
    found = documents(path.name)
    for document in found:
        assert {"apiVersion", "kind", "metadata", "spec"} <= set(document)
        assert re.fullmatch(r"[a-z0-9-]{1,50}", document["metadata"]["name"])
    templates = [pod for document in found for pod in pods(document)]
    assert templates
    for pod in templates:
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {"name", "image", "resources"} <= set(container)
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["limits"]["memory"]


def test_the_ray_job_has_a_head_and_workers():
    (job,) = documents("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert "--launcher=ray" in job["spec"]["entrypoint"]
    assert cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert {"groupName", "rayStartParams", "template"} <= set(group)


def test_the_indexed_job_numbers_its_processes():
    service, job = documents("indexed_job.yaml")
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    count = job["spec"]["completions"]
    (text,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"--num_processes={count} " in text
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--coordinator_address={host}:8476" in text
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["parallelism"] == count


def test_every_flag_that_is_shown_exists():
    _, helped = commands.run("--helpfull", recipe=())
    known = set(re.findall(r"^\s+--(?:\[no\])?([\w.]+):", helped, re.M))
    texts = [path.read_text() for path in (*SCRIPTS, *MANIFESTS, ROOT / "docs" / "cluster.md")]
    for text in texts:
        for command in main_commands(text):
            for word in command:
                if word.startswith("--") and not word.startswith("--config"):
                    assert word.removeprefix("--").split("=")[0] in known, word
