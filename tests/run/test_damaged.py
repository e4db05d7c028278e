"""Files of a run that a disk or a hand damaged: one line that names the file, and nothing is printed as a result."""

import json
import random

import pytest
from safetensors.torch import load_file, save_file

from sptnet.cli import main
from sptnet.run.records import records_of

JSONS = [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b"{}", b'{"method": 3}', b"NaN",
         b'{"test": []}', b'{"method": "m", "test": {"all": "high"}}',
         b'{"method": "m", "test": {"all": 2.0}}']  # fmt: skip
RESULT = {"all": 0.5, "old": 0.5, "new": 0.5, "samples": 3, "classes_used": 2}
WRONG = [{"all": 2.0}, {"old": 5.0}, {"new": -1.0}, {"old": float("inf")}, {"known": {"all": -1, "old": 0, "new": 0}},
         {"known": 3}, {"known_classes": "many"}]  # fmt: skip
JSONS += [json.dumps({"method": "m", "test": RESULT | wrong}).encode() for wrong in WRONG]
JSONS += [json.dumps({"method": "m", "test": RESULT, "dataset": 3}).encode()]
YAMLS = [b"", b"[", b"- a", b"3", b"\xff", b"method: [", b"method: nothing", b"&a [*a]", b"a: 1\na: 2", b"[" * 3000,
         b"!!python/name:os.system", b"? [a]\n: b", b"run: x\nmethod: simgcd"]  # fmt: skip
OUTSIDE = {"file": "../x", "bytes": 1, "sha256": "0" * 64}


def told(capsys, arguments):
    """The one line of a command that fails."""
    assert main(arguments) != 0
    out = capsys.readouterr()
    lines = [line for line in out.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, out.err
    assert "All / Old / New" not in out.out
    return lines[0]


@pytest.mark.parametrize("content", JSONS)
def test_metrics_json(before, capsys, content):
    (before / "simgcd" / "metrics.json").write_bytes(content)
    assert "simgcd/metrics.json" in told(capsys, ["report", "simgcd"])


@pytest.mark.parametrize("content", YAMLS)
def test_config_yaml(before, capsys, content):
    (before / "simgcd" / "config.yaml").write_bytes(content)
    assert "simgcd" in told(capsys, ["eval", "simgcd"])


@pytest.mark.parametrize("key", ["step", "numbers", "backbone", "written_by", "counters", "parts", "schema"])
@pytest.mark.parametrize("value", [None, "x", -1, [], {}, [3], {"a": [1]}, 10**30, [OUTSIDE]])
def test_checkpoint_json(again, capsys, key, value):
    path = again.parent / "interrupted" / "checkpoints" / "step-000000005" / "checkpoint.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {key: value}))
    if value == {} and key in ("counters", "written_by"):  # what a checkpoint lacks counts as its default
        assert main(["train", str(again)]) == 0
        return
    assert "step-000000005" in told(capsys, ["train", str(again)])


@pytest.mark.parametrize("content", JSONS[:8])
def test_checkpoint_json_that_is_none(again, capsys, content):
    path = again.parent / "interrupted" / "checkpoints" / "step-000000005" / "checkpoint.json"
    path.write_bytes(content)
    assert str(path.parent.name) in told(capsys, ["train", str(again)])


def test_metrics_jsonl_loses_what_stands_behind_its_last_sound_line(again):
    path = again.parent / "interrupted" / "metrics.jsonl"
    sound = path.read_text().splitlines()
    path.write_bytes("\n".join([sound[0], "{", "[]", '{"step": "x"}', "3", sound[1], "\0\0"]).encode() + b"\xff\n")
    assert main(["train", str(again)]) == 0
    assert b"\0\0" not in path.read_bytes()
    steps = [record["step"] for record in records_of(path) if record is not None]
    assert steps[:3] == [0, 1, 5]


@pytest.mark.parametrize("seed", range(8))
def test_model_bytes(before, capsys, seed):
    path, draws = before / "simgcd" / "model.safetensors", random.Random(seed)
    main(["eval", "simgcd"])
    content = bytearray(path.read_bytes())
    for _ in range(4):
        content[draws.randrange(8 if seed < 4 else len(content))] ^= 255
    path.write_bytes(content[: draws.choice([len(content), len(content) // 2])] if seed % 2 else content)
    capsys.readouterr()
    code = main(["eval", "simgcd"])  # a file of this earlier version has no digest
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == code
    if seed < 4:  # its first bytes say how long its header is
        assert code == 1
        assert "model.safetensors" in told[0]


def test_a_model_that_is_not_finite_or_not_as_it_was_written_is_no_result(again, capsys):
    run = again.parent / "interrupted"
    assert main(["train", str(again)]) == 0
    content = bytearray((run / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (run / "model.safetensors").write_bytes(content)
    capsys.readouterr()
    assert "is damaged (sha256)" in told(capsys, ["eval", "interrupted"])
    state = load_file(again.parent / "simgcd" / "model.safetensors")
    state["model.head.prototypes"][0, 0] = float("nan")
    save_file(state, again.parent / "simgcd" / "model.safetensors")
    assert "not finite in model.head.prototypes" in told(capsys, ["eval", "simgcd"])
