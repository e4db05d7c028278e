"""Commands of a journey are stopped once, waited for, and gone when the journey is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import heeding_signals

from sptnet.discover import children
from sptnet.discover.children import Children, StageError, StoppedError, shown

# a command that takes a moment to end when asked, counts how often it is, and says so
SLOW = """
import signal, sys, time
from pathlib import Path
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
Path(sys.argv[1], "began").write_text(str(__import__("os").getpid()))
while not asked:
    time.sleep(0.01)
time.sleep(0.5)
Path(sys.argv[1], "asked").write_text(str(len(asked)))
sys.exit(75)
"""
JOURNEY = """
import sys
from pathlib import Path
from sptnet.discover.children import Children
with Children(Path(sys.argv[1])) as children:
    children.run([sys.executable, "-c", sys.argv[2], sys.argv[1]], {})
"""


def started(tmp_path, before=heeding_signals):
    command = [sys.executable, "-c", JOURNEY, str(tmp_path), SLOW]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=before)
    until((tmp_path / "began").exists)
    return process


def until(so, seconds=60):
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_every_signal_goes_on_as_one_and_is_waited_for(tmp_path, number):
    process = started(tmp_path)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert (tmp_path / "asked").read_text() == "1"
    assert f"asked to stop by {number.name}; the same command goes on" in told


def test_two_signals_are_one(tmp_path):
    """As of a terminal that closes, or of somebody in a hurry: two would end a training without a checkpoint."""
    process = started(tmp_path)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    process.communicate(timeout=60)
    assert (tmp_path / "asked").read_text() == "1"


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path):
    process = started(tmp_path, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    assert not (tmp_path / "asked").exists()
    process.terminate()
    process.communicate(timeout=60)


def test_a_killed_journey_takes_its_command_along_and_the_next_waits_for_it(tmp_path):
    process = started(tmp_path)
    process.kill()
    process.wait()
    begin = time.monotonic()
    with Children(tmp_path):
        # the lock came free when the command had ended as it was asked to
        assert (tmp_path / "asked").read_text() == "1"
    assert time.monotonic() - begin < 30


def test_two_at_once_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "PATIENCE", 0.3)
    process = started(tmp_path)
    with pytest.raises(StageError, match="is in use by another"), Children(tmp_path):
        pass
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    process.terminate()
    process.communicate(timeout=60)


def test_how_a_command_ends_is_told(tmp_path):
    with Children(tmp_path) as running:
        assert running.run([sys.executable, "-c", "import sys; sys.exit(3)"], {}) == 3
        assert running.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {}) == -9
        assert running.run([sys.executable, "-c", "import os; assert os.environ['A'] == 'b'"], {"A": "b"}) == 0
        with pytest.raises(StoppedError, match="the same command goes on"):
            running.run([sys.executable, "-c", "import sys; sys.exit(75)"], {})
        with pytest.raises(StageError, match="cannot be started"):
            running.run(["/nowhere/python"], {})


def test_the_line_that_is_shown_runs_it(tmp_path, monkeypatch):
    odd = "it's; $HOME\n"
    command = [sys.executable, "-c", "import os, sys; print([os.environ['B'], *sys.argv[1:]])", odd]
    told = subprocess.run(["bash", "-c", shown(command, {"B": "c d"})], capture_output=True, text=True, check=True)
    assert told.stdout == f"{['c d', odd]}\n"
    monkeypatch.chdir(Path(sys.executable).parents[1])
    assert shown(command[:1], {}) == f"bin/{Path(sys.executable).name}"
    assert os.path.exists(shown(command[:1], {}))
