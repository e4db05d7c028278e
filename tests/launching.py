"""The command that users start runs with, and what commands leave: what a run has told, the files of a folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
ENVIRONMENT = dict(os.environ)


def launcher(strategy, processes, precision="no"):
    """The command up to `-m sptnet train`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/launch/{strategy}.yaml"]
    command += ["--num_processes", str(processes), "--mixed_precision", precision]
    return command + (["--main_process_port", "0"] if processes > 1 else [])


def heeding_signals():
    """For `preexec_fn`: what a terminal starts heeds SIGINT and SIGHUP, also where the tests run in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def losses(run, steps):
    """Of every step of a run of so many, in order and each told once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if "phase" in line]
    assert [line["step"] for line in told] == list(range(steps))
    return np.array([line["total"] for line in told])


def contents(folder):
    """Bytes of all files in a folder and below it, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def loaded_by(command_line, arguments):
    """Exit code of `command_line.main(arguments)` in a process of its own, and the slow packages that it has loaded."""
    code = f"""
import sys
from {command_line} import main
try:
    code = main({arguments!r})
except SystemExit as end:
    code = end.code
print(code, *({{'torch', 'pydantic', 'scipy', 'sklearn'}} & sys.modules.keys()), file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    code, *loaded = ran.stderr.splitlines()[-1].split()
    return int(code), set(loaded)
