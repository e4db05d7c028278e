"""What a training never loses, and what it says of itself."""

import json
import os
import re
import signal
import stat
import threading
import time

import pytest
import torch
import yaml
from launching import heeding_signals
from safetensors.torch import load_file

import sptnet.run.saving
from sptnet.cli import main
from sptnet.config_file import load_config
from sptnet.data.format.faults import DatasetError
from sptnet.run.checkpoint import checkpoints, read_facts
from sptnet.run.provenance import warnings
from sptnet.run.tables import collapse


def changed(config, **values):
    """A copy of a configuration with other values, by dotted keys."""
    raw = yaml.safe_load(config.read_text())
    for key, value in values.items():
        *above, last = key.split("__")
        section = raw
        for name in above:
            section = section[name]
        section[last] = value
    path = config.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def test_shards_that_vanish_before_the_last_evaluation_lose_nothing(again, monkeypatch, capsys):
    def vanished(*_):
        raise DatasetError("data/test-000000.tar cannot be opened: No such file or directory")

    with monkeypatch.context() as patch:
        patch.setattr("sptnet.train.evaluate", vanished)
        assert main(["train", str(again)]) == 1
    run = again.parent / "interrupted"
    total = read_facts(checkpoints(run)[-1]).step
    assert total == 12
    assert main(["train", str(again)]) == 0
    assert (run / "finished").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "total" in line] == list(range(total))


def test_a_run_that_fails_keeps_the_checkpoint_that_is_being_written(again, monkeypatch, capsys):
    written = sptnet.run.saving.write_through

    def slowly(path, content):
        time.sleep(0.5)
        written(path, content)

    def lost(*_):
        raise RuntimeError("DataLoader worker was killed, signal: Killed")

    monkeypatch.setattr("sptnet.run.saving.write_through", slowly)
    monkeypatch.setattr("sptnet.run.saving.Saver.poll", lost)  # called right after a checkpoint was begun
    assert main(["train", str(again), "checkpoint.every=1"]) == 1
    assert "a loader worker was killed" in capsys.readouterr().err
    run = again.parent / "interrupted"
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert read_facts(checkpoints(run)[-1]).step == 6  # it stood at 5


def test_asked_to_stop_during_an_evaluation_it_stops_and_goes_on(again, monkeypatch):
    asked = []
    heeding_signals()  # nohup, below which these tests may run, ignores SIGHUP

    def ask(log, done, protocol, images, total):
        if done == 12 and not asked:
            asked.append(done)
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr("sptnet.run.metrics_log.MetricsLog.evaluating", ask)
    assert main(["train", str(again)]) == 75
    run = again.parent / "interrupted"
    assert asked
    assert not (run / "finished").exists()
    assert main(["train", str(again)]) == 0
    assert (run / "finished").exists()


def test_beyond_a_shortened_schedule_it_says_so(again, capsys):
    folder = again.parent / "interrupted" / "checkpoints"
    path = (folder / "step-000000005").rename(folder / "step-000000013") / "checkpoint.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"step": 13}))
    assert main(["train", str(again)]) == 1
    assert "is of step 13, beyond the 12 of this schedule" in capsys.readouterr().err


def test_precision_is_part_of_a_run(again, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["train", str(again)]) == 1
    assert "precision was no, is bf16" in capsys.readouterr().err
    assert main(["train", changed(again, resume__allow=["precision"])]) == 0
    run = again.parent / "interrupted"
    trained = json.loads((run / "metrics.json").read_text())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert main(["eval", "interrupted"]) == 0
    assert json.loads((run / "metrics.json").read_text()) == trained


def test_other_numbers_are_refused_with_the_list_of_differences(again, capsys):
    was = yaml.safe_load(again.read_text())["optimizer"]["lr"]
    assert main(["train", str(again), "seed=7", "optimizer.lr=0.001", "data.workers=1"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"optimizer.lr was {was}, is 0.001; seed was 0, is 7. Name in resume.allow" in line
    assert main(["train", str(again), "optimizer.lr=0.001", "resume.allow=[optimizer]"]) == 0
    assert read_facts(checkpoints(again.parent / "interrupted")[-1]).numbers["optimizer.lr"] == 0.001


def test_kernels_are_part_of_a_run_and_an_older_checkpoint_had_the_usual_ones(again, capsys):
    facts = read_facts(checkpoints(again.parent / "interrupted")[-1])
    assert not {"matmul_precision", "deterministic", "compile"} & facts.numbers.keys()
    assert main(["train", str(again), "compile=true", "deterministic=true", "matmul_precision=highest"]) == 1
    told = (
        "compile was False, is True; deterministic was False, is True; matmul_precision was 'high', is 'highest'. "
        "Name in resume.allow"
    )
    assert told in capsys.readouterr().err
    assert main(["train", str(again), "deterministic=true", "resume.allow=[deterministic]"]) == 0
    assert read_facts(checkpoints(again.parent / "interrupted")[-1]).numbers["deterministic"] is True


def test_what_it_begins_from_must_be_finished_and_of_the_same_classes(before, again, capsys):
    (before / "simgcd" / "finished").unlink()
    fresh = changed(again, run="fresh")
    assert main(["train", fresh]) == 1
    assert "init: simgcd is not finished" in capsys.readouterr().err
    (before / "simgcd" / "finished").touch()
    manifest = json.loads((before / "data" / "manifest.json").read_text())
    assert main(["train", fresh]) == 0
    manifest["classes"][-1] = "other"
    (before / "data" / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(["train", changed(again, run="third", init="fresh")]) == 1
    assert "init fresh was trained for other classes" in capsys.readouterr().err


def test_simgcd_goes_on_from_simgcd_and_not_from_a_model_with_prompts(before, again, capsys):
    continued = {"method": "simgcd", "prompts": {}, "run": "continued", "optimizer__lr": 0}
    assert main(["train", changed(again, **continued)]) == 0
    start, end = (load_file(before / run / "model.safetensors") for run in ("simgcd", "continued"))
    assert start.keys() == end.keys()
    assert all(torch.equal(tensor, end[name]) for name, tensor in start.items())  # at a rate of 0
    header = (before / "continued" / "log.txt").read_text()
    assert re.search(r"method\W+simgcd, from simgcd", header)
    assert main(["train", changed(again, run="prompted")]) == 0
    capsys.readouterr()
    assert main(["train", changed(again, **(continued | {"init": "prompted", "run": "other"}))]) == 2
    told = capsys.readouterr().err
    assert "init prompted was trained with prompts, without which its model is not whole: go on with" in told


def test_the_model_is_taken_from_init(before, again, capsys):
    raw = yaml.safe_load(again.read_text())
    del raw["model"]
    (before / "short.yaml").write_text(yaml.safe_dump(raw | {"run": "fresh"}))
    config = load_config(before / "short.yaml")
    assert config.model.backbone_options == {"patch_size": 6, "embed_dim": 24, "depth": 2, "num_heads": 3}
    (before / "short.yaml").write_text(yaml.safe_dump(raw | {"run": "fresh", "model": {"head_hidden": 32}}))
    assert main(["train", str(before / "short.yaml")]) == 2
    assert "model.head_hidden is 32, but init simgcd was trained with 16" in capsys.readouterr().err


def test_a_run_that_may_not_be_written_is_evaluated(before, capsys, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied", "simgcd/metrics.json")

    monkeypatch.setattr("sptnet.evaluate.write_whole", forbidden)
    assert main(["eval", "simgcd"]) == 1
    out = capsys.readouterr()
    assert "All / Old / New" in out.out
    assert "cannot be written: Permission denied" in out.err


def test_evaluated_from_any_folder_with_its_data_elsewhere(before, tmp_path_factory, monkeypatch, capsys):
    (before / "data").rename(before / "moved")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert main(["eval", str(before / "simgcd"), f"data.root={before / 'moved'}"]) == 0
    assert main(["eval", str(before / "simgcd"), "seed=3"]) == 2
    assert "cannot differ from the run" in capsys.readouterr().err


def test_a_collapsed_model_is_no_result_like_others():
    sound = {"all": 0.5, "samples": 100, "classes": 10, "classes_used": 9, "effective_classes": 7.5}
    assert collapse(sound) is None
    assert "2 of 10 classes" in (collapse(sound | {"classes_used": 2, "effective_classes": 1.9}) or "")
    assert collapse(sound | {"effective_classes": 2.2})
    assert collapse({"samples": 100, "classes_used": 2}) is None  # of an earlier version


def test_few_classes_in_use_are_no_collapse_where_there_are_no_more():
    found = {"samples": 400, "classes": 111, "classes_used": 41, "effective_classes": 40.0, "all": 1.0}
    assert "accuracy says little" in (collapse(found | {"known": {"all": 399}, "known_classes": 41}) or "")
    assert collapse(found | {"known": {"all": 400}, "known_classes": 41}) is None
    assert collapse(found | {"known": {"all": 400}, "known_classes": 41, "classes_used": 3, "effective_classes": 2.0})
    # a quarter of an estimate may be all that there are
    unknown = {"samples": 400, "classes": 39, "classes_used": 10, "effective_classes": 9.0, "all": None}
    assert collapse(unknown | {"known": {"all": 0}, "known_classes": 0}) is None
    assert "unless there are no more" in (collapse(unknown | {"classes_used": 9}) or "")
    assert "accuracy says little" in (collapse(unknown | {"all": 0.7}) or "")  # of an earlier version


def test_a_collapse_is_said_in_the_table_and_in_the_log(before, capsys):
    path = before / "simgcd" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["test"] |= {"classes": 6, "classes_used": 1, "effective_classes": 1.0}
    path.write_text(json.dumps(metrics))
    assert main(["report", "simgcd", "sptnet"]) == 0
    assert "COLLAPSED: simgcd" in capsys.readouterr().out


def test_a_table_of_80_columns_has_all_its_numbers(before, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sptnet.run.tables.WIDTH_OF_A_LOG", 80)
    long = before / ("long" * 20)
    (before / "simgcd").rename(long)
    assert main(["report", str(long)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    metrics = json.loads((long / "metrics.json").read_text())
    for protocol in ("unlabelled", "test"):
        shares = " / ".join(f"{100 * metrics[protocol][name]:.1f}" for name in ("all", "old", "new"))
        assert shares in out


class FakeSchedule:
    epochs, total_steps, teacher_warmup_epochs, prompt_warmup_steps = 5, 50, 20, 1000

    def warning(self):
        return None


def test_settings_that_are_rarely_meant_are_said(again):
    config = load_config(again, ["prompts.frame=10", "data.workers=999"])
    said = "\n".join(warnings(config, FakeSchedule(), 0))
    assert "data.workers is 999 for every rank, more than the " in said
    assert "the teacher never reaches its temperature" in said
    assert "the prompts never reach their learning rate" in said
    assert "which cover 97% of an image of 24" in said


def test_a_terminal_that_goes_away_ends_no_run(again, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("rich.console.Console.print", gone)
    assert main(["train", str(again)]) == 0


def test_files_are_written_for_others_to_read_and_no_thread_stays(again):
    threads = threading.active_count()
    assert main(["train", str(again)]) == 0
    run = again.parent / "interrupted"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((run / "model.safetensors").stat().st_mode) == 0o666 & ~mask
    assert threading.active_count() <= threads + 1  # the one that waits for signals may be ending


@pytest.mark.parametrize(
    "command", [["eval", "nowhere"], ["report", "nowhere"], ["train", "nowhere.yaml"], ["eval", "data"]]
)
def test_what_is_not_there_is_one_line(before, capsys, command):
    assert main(command) != 0
    assert capsys.readouterr().err.count("error: ") == 1
