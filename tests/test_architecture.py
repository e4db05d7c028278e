"""A folder of the code says in its docstring what is in it: nothing that is there is left out."""

import re
import subprocess
import sys
import tomllib

import pytest
from launching import ROOT

SAID_BY_ITS_NAME = {"sptnet/commands"}  # a file per command
FOLDERS = sorted(
    str(found.parent.relative_to(ROOT))
    for top in ("sptnet", "shards")
    for found in (ROOT / top).rglob("__init__.py")
    if found.parent != ROOT / "sptnet"  # docs/architecture.md has that one
)


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name not in SAID_BY_ITS_NAME])
def test_a_folder_names_what_is_in_it(folder):
    told = (ROOT / folder / "__init__.py").read_text()
    there = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert {name for name in there if not re.search(rf"\b{name}\b", told)} == set()


@pytest.mark.parametrize("folder", ["shards", "benchmarks", "tests", "tests/multiprocess"])
def test_no_file_beside_a_script_hides_a_module_of_pythons(folder):
    """`python shards/make_shards.py` found a `numbers.py` of ours where numpy wants Python's."""
    there = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there & sys.stdlib_module_names == set()


def test_the_command_of_the_readme_runs_as_a_script():
    ran = subprocess.run([sys.executable, "shards/make_shards.py", "digits", "--help"], cwd=ROOT, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]


def test_the_document_names_what_is_at_the_top():
    told = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    there = {path.name for path in (ROOT / "sptnet").glob("*.py")}
    there |= {f"{path.parent.name}/" for path in (ROOT / "sptnet").glob("*/__init__.py")}
    assert {name for name in there - {"__init__.py"} if name not in told} == set()


def test_shards_are_forbidden_all_that_is_not_the_format_and_images():
    may_know = {
        "sptnet", "sptnet.errors", "sptnet.names", "sptnet.data",
        *(f"sptnet.data.{name}" for name in ("exif", "format", "image", "keyed", "sheet")),
    }  # fmt: skip
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (forbidden,) = (
        set(contract["forbidden_modules"])
        for contract in contracts
        if contract.get("source_modules") == ["sptnet_shards"]
    )
    there = {f"sptnet.{path.stem}" for path in (ROOT / "sptnet").iterdir() if path.suffix == ".py" or path.is_dir()}
    there |= {f"sptnet.data.{path.stem}" for path in (ROOT / "sptnet" / "data").iterdir()}
    there = {name for name in there if not name.endswith(("__init__", "__pycache__"))}
    assert there - forbidden <= may_know
