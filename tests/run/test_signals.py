"""Being asked to stop, and being asked twice while the main thread waits where Python runs no handler."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sptnet.run.signals import SIGNALS, StopRequest

WAITING = """
import os, sys, time
import torch, torch.distributed as dist
from sptnet.run.signals import StopRequest
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
if dist.get_rank() == 1:
    time.sleep(60)
    os._exit(0)
with StopRequest():
    print("waiting", flush=True)
    dist.all_reduce(torch.zeros(1))
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_is_only_noted(number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            assert not stop.here()
            os.kill(os.getpid(), number)
            assert stop.here()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_whoever_started_it_ignores_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            time.sleep(0.2)
            assert not stop.here()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_second_signal_ends_a_process_that_waits_in_a_collective(tmp_path):
    command = [sys.executable, "-c", WAITING, f"file://{tmp_path}/meeting"]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE) for rank in range(2)]
    try:
        assert ranks[0].stdout.readline() == b"waiting\n"
        time.sleep(1)
        ranks[0].send_signal(signal.SIGTERM)
        time.sleep(0.1)
        ranks[0].send_signal(signal.SIGTERM)  # from whoever passes it on, too
        time.sleep(1.5)
        assert ranks[0].poll() is None
        ranks[0].send_signal(signal.SIGTERM)
        assert ranks[0].wait(timeout=5) == 128 + signal.SIGTERM
    finally:
        for process in ranks:
            process.kill()
            process.wait()
