"""What a run may begin from beside a run's folder: another run's checkpoint, and what the authors trained."""

import json
import shutil

import pytest
import torch
import yaml
from launching import ROOT
from safetensors.torch import load_file

from sptnet.build import build_untrained
from sptnet.cli import main
from sptnet.config_file import load_config
from sptnet.method.reference import load_reference
from sptnet.run.checkpoint import checkpoints

# of the authors' checkpoints among the reference numbers: 10 classes, 48 pixels
REFERENCE_MODEL = ["model.image_size=48", "init_num_heads=3"]
CONFIGS = {"simgcd": "quickstart_simgcd", "sptnet": "quickstart"}


def steps_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["total"] for line in lines if "phase" in line}


def test_from_another_runs_checkpoint_it_goes_on_as_that_run_does(before, again):
    newest = checkpoints(before / "interrupted")[-1]
    config = yaml.safe_load(again.read_text()) | {"run": "other"}
    (before / "other.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(before / "interrupted", before / "kept")
    assert main(["train", "other.yaml", f"resume={before / 'kept' / 'checkpoints' / newest.name}"]) == 0
    assert main(["train", str(again)]) == 0
    ours, theirs = (load_file(before / run / "model.safetensors") for run in ("other", "interrupted"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    told = steps_of(before / "other")
    assert told
    assert told.items() <= steps_of(before / "interrupted").items()


@pytest.mark.parametrize(("file", "method"), [("reference_sptnet.pt", "sptnet"), ("reference_simgcd.pt", "sptnet"),
                                              ("reference_simgcd.pt", "simgcd")])  # fmt: skip
def test_from_what_the_authors_trained(reference, digits, tmp_path, file, method):
    """With learning rates of 0 what comes out is what went in."""
    settings = [f"init={reference(file)}", f"run={tmp_path / 'run'}", f"data.root={digits}", f"method={method}",
                "schedule.epochs=1", "optimizer.lr=0", *REFERENCE_MODEL]  # fmt: skip
    if method == "sptnet":
        settings += ["schedule.k=2", "prompts.lr=0", "prompts.kind=all", "prompts.border=1", "prompts.frame=6"]
    assert main(["train", f"{ROOT}/configs/{CONFIGS[method]}.yaml", *settings]) == 0
    model, prompt = load_reference(reference(file), 3)
    trained = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(trained[f"model.{name}"], value), name
    if prompt is not None:
        for name, value in prompt.state_dict().items():
            assert torch.equal(trained[f"prompt.{name}"], value), name


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("model.num_new=6", "10 classes at 48 pixels, the run 11 at 48"),
        ("model.image_size=24", "10 classes at 48 pixels, the run 10 at 24"),
    ],
)
def test_what_the_authors_trained_for_something_else_is_refused(reference, digits, tmp_path, capsys, other, told):
    settings = [f"init={reference('reference_sptnet.pt')}", f"run={tmp_path / 'run'}", f"data.root={digits}"]
    assert main(["train", f"{ROOT}/configs/quickstart.yaml", *settings, *REFERENCE_MODEL, other]) == 2
    assert told in capsys.readouterr().err


def test_prompts_begin_as_the_configuration_says():
    def begun(*settings):
        config = load_config("quickstart", ["init=null", *settings])
        return build_untrained(config, 5, 5)[1].state_dict()

    zero, whole, tenth = begun("prompts.init=zero"), begun(), begun("prompts.init_scale=0.1")
    assert all(not value.any() for value in zero.values())
    assert all(0.8 < float(value.std()) < 1.2 for value in whole.values())
    assert all(torch.allclose(tenth[name], 0.1 * value) for name, value in whole.items())
