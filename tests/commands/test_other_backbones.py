"""Backbones that are no ViT with a class token and learned positions, through the commands that users call."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sptnet.build import build_untrained
from sptnet.cli import main
from sptnet.config_file import load_config
from sptnet.data.features import FeatureFolder
from sptnet.data.format.files import write_whole
from sptnet.data.storage.store import LocalStore
from sptnet.export.folder import export_run
from sptnet.export.folding import ExportError
from sptnet.run.folder import FINISHED, RunError, open_run
from sptnet.run.model_file import ModelFacts, load_model, read_facts, save_model
from sptnet.trained import TrainedRun

ROOT = Path(__file__).parents[2]
TINY = "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}"
HALF = [0.5, 0.5, 0.5]


def a_run(folder: Path, data: Path, backbone: str, method: str = "sptnet") -> Path:
    """A run's folder as training leaves it, with weights and a prompt that are drawn, and count."""
    name = "quickstart.yaml" if method == "sptnet" else "quickstart_simgcd.yaml"
    settings = [f"run={folder}", f"data.root={data}", "init=null", f"model.backbone={backbone}", TINY]
    config = load_config(ROOT / "configs" / name, settings)
    folder.mkdir()
    open_run(config, 0)
    model, prompt = build_untrained(config, 5, 5)
    with torch.no_grad():
        for parameter in [*model.parameters(), *(prompt.parameters() if prompt is not None else [])]:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    save_model(folder, model.state_dict(), prompt, ModelFacts(1, None, None, None, *model.statistics))
    write_whole(folder / FINISHED, b"")
    return folder


@pytest.mark.parametrize(
    ("backbone", "adds_positions"),
    [
        ("vit_small_patch16_dinov3", True), ("eva02_tiny_patch14_224", False), ("beit_base_patch16_224", True),
        ("vit_small_patch16_rope_mixed_224", True), ("vit_medium_patch16_rope_reg1_gap_256", True),
        ("vit_base_patch16_siglip_224", False), ("vit_base_patch16_siglip_gap_224", False), ("test_vit", False),
        ("beit3_base_patch16_224", False),
    ],
)  # fmt: skip
def test_a_prompt_is_exported_with_any_positions(backbone, adds_positions, digits, tmp_path):
    run = a_run(tmp_path / "run", digits, backbone)
    assert export_run(run, tmp_path / "out")["timm"] < 1e-5
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["model_args"].get("use_abs_pos_emb", False) == adds_positions
    mean, std = TrainedRun(run).encoder.module.statistics
    assert (told["pretrained_cfg"]["mean"], told["pretrained_cfg"]["std"]) == (list(mean), list(std))
    positions = load_file(tmp_path / "out" / "model.safetensors")["pos_embed"]
    assert positions.abs().max() > 0.01


@pytest.mark.parametrize(
    ("backbone", "why"),
    [
        ("vit_relpos_small_patch16_224", "has no position embedding"), ("aimv2_large_patch14_224", "a norm of its own"),
        ("deit_tiny_distilled_patch16_224", "has two heads"),
    ],
)  # fmt: skip
def test_what_does_not_fold_is_one_line(backbone, why, digits, tmp_path):
    with pytest.raises(ExportError, match=why) as raised:
        export_run(a_run(tmp_path / "run", digits, backbone), tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    if "relpos" in backbone:  # without a prompt there is nothing to fold
        found = export_run(a_run(tmp_path / "simgcd", digits, backbone, "simgcd"), tmp_path / "out")
        assert found["timm"] < 1e-5


@pytest.mark.slow
def test_exported_graphs_of_rotary_positions(digits, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    run = a_run(tmp_path / "run", digits, "vit_small_patch16_dinov3")
    found = export_run(run, tmp_path / "out", onnx=True, pt2=True)
    assert set(found) == {"timm", "torch.export", "onnxruntime"}
    assert max(found.values()) < 1e-5


def test_the_whole_way(digits, tmp_path, capsys):
    """Train, evaluate, features, classes, predict, export and a page, with rotary positions and DINOv3's registers."""
    run, pile = tmp_path / "run", tmp_path / "pile"
    settings = [f"run={run}", f"data.root={digits}", "init=null", "schedule.epochs=1", "schedule.k=3", "data.workers=0",
                "evaluate.every=1", "model.backbone=vit_small_patch16_dinov3", "model.train_from_block=-1",
                TINY]  # fmt: skip
    assert main(["train", str(ROOT / "configs" / "quickstart.yaml"), *settings]) == 0
    assert "normalised by" in (run / "log.txt").read_text()
    before = (run / "metrics.json").read_bytes()
    assert main(["eval", str(run)]) == 0
    assert (run / "metrics.json").read_bytes() == before
    assert main(["features", str(digits), "--out", str(tmp_path / "f"), "--run", str(run)]) == 0
    assert FeatureFolder(tmp_path / "f", LocalStore(digits).manifest).split("test").width == 48
    pile.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(pile / "a.png")
    assert main(["predict", str(run), str(pile), "--out", str(tmp_path / "sorted")]) == 0
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    assert main(["report", str(run), "--html", str(tmp_path / "page.html")]) == 0
    capsys.readouterr()


def test_pixels_of_siglip_in_every_fingerprint(digits, tmp_path):
    """With a pooling by attention, tokens of known views in a cache; mean and deviation of 0.5 wherever they count."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    settings = [f"run={run}", f"data.root={digits}", "schedule.epochs=4", "data.views=2", "data.workers=0",
                "evaluate.every=4", f"trunk_cache={cache}", "model.backbone=vit_base_patch16_siglip_224",
                "model.train_from_block=-1", TINY]  # fmt: skip
    assert main(["train", str(ROOT / "configs" / "quickstart_simgcd.yaml"), *settings]) == 0
    (told,) = [json.loads(path.read_text()) for path in cache.glob("*/*.json")]
    assert (told["mean"], told["std"]) == (HALF, HALF)
    log = (run / "log.txt").read_text()
    assert "mean 0.5 0.5 0.5, deviation 0.5 0.5 0.5" in log
    assert str(cache) in log
    facts = read_facts(run)
    assert (list(facts.mean), list(facts.std)) == (HALF, HALF)
    trained = TrainedRun(run)
    assert trained.encoder.fingerprint()["mean"] == HALF
    assert trained.normalise(torch.tensor([[[[255]], [[0]], [[51]]]], dtype=torch.uint8)).flatten().tolist() == (
        pytest.approx([1.0, -1.0, -0.6], abs=1e-6)
    )
    checkpoint = json.loads(sorted(run.glob("checkpoints/*/checkpoint.json"))[-1].read_text())
    assert checkpoint["numbers"]["model.mean"] == HALF
    # a timm that says otherwise of the same name
    with safe_open(run / "model.safetensors", "pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        facts = json.loads(opened.metadata()["facts"])
    save_file(state, run / "model.safetensors", {"facts": json.dumps(facts | {"mean": [0.4, 0.5, 0.5]})})
    with pytest.raises(RunError, match="use the version of timm"):
        load_model(run, trained.encoder.module, None)


def test_names_are_listed_with_their_licence(capsys):
    assert main(["backbones", "Beit_"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["name", "width", "depth", "patch"]
    names = {line.split()[0]: line for line in lines}
    assert "beit_base_patch16_224.in22k_ft_in22k" in names
    assert all("beit_" in name for name in names)
    assert names["beit_base_patch16_224.in22k_ft_in22k"].split()[1:] == (
        ["768", "12", "16", "224", "85.8", "M", "apache-2.0"]
    )
    assert main(["backbones", "vit_small_patch16_dinov3.lvd"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("dinov3-license")


def test_names_that_cannot_be_used_say_why(capsys):
    assert main(["backbones", "swin_tiny"]) == 1
    assert "is a SwinTransformer: hierarchical" in capsys.readouterr().err
    assert main(["backbones", "nonsense"]) == 1
    assert "timm has no model with 'nonsense'" in capsys.readouterr().err
