"""What a failed process leaves for whoever started it."""

import errno
import os
from pathlib import Path

import pytest
import torch

from sptnet.config_file import load_config
from sptnet.data.format.faults import UnreachableError
from sptnet.run.checkpoint import CheckpointError
from sptnet.run.folder import OccupiedError, RunError, writing
from sptnet.run.outcome import outcome_of, record_outcome
from sptnet.run.resume import agree_where_to_continue


def unwritable(number):
    try:
        with writing(Path("model.safetensors")):
            raise OSError(number, os.strerror(number))
    except RunError as error:
        return error


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(RuntimeError("peer gone"), "retry"), (OSError("network"), "retry"), (TypeError("bug"), "final"),
     (torch.OutOfMemoryError("big"), "final"), (CheckpointError("damaged"), "final"),
     (RunError("no folder"), "final"), (unwritable(errno.ESTALE), "retry"), (unwritable(errno.ENOSPC), "final"),
     (UnreachableError("s3"), "retry"), (OccupiedError("trained by another process"), "retry")],
)  # fmt: skip
def test_an_outcome_is_left_where_asked(tmp_path, monkeypatch, error, outcome):
    assert outcome_of(error) == outcome
    monkeypatch.setenv("SPTNET_OUTCOME", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    record_outcome(outcome, f"two\nlines of {error}")
    assert (tmp_path / "rank-3").read_text() == f"{outcome}: two lines of {error}\n"
    monkeypatch.setenv("SPTNET_OUTCOME", str(tmp_path / "missing"))
    record_outcome(outcome, "a disk that fails must not hide the error itself")


def test_all_ranks_are_told_whether_to_try_again(monkeypatch):
    def stale(run):
        raise unwritable(errno.ESTALE)

    monkeypatch.setattr("sptnet.run.resume.RunLock", stale)
    with pytest.raises(RunError) as raised:
        agree_where_to_continue(load_config("quickstart"))
    assert raised.value.outcome == "retry"
