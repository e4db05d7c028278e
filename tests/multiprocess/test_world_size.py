"""The same run on 1, 2, 3 and 4 real processes over gloo, started as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
WORLDS = {"one": (1, 0), "two": (2, 0), "two, 2 workers": (2, 2), "three": (3, 0), "four": (4, 0)}


def launch(arguments: list[str], processes: int, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    config = LAUNCH / ("single.yaml" if processes == 1 else "ddp.yaml")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        str(processes),
    ]
    if processes > 1:
        command += ["--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def told(digits, tmp_path_factory):
    """What every world told, by name."""
    results = {}
    for name, (processes, workers) in WORLDS.items():
        out = tmp_path_factory.mktemp("told") / "told.json"
        strategy = "single" if processes == 1 else "ddp"
        ran = launch(
            [str(HERE / "worker.py"), str(out), str(digits), strategy, str(processes), str(workers)], processes
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        results[name] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize("world", [name for name in WORLDS if name != "one"])
def test_forty_alternating_steps_give_the_same_losses(told, world):
    one, many = told["one"], told[world]
    assert one["phases"].count("prompt") >= 12
    assert one["phases"].count("model") >= 12
    assert one["phases"] == many["phases"]
    assert one["uids"] == many["uids"]
    total = [np.array(run["losses"])[:, 0] for run in (one, many)]
    assert len(total[0]) == 40
    np.testing.assert_allclose(total[1], total[0], rtol=1e-5)
    assert np.ptp(total[0]) > 1e-2


@pytest.mark.parametrize("world", [name for name in WORLDS if name != "one"])
def test_evaluation_counts_every_sample_once(told, world):
    one, many = told["one"], told[world]
    assert many["results"]["unlabelled"]["samples"] == 1072
    assert many["results"]["test"]["samples"] == 359
    for protocol in ("unlabelled", "test"):
        assert many["predictions"][protocol][:2] == one["predictions"][protocol][:2]  # uid, target


def test_lost_and_doubled_samples_are_caught(told):
    for run in told.values():
        lost, doubled = run["faults"]
        assert "1 missing (uid" in lost
        assert "1 there more than once (uid" in doubled


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A short SPTNet run on two processes, through the command that users call."""
    folder = tmp_path_factory.mktemp("run") / "sptnet"
    arguments = ["-m", "sptnet.train", "configs/quickstart_sptnet.yaml", f"run={folder}", f"data.root={digits}"]
    arguments += ["init=null", "schedule.epochs=2", "schedule.k=5", "evaluate.every=1"]
    ran = launch(arguments, 2)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "DistributedDataParallel" in ran.stderr
    return folder


def test_the_train_command_writes_every_step(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "phase" in line]
    assert [line["step"] for line in steps] == list(range(22))
    assert {"total", "cls", "distill", "me_max", "info_nce", "sup_con", "images_per_s", "model_lr", "prompt_lr"} <= set(
        steps[0]
    )
    assert [line["step"] for line in lines if "evaluation" in line] == [11, 22]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_eval_gives_the_identical_result_on_any_number_of_processes(trained, processes):
    metrics, predictions = json.loads((trained / "metrics.json").read_text()), np.load(trained / "predictions.npz")
    before = {name: predictions[name] for name in predictions.files}
    ran = launch(["-m", "sptnet.evaluate", str(trained)], processes)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads((trained / "metrics.json").read_text()) == metrics
    after = np.load(trained / "predictions.npz")
    for name, values in before.items():
        assert np.array_equal(after[name], values), name


def test_a_finished_run_is_not_overwritten_and_mistakes_are_one_line(trained, digits):
    arguments = [
        "-m",
        "sptnet.train",
        "configs/quickstart_sptnet.yaml",
        f"run={trained}",
        f"data.root={digits}",
        "init=null",
    ]
    ran = launch(arguments, 1)
    assert ran.returncode != 0
    assert "error: " in ran.stderr
    assert "holds a finished run" in ran.stderr
    ran = launch([*arguments, "data.batch_size=40"], 3)
    assert "error: data.batch_size 40 cannot be dealt to 3 processes" in ran.stderr
    assert "Error: " not in ran.stderr.split("error: data")[0]
