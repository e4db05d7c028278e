"""What a wheel brings: the commands, the published configurations by name, and no general name."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The project installed from its wheel, without its dependencies, which this environment has."""
    source, out = tmp_path_factory.mktemp("source") / "sptnet", tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("sptnet", "shards", "configs", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", out, source], check=True)
    (wheel,) = out.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", out / "site", wheel], check=True)
    return wheel, out / "site"


def test_it_claims_no_general_name(installed):
    names = {name.split("/")[0] for name in zipfile.ZipFile(installed[0]).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"sptnet", "sptnet_shards"}
    assert "sptnet/py.typed" in zipfile.ZipFile(installed[0]).namelist()
    drawn_by = {"report/page.html.j2", "report/page.css", "report/page.js", "export/card.md.j2"}
    assert {f"sptnet/{name}" for name in drawn_by} <= set(zipfile.ZipFile(installed[0]).namelist())


def test_its_commands_work_in_an_empty_folder(installed, tmp_path):
    site = installed[1]

    def run(*command):
        environment = os.environ | {"PYTHONPATH": str(site)}
        ran = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert str(site) in run("-c", "import sptnet, sptnet_shards.make_shards; print(sptnet.__file__)")
    assert "root: data/cub" in run(site / "bin" / "sptnet", "config", "cub")
    launch = run(site / "bin" / "sptnet", "config", "--path", "launch/ddp").strip()
    assert Path(launch).is_relative_to(site)
    assert Path(launch).read_text() == (ROOT / "launch" / "ddp.yaml").read_text()
    assert "366 labelled" in run(site / "bin" / "sptnet-shards", "digits", "data/digits")
    assert (tmp_path / "data" / "digits" / "manifest.json").exists()


def test_what_is_published_as_source_is_the_project(tmp_path):
    """The README's commands need these, and so do the tests."""
    made = {"runs", "data", "build", "dist"}

    def ignored(folder: str, names: list[str]) -> set[str]:
        hidden = {name for name in names if name.startswith(".") or name.endswith((".egg-info", "__pycache__"))}
        return hidden | (made if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_sdist('out')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True)
    (archive,) = (tmp_path / "source" / "out").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    expected = ["Makefile", "constraints.txt", "CHANGELOG.md", "slurm/cub.sbatch", "slurm/seeds.sh", "docs/plan.md",
                "launch/slurm_node.sh", "shards/README.md", "tests/conftest.py", "benchmarks/steps.py"]  # fmt: skip
    assert not set(expected) - names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "reference").rglob("*.py")} <= names
