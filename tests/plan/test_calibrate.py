"""A plan beside real steps of this machine."""

import re

from launching import ROOT

from sptnet.cli import main

SMALL = ["model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}", "model.train_from_block=-1"]


def test_both_phases_at_three_batches(digits, capsys):
    config = f"{ROOT}/configs/quickstart.yaml"
    data = ["init=null", f"data.root={digits}", "device=cpu"]
    assert main(["plan", config, "--calibrate", "4", *data, *SMALL]) == 0
    told = capsys.readouterr().out
    rows = re.findall(r"│ +(\w+) │ +(\d+) │ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +[+-]\d+% │", told)
    steps = {(phase, str(images)) for phase in ("prompt", "model") for images in (4, 8, 16)}
    assert len(rows) == len(steps)
    assert {row[:2] for row in rows} == steps
    assert all(float(seconds) > 0 for row in rows for seconds in row[2:4])
    assert "Steps on this machine" in told
