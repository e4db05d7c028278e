"""A command whose output nobody reads, or that is interrupted: one line, no traceback."""

import os
import signal
import subprocess
import sys
import time

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


def test_ctrl_c_is_one_line(tmp_path, digits):
    command = [*SPTNET, "kmeans", str(digits), str(tmp_path / "run"), "--image-size", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert [line for line in told.splitlines() if "image" not in line][-1:] == ["error: interrupted"]
    assert "Traceback" not in told
