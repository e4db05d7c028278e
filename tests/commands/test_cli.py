"""The command line as a whole: one spelling, and no import of torch before a command needs it."""

import subprocess
import sys

import pytest
from launching import loaded_by

from sptnet.cli import COMMANDS


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["train"], ["evil"]])
def test_help_and_mistakes_in_arguments_import_no_torch(arguments):
    code, loaded = loaded_by("sptnet.cli", arguments)
    assert not loaded
    assert code == (0 if "--help" in arguments else 2)


@pytest.mark.parametrize("arguments", [["config", "cub"], ["train", "cub", "model.bakbone=dino"]])
def test_a_configuration_and_mistakes_in_it_import_no_torch(arguments):
    code, loaded = loaded_by("sptnet.cli", arguments)
    assert "torch" not in loaded
    assert code == (0 if arguments[0] == "config" else 2)


def test_python_m_sptnet_is_the_same_command_line():
    script, module = (
        subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
        for command in ([f"{sys.prefix}/bin/sptnet"], [sys.executable, "-m", "sptnet"])
    )
    assert script == module
    assert all(name in script for name in COMMANDS)
