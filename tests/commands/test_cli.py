"""The command line as a whole: one spelling, and no import of torch before a command needs it."""

import subprocess
import sys

import pytest

from sptnet.cli import COMMANDS


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["train"], ["evil"]])
def test_help_and_mistakes_in_arguments_import_no_torch(arguments):
    code = f"import sys; sys.argv[1:] = {arguments}\nfrom sptnet.cli import main\ntry:\n    main()\nfinally:\n"
    code += "    print('torch' in sys.modules, 'pydantic' in sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1] == "False False"
    assert ran.returncode == (0 if "--help" in arguments else 2)


@pytest.mark.parametrize("arguments", [["config", "cub"], ["train", "cub", "model.bakbone=dino"]])
def test_a_configuration_and_mistakes_in_it_import_no_torch(arguments):
    code = f"import sys; sys.argv[1:] = {arguments}\nfrom sptnet.cli import main\ncode = main()\n"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}print('torch' in sys.modules, code, file=sys.stderr)"],
        capture_output=True,
        text=True,
    )
    assert ran.stderr.splitlines()[-1] == f"False {0 if arguments[0] == 'config' else 2}"


def test_python_m_sptnet_is_the_same_command_line():
    script, module = (
        subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
        for command in ([f"{sys.prefix}/bin/sptnet"], [sys.executable, "-m", "sptnet"])
    )
    assert script == module
    assert all(name in script for name in COMMANDS)
