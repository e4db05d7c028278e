"""Processes of a run without an interpreter's start: each is forked from one process that has imported everything.

That process does nothing else and has no threads. A forked one gets the environment that `accelerate launch` gives,
made by accelerate's own functions, its own streams, and runs the same script or module as `__main__`. Like torchrun,
the first that fails ends the others. What is about the launcher itself is tested with the launcher (launching.py).
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from pathlib import Path

import psutil
from launching import ENVIRONMENT, ROOT
from torch.distributed import TCPStore

FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["deepspeed", "forked", "sptnet.commands.train", "sptnet.discover.journey", "sptnet.export",
            "sptnet.predict", "sptnet.report", "sptnet.train", "tensorboard", "torch.distributed.fsdp",
            "torch.testing"]  # fmt: skip
FORKS.set_forkserver_preload(IMPORTED)


class Forked:
    """A world of processes that run one command.

    Attributes:
        returncode: 0, or that of the first process that failed; negative for a signal; None while some still run.
    """

    def __init__(self, arguments, strategy="single", processes=1, precision="no", cwd=ROOT, **environment):
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        names = [Path(self._folder.name, name) for name in ("out", "err")]
        # here, as in torchrun's agent: a rank that has ended does not take it along
        self._store = TCPStore("127.0.0.1", 0, processes, is_master=True, wait_for_workers=False)
        given = ENVIRONMENT | environment_of(strategy, processes, precision) | environment
        self.processes = [
            FORKS.Process(target=_run, args=([str(a) for a in arguments], given | rank, str(cwd), names))
            for rank in _ranks(strategy, processes, self._store.port)
        ]
        for name in names:
            name.touch()
        for process in self.processes:
            process.start()
        self.returncode, self._failed = None, 0
        # a test that fails, or is interrupted, leaves nobody behind; by multiprocessing's own list, which is gone
        # through before it waits for children
        Finalize(self, _kill, (self.processes,), exitpriority=10)

    def poll(self):
        """The return code, where all have ended; ends the others where one has failed."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if failed and not self._failed:
            self._failed = failed[0]
            self.send_signal(signal.SIGTERM)
        if None in codes:
            return None
        self.returncode = self._failed
        return self.returncode

    def wait(self, timeout=300):
        end = time.monotonic() + timeout
        while self.poll() is None:
            wait([process.sentinel for process in self.processes if process.exitcode is None], timeout=5)
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.told, timeout)
        return self.returncode

    @property
    def stdout(self):
        return Path(self._folder.name, "out").read_text(errors="replace")

    @property
    def stderr(self):
        return Path(self._folder.name, "err").read_text(errors="replace")

    @property
    def told(self):
        return self.stdout + self.stderr

    def send_signal(self, number):
        """To every process, as torchrun passes it on."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self):
        """SIGKILL to all, and to what they have started."""
        _kill(self.processes)


def _kill(processes):
    for process in processes:
        if process.exitcode is None:
            with suppress(psutil.NoSuchProcess):
                own = psutil.Process(process.pid)
                for one in [own, *own.children(recursive=True)]:
                    one.kill()
        process.join()


def ran(arguments, strategy="single", processes=1, precision="no", timeout=300, **environment):
    """A world that has ended: `returncode`, `stdout`, `stderr`."""
    world = Forked(arguments, strategy, processes, precision, **environment)
    world.wait(timeout)
    return world


@cache
def environment_of(strategy, processes, precision):
    """What `accelerate launch` adds to the environment for a file of launch/."""
    from accelerate.commands import launch
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    given = ["--config_file", f"{ROOT}/launch/{strategy}.yaml", "--num_processes", str(processes)]
    parser = launch.launch_command_parser()
    arguments = parser.parse_args([*given, "--mixed_precision", precision, "--main_process_port", "0", "none.py"])
    arguments, defaults, _ = launch._validate_launch_command(arguments)
    before = dict(os.environ)
    try:
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            made = prepare_deepspeed_cmd_env(arguments)[1]
        elif arguments.multi_gpu or arguments.use_fsdp:
            made = prepare_multi_gpu_env(arguments)
        else:
            made = prepare_simple_launcher_cmd_env(arguments)[1]
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {name: value for name, value in made.items() if before.get(name) != value}


def _ranks(strategy, processes, port):
    """The variables by which torchrun tells its processes apart; the launcher for one process sets none."""
    if strategy == "single":
        return [{}]
    world = {
        "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0,
    }  # fmt: skip
    return [
        {name: str(value) for name, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        for rank in range(processes)
    ]


def _run(arguments, environment, cwd, streams):
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in zip((sys.stdout, sys.stderr), streams, strict=True):
        stream.flush()
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    if arguments[0] == "-m":
        sys.path.insert(0, cwd)
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).parent))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
