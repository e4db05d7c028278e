"""metrics.jsonl is cut where a run goes on, by its end: not read as a whole."""

import json
from pathlib import Path

import pytest

from sptnet.run import records
from sptnet.run.records import forget_from


def lines_of(steps):
    """A line a step, and an evaluation when every tenth is done."""
    lines = []
    for step in range(steps):
        lines.append(json.dumps({"step": step, "phase": "model", "loss": 1.5}))
        if step % 10 == 9:
            lines.append(json.dumps({"step": step + 1, "test": {"all": 0.5}}))
    return lines


@pytest.mark.parametrize("tail", [40, 1000, 2**20])
@pytest.mark.parametrize("start", [0, 1, 10, 11, 55, 99, 100, 101, 500])
def test_what_was_done_before_a_step_stays(tmp_path, monkeypatch, start, tail):
    monkeypatch.setattr(records, "TAIL", tail)
    path = tmp_path / "metrics.jsonl"
    lines = lines_of(100)
    path.write_text("\n".join([*lines, '{"step": 99, "pha']))
    forget_from(path, start)
    assert path.read_text().splitlines() == [line for line in lines if json.loads(line)["step"] < start]


def bytes_read():
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


def test_of_a_long_file_only_the_end_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines_of(100_000)) + "\n")
    before = bytes_read()
    forget_from(path, 99_990)
    assert path.stat().st_size > 4 * 2**20
    assert bytes_read() - before < 2 * records.TAIL
