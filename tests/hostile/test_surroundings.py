"""What surrounds a process and is not its input: memory, temporary folders, odd file systems, other users, signals."""

import errno
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made import encoded, put
from PIL import Image
from sptnet_shards.make_shards import main as make_shards
from torch.utils.data import Dataset

from sptnet import evaluate, exact_counts
from sptnet.build import build_untrained
from sptnet.cli import main
from sptnet.config_file import load_config
from sptnet.data.format import files
from sptnet.data.format.files import write_whole
from sptnet.data.format.temporary import temporary_of, writer_of
from sptnet.data.image import DecodeError, decode
from sptnet.data.workers import SharedMemoryError, load
from sptnet.run.folder import read_config
from sptnet.run.model_file import load_model, save_model
from sptnet.run.outcome import explain

FORKS = multiprocessing.get_context("fork")


def interpreted(expression, **environment):
    """Exit code of an expression of this module in an interpreter of its own."""
    program = f"import sys; sys.path[:0] = {sys.path!r}; from test_surroundings import *; {expression}"
    return subprocess.run([sys.executable, "-c", program], env=os.environ | environment, timeout=120).returncode


def blank(side):
    content = io.BytesIO()
    Image.new("RGB", (side, side)).save(content, "JPEG")
    return content.getvalue()


def with_little_memory(does, *arguments):
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + 2**26
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    does(*arguments)


def decoded(image, told):
    try:
        decode(image)
    except DecodeError:
        sys.exit(3)
    except MemoryError as error:
        sys.exit(0 if told in str(error) else 5)
    sys.exit(4)


def test_too_little_memory_says_nothing_of_an_image():
    """It counted as damaged, was left out by --on-error skip, and stayed so."""
    # in an interpreter of its own: one that has computed keeps freed memory, out of which an image may be decoded
    assert interpreted("with_little_memory(decoded, blank(12000), 'for an image of 12000 x 12000 pixels')") == 0


def test_a_conversion_without_memory_stops_and_goes_on(tmp_path, capsys, monkeypatch):
    named, pile = tmp_path / "named", tmp_path / "pile"
    for name in ("ant", "bee"):
        put(named / name / "a.jpg", encoded())
    put(pile / "b.jpg", encoded())
    out = tmp_path / "out"
    out.mkdir()
    temporary_of(out / "conversion.json").write_bytes(b"")  # of another task, which begins at the same moment
    command = ["discover", str(named), str(pile), str(tmp_path / "out"), "--on-error", "skip", "--workers", "1"]

    def none(*_, **__):
        raise MemoryError("there is too little for an image of 9 x 9 pixels")

    with monkeypatch.context() as patch:
        patch.setattr("sptnet_shards.conversion.images.decode", none)
        assert make_shards(command) == 1
    assert "out of memory (there is too little for an image" in capsys.readouterr().err
    assert make_shards(command) == 0
    assert "left out" not in capsys.readouterr().err


def test_memory_that_a_worker_lacks_is_told(monkeypatch):
    def none(self, number):
        raise MemoryError("there is too little for an image of 9 x 9 pixels")

    monkeypatch.setattr(Tensors, "__getitem__", none)
    for workers in (0, 1):
        with pytest.raises(SharedMemoryError, match=r"have fewer loader workers .*for an image of 9 x 9 pixels"):
            next(load(Tensors(), [0], workers))


class Tensors(Dataset):
    def __getitem__(self, number):
        return (torch.ones(3) * number,)


def handed_over(spare=None):
    """0: a worker's tensor came; 5: it was told in a sentence why it cannot. `spare`: descriptors that are left."""
    if spare is not None:
        most = len(os.listdir("/proc/self/fd")) + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        (item,) = next(load(Tensors(), [2], 1))
    except SharedMemoryError as error:
        sys.exit(5 if "loader workers cannot hand over batches" in str(error) else 6)
    except RuntimeError as error:
        sys.exit(5 if "DataLoader worker is gone" in str(error) else 7)
    sys.exit(0 if item.tolist() == [2, 2, 2] else 8)


@pytest.mark.parametrize("kind", ["fine", "a long path"])
def test_workers_that_can_hand_nothing_over_say_so(tmp_path, kind):
    """The error came in a thread, and the rank waited for ever."""
    folder = tmp_path / ("t" if kind == "fine" else "x" * 128)
    folder.mkdir()
    # in an interpreter of its own, whose temporary folder is not chosen yet
    assert interpreted("handed_over()", TMPDIR=str(folder)) == (0 if kind == "fine" else 5)


@pytest.mark.parametrize("spare", [9, 11, 13, 15])
def test_too_few_open_files_are_told_and_nothing_hangs(spare):
    process = FORKS.Process(target=handed_over, args=(spare,))
    process.start()
    process.join(60)
    assert process.exitcode in (0, 5)


class Unsendable(Dataset):
    def __getitem__(self, number):
        return (lambda: number,)  # cannot be pickled


def test_what_fails_in_the_thread_that_sends_ends_its_worker():
    with pytest.raises(RuntimeError, match="DataLoader worker is gone"):
        next(load(Unsendable(), [0], 1))


def test_an_evaluation_needs_no_temporary_folder_while_all_fits(monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    windows = exact_counts.Windows(2, 10, exact_counts.COLUMNS)
    windows.add(np.array([[3, 0, 0, 0], [13, 0, 0, 0]]))
    assert windows.rows(1).tolist() == [[13, 0, 0, 0]]
    windows.close()


def test_a_file_system_that_cannot_sync_a_folder_will_do(tmp_path, monkeypatch):
    sync = os.fsync

    def of_files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    write_whole(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_process_that_proc_hides_is_alive(tmp_path, monkeypatch):
    name = temporary_of(tmp_path / "a.csv").name
    assert name.startswith(".")  # readers of a whole folder pass it over
    writer = writer_of(name)
    assert writer.file == "a.csv"
    assert writer_of(name.removeprefix(".")) == writer  # of a version before

    def not_ours(process, number):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "kill", not_ours)
    assert not writer._replace(process=2**22 + 1).is_dead()
    monkeypatch.undo()
    assert writer._replace(process=2**22 + 1).is_dead()
    assert not writer.is_dead()


def test_what_a_killed_prediction_left_is_removed(untrained, tmp_path):
    pile = tmp_path / "pile"
    put(pile / "a.png", encoded("PNG"))
    command = ["predict", str(untrained), str(pile), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    gone = FORKS.Process(target=lambda: write_temporary(tmp_path / "out" / "predictions" / "part-000000.csv"))
    gone.start()
    gone.join()
    assert len(os.listdir(tmp_path / "out" / "predictions")) == 2
    assert main(command) == 0
    assert os.listdir(tmp_path / "out" / "predictions") == ["part-000000.csv"]


def write_temporary(path):
    temporary_of(path).write_bytes(b"half")


def test_an_evaluation_of_a_model_that_was_trained_on_meanwhile_is_not_saved(untrained, tmp_path, monkeypatch, capsys):
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    (run / "finished").unlink()
    score = evaluate.score

    def training_ends_meanwhile(*arguments):
        module, prompt = build_untrained(read_config(run), 5, 5)
        facts = load_model(run, module, prompt)
        module.head.prototypes.data += 1
        save_model(run, module.state_dict(), prompt, replace(facts, step=2, sha256=None))
        return score(*arguments)

    monkeypatch.setattr(evaluate, "score", training_ends_meanwhile)
    assert main(["eval", str(run)]) == 1
    told = capsys.readouterr()
    assert "was replaced while it was evaluated: evaluate it again" in told.err
    assert "All / Old / New" not in told.out  # it is of no model that there is
    assert not (run / "metrics.json").exists()


def test_a_user_without_a_home_can_use_a_run(untrained, monkeypatch):
    expand = Path.expanduser

    def none(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return expand(path)

    monkeypatch.setattr(Path, "expanduser", none)
    config = load_config(untrained / "config.yaml", [], complete=True)
    assert config.data.remote.cache == "~/.cache/sptnet"


@pytest.mark.parametrize(
    ("said", "told"),
    [("can't start new thread", "no more processes and threads are allowed"), ("could not create a primitive", "out of m"),
     ("CUDA error: out of memory\nCompile with ...", "out of memory: in training"), ("std::bad_alloc", "out of memory"),
     ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "out of memory"),
     ("CUDA error: no kernel image is available for execution", "has no kernels for this GPU")],
)  # fmt: skip
def test_what_torch_says_of_too_little_is_known(said, told):
    assert told in explain(RuntimeError(said))[0]
    assert explain(RuntimeError(said))[1] == "final"


def test_a_ctrl_c_while_it_starts_is_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal, runpy, sys; signal.signal(2, signal.default_int_handler);"
         "sys.argv[1:] = ['config']; print('up', flush=True); runpy.run_module('sptnet', run_name='__main__')"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    time.sleep(0.15)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert "Traceback" not in told
    assert process.returncode in (0, -signal.SIGINT, 130)


def test_a_full_output_is_named():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sptnet", "config"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ran.returncode, ran.stderr) == (1, "error: the output, or a temporary file: No space left on device\n")


def test_an_export_needs_no_more_than_its_own_folder(untrained, tmp_path):
    """As a mount point, which nothing can take the place of."""
    out = tmp_path / "out"
    out.mkdir()
    before = out.stat().st_ino
    assert main(["export", str(untrained), str(out)]) == 0
    assert out.stat().st_ino == before
    assert sorted(os.listdir(out)) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((out / "config.json").read_text())["architecture"]
