"""A command whose output nobody reads, or that is interrupted: one line, no traceback."""

import os
import signal
import subprocess
import sys

import pytest

SPTNET = [sys.executable, "-m", "sptnet"]


def test_output_that_nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([*SPTNET, "config"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (1, "error: whoever read the output has closed it\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_streams_that_are_closed(closed):
    shell = f"{' '.join(SPTNET)} config {closed}"
    ran = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert ran.returncode == 0
    assert ran.stderr == ""


WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in all that a script starts in the background
import torch
from sptnet import cli

def run(arguments):
    exec("print('ready', flush=True); time.sleep(60)", {"time": time})

cli.COMMANDS["report"].run = run
sys.argv[1:] = ["report", "RUN"]
cli.entry()
"""


def test_ctrl_c_is_one_line():
    """Also where it comes inside of an exec, behind which Python itself would end by the signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (130, "error: interrupted\n")


def test_what_a_terminal_cannot_print_is_written_out(tmp_path):
    """A path of other letters was a traceback when all the work was done."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [*SPTNET, "train", tmp_path / os.fsdecode(b"ma\xeftre-\xe9.yaml"), "run=x"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert ran.stderr.startswith("error: ")
    program = "import sys; from sptnet import cli; cli.main = lambda: print(sys.argv[1]) or 0; cli.entry()"
    command = [sys.executable, "-c", program, "é"]
    told = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (told.returncode, told.stdout) == (0, "\\xe9\n")
