"""What pip installs: the library alone, the trainer with its recipes, the images apart."""

import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import bs_jax.scaling

ROOT = Path(__file__).resolve().parents[1]
IMAGES = Path("bs_jax/data/embedded")


def build(project, folder):
    """Build the wheel of a project as pip does, but with the build back end that is installed."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("library", "images")]
    projects = (ROOT, ROOT / IMAGES)
    return [build(project, folder) for project, folder in zip(projects, folders, strict=True)]


@pytest.fixture(scope="module")
def installed(wheels):
    """Folders with the unpacked wheels, which serve as site-packages do."""
    folders = [wheel.with_suffix("") for wheel in wheels]
    for wheel, folder in zip(wheels, folders, strict=True):
        zipfile.ZipFile(wheel).extractall(folder)
    return folders


def python(code, *folders, cwd):
    """Run code in a fresh process that imports from these folders first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_wheel_has_all_code_and_recipes_and_no_images(wheels):
    names = set(zipfile.ZipFile(wheels[0]).namelist())
    code = {str(path.relative_to(ROOT)) for path in ROOT.glob("bs_jax/**/*.py")}
    recipes = {f"bs_jax/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/*.py")}
    assert recipes
    assert {name for name in names if name.endswith(".py")} == code | recipes
    assert "bs_jax/py.typed" in names
    assert not [name for name in names if name.endswith(".gz")]
    assert wheels[0].stat().st_size < 1e6


def test_the_wheel_of_the_images_has_them_and_their_licence(wheels):
    names = {Path(name).name for name in zipfile.ZipFile(wheels[1]).namelist()}
    assert names >= {path.name for path in (ROOT / IMAGES).iterdir()} - {"pyproject.toml"}


def test_the_core_needs_jax_optax_and_numpy_alone(installed):
    [path] = installed[0].glob("*.dist-info/METADATA")
    metadata = email.message_from_string(path.read_text())
    assert metadata["Version"] == bs_jax.__version__
    needed = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert {re.split(r"\W", text)[0] for text in needed} == {"jax", "optax", "numpy"}


def test_accelerator_extras_want_the_same_jax():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [core] = [text for text in project["dependencies"] if text.startswith("jax")]
    for name in ("cuda12", "cuda13", "tpu"):
        assert project["optional-dependencies"][name] == [core.replace("jax", f"jax[{name}]")]


def test_every_extra_that_a_page_or_a_message_names_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [
        path
        for pattern in ("*.md", "*.toml", "Makefile", ".ci/run", "docs/**/*", "b*/**/*.py")
        for path in ROOT.glob(pattern)
        if path.is_file() and path.suffix not in (".png", ".csv", ".json")
    ]
    named = {
        extra
        for path in files
        for extras in re.findall(r"""(?:bs_jax|["'][.])\[([a-z0-9,]+)\]""", path.read_text())
        for extra in extras.split(",")
    }
    assert len(named) > 5
    assert named <= project["optional-dependencies"].keys()


def test_the_command_runs_from_any_folder(installed, tmp_path):
    code = f"""
import sys, bs_jax
from importlib.metadata import distribution
assert bs_jax.__file__.startswith({str(installed[0])!r})
[command] = distribution("bs_jax").entry_points.select(name="bs-jax")
sys.argv = ["bs-jax", "--dry_run", "--config=configs/imagenette.py", "--sweep=anchor"]
command.load()()
"""
    done = python(code, installed[0], cwd=tmp_path)
    assert "5 points" in done.stdout, done.stderr
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())


def test_without_the_trainers_packages_the_command_says_what_to_install(tmp_path):
    code = """
import sys
sys.modules["ml_collections"] = None
from bs_jax.cli.main import main
main()
"""
    done = python(code, ROOT, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(
        r"error: [^\n]*ml_collections[^\n]*pip install 'bs_jax\[trainer\]'.*\n", done.stderr
    )


def test_images_come_from_their_own_wheel(installed, tmp_path):
    code = f"""
import sys
from bs_jax.data.embedded import load_fashion_mnist_10k
from bs_jax.errors import UserError
try:
    load_fashion_mnist_10k()
except UserError as error:
    print(error)
sys.path.append({str(installed[1])!r})
print(len(load_fashion_mnist_10k().train))
"""
    done = python(code, installed[0], cwd=tmp_path)
    without, count = done.stdout.splitlines()
    assert "the images of fashion_mnist_10k are not in the wheel" in without
    assert (count, done.stderr) == ("8000", "")


def test_the_forge_tests_the_pythons_that_the_metadata_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r":: (3\.\d+)", "\n".join(project["classifiers"]))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["run"]["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"
    assert workflow["jobs"]["run"]["steps"][-1] == {"run": "bash .ci/run"}


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == bs_jax.__version__


def test_the_reference_names_every_public_name_of_the_library():
    text = (ROOT / "docs" / "reference.md").read_text()
    named = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith(":::")}
    assert set(bs_jax.scaling.__all__) <= named
