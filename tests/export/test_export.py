"""An exported run does what the run does, through readers that know nothing of it; what cannot be is refused."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from sptnet.cli import main
from sptnet.data.augment import eval_view, normalise
from sptnet.data.format.temporary import temporary_of
from sptnet.data.image import decode
from sptnet.data.reader import ShardReader
from sptnet.data.storage.store import LocalStore
from sptnet.export import folder as export_folder
from sptnet.export.folding import ExportError, folded_position_embedding, plain_state, preprocessing
from sptnet.export.origin import origin_of
from sptnet.method.families import IMAGENET
from sptnet.method.model import create_model
from sptnet.method.prompts import create_prompt
from sptnet.trained import TrainedRun

READERS = Path(__file__).with_name("plain_readers.py")


def images_of(root: Path, run: TrainedRun, kind: str) -> torch.Tensor:
    """Every image of a split as an evaluation sees it: uint8 [N, 3, S, S]."""
    store = LocalStore(root)
    reader = ShardReader(store, store.manifest.of_kind(kind))
    encoded = [reader.read(n, i).image for n, shard in enumerate(reader.shards) for i in range(shard.samples)]
    return torch.stack([eval_view(run.encoder.augment, decode(one), run.encoder.image_size) for one in encoded])


def test_a_whole_test_set_through_everybody_elses_readers(untrained, digits, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(package)
    out = tmp_path / "exported"
    assert main(["export", str(untrained), str(out), "--onnx", "--pt2"]) == 0
    assert "onnxruntime" in capsys.readouterr().out
    run = TrainedRun(untrained)
    images = images_of(digits, run, "test")
    assert len(images) == 359
    expected = run.forward(images)
    np.savez(tmp_path / "pixels.npz", images=run.normalise(images).numpy())
    # -S: no .pth file is read, by which the project is installed beside its packages
    command = [sys.executable, "-I", "-S", READERS, out, tmp_path / "pixels.npz", tmp_path / "found.npz"]
    ran = subprocess.run(
        [*command, sysconfig.get_path("purelib")], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "size=(24, 24)" in ran.stdout
    found = np.load(tmp_path / "found.npz")
    cosines, features = expected.logits.numpy(), expected.features.numpy()
    classes = cosines.argmax(1)
    assert len(set(classes.tolist())) >= 3
    for name in ("timm", "transformers"):
        np.testing.assert_array_equal(found[name].argmax(1), classes)
        length = np.linalg.norm(found["timm_token"], axis=1, keepdims=True)
        np.testing.assert_allclose(found[name] / length, cosines, atol=1e-5)
    shares = torch.softmax(expected.logits / run.temperature, 1).numpy()
    for name in ("pt2", "onnx"):
        np.testing.assert_array_equal(found[f"{name}_logits"].argmax(1), classes)
        np.testing.assert_allclose(found[f"{name}_logits"], cosines, atol=1e-5)
        np.testing.assert_allclose(found[f"{name}_embedding"], features, atol=1e-4)
        np.testing.assert_allclose(found[f"{name}_probabilities"], shares, atol=1e-5)


KINDS_OF_VIT = {
    "as DINO's": {},
    "registers, positions of patches alone": {"reg_tokens": 4, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 4},
    "a norm before the blocks": {"pre_norm": True},
    "norms of queries and keys, scaled layers": {"qk_norm": True, "init_values": 0.1},
}


@pytest.mark.parametrize("options", KINDS_OF_VIT.values(), ids=KINDS_OF_VIT)
@pytest.mark.parametrize("kind", ["all", "shared", None])
def test_the_prompt_folds_into_any_vit(options, kind):
    options = {"embed_dim": 48, "depth": 2, "num_heads": 3, **options}
    model = create_model(
        "vit_tiny_patch16_224", 3, 4, image_size=48, weights="none", backbone_options=options, head_hidden=8
    ).eval()
    prompt = None
    if kind is not None:
        prompt = create_prompt(kind, 48, 16, 1, 6, torch.Generator().manual_seed(0))().detach() * 3
    plain = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=7, global_pool="token", img_size=48, **options
    ).eval()
    plain.load_state_dict(plain_state(model, prompt))
    images = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images, prompt)
        token = plain.forward_head(plain.forward_features(images), pre_logits=True)
        torch.testing.assert_close(token, expected.features, atol=2e-5, rtol=0)
        cosines = plain(images) / token.norm(dim=1, keepdim=True)
        torch.testing.assert_close(cosines, expected.logits, atol=1e-5, rtol=0)
        if kind is not None:
            assert (model(images).features - expected.features).abs().max() > 1e-2


def test_what_does_not_fold_is_refused(untrained, tmp_path, capsys):
    model = TrainedRun(untrained).encoder.module
    with pytest.raises(ExportError, match=r"of images of 48 x 48 pixels, the backbone of 24 x 24"):
        folded_position_embedding(model.backbone, torch.zeros(1, 3, 48, 48))
    model.backbone.patch_embed.norm = torch.nn.LayerNorm(48)
    with pytest.raises(ExportError, match="a norm of its own"):
        folded_position_embedding(model.backbone, torch.zeros(1, 3, 24, 24))
    # a run whose configuration was given another size
    other = Path(shutil.copytree(untrained, tmp_path / "other"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["model"]["image_size"] = 48
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", str(other), str(tmp_path / "out")]) == 1
    assert "is of another PromptedViT than the configuration says" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_is_whole_or_not_there(untrained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(["export", str(untrained), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "num_classes" not in json.loads((out / "config.json").read_text())["model_args"]
    assert main(["export", str(untrained), str(out)]) == 1
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "again.tmp").mkdir()  # somebody's own
    killed = Path(str(temporary_of(tmp_path / "again")).replace(f".{os.getpid()}.", f".{2**22 + 1}."))
    killed.mkdir()
    (killed / "left").write_text("by an export that was killed")
    monkeypatch.setattr(export_folder, "LARGEST_DIFFERENCE", -1.0)
    assert main(["export", str(untrained), str(tmp_path / "again")]) == 1
    assert "nothing was exported" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.tmp", "out"]
    assert main(["export", str(untrained), "/dev/null/out"]) == 1
    assert "/dev/null/out cannot be written: Not a directory" in capsys.readouterr().err


def test_onnx_without_its_packages_is_one_line(untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(untrained), str(tmp_path / "out"), "--onnx"]) == 1
    assert capsys.readouterr().err == (
        "error: --onnx needs onnx, onnxscript, onnxruntime (in the checkout: pip install -c constraints.txt -e "
        "'.[onnx]')\n"
    )


def test_onnx_packages_that_do_not_fit_are_one_line(untrained, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise ModuleNotFoundError("No module named 'onnxscript._framework_apis.torch_2_11'")

    monkeypatch.setattr(torch.onnx, "export", fail)
    assert main(["export", str(untrained), str(tmp_path / "out"), "--onnx"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(r"torch 2\.\S+ and onnxscript \S+ do not fit: .*torch_2_11'; pip install -U onnxscript", line)


def test_a_hub_that_is_not_there_is_one_line_and_the_folder_stays(untrained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(["export", str(untrained), str(out), "--push", "no/name/of/one"]) == 1
    assert "--push no/name/of/one" in capsys.readouterr().err
    assert main(["export", str(untrained), str(out), "--push", "digits"]) == 1
    assert "name its owner too, as OWNER/digits" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert main(["export", str(untrained), str(out), "--push", "me/digits"]) == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "is written, and could not be sent to me/digits" in told
    assert 'create_model("hf-hub:me/digits"' in (out / "README.md").read_text()


def test_what_is_sent_to_the_hub(untrained, tmp_path, capsys, monkeypatch):
    """The hub itself is not at hand: what its client is asked for."""
    hub, sent = pytest.importorskip("huggingface_hub"), []

    def upload(api, *, repo_id, folder_path, **options):
        sent.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(hub.HfApi, "create_repo", lambda api, repo, **options: hub.RepoUrl(f"{api.endpoint}/{repo}"))
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    assert main(["export", str(untrained), str(tmp_path / "out"), "--push", "me/digits"]) == 0
    assert sent == [("me/digits", ["README.md", "config.json", "model.safetensors"])]
    assert "/me/digits" in capsys.readouterr().out


def test_the_card_says_what_it_is(untrained, tmp_path):
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    assert main(["eval", str(run)]) == 0
    (run / "starts.jsonl").write_text('damaged\n{"time": "2026-01-01", "git": "abc123", "packages": {"torch": "2"}}\n')
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["license"]) == ("timm", "other")
    metrics = json.loads((run / "metrics.json").read_text())
    for told in (
        "| unlabelled (transductive) |", f"| {100 * metrics['test']['all']:.1f} |", "the ids 5 to 9 are **new**",
        "| 5 | new | new\\-000 |", "labelled\\_fraction", "abc123",
    ):  # fmt: skip
        assert told in card


def test_a_run_is_exported_where_its_images_are_not(untrained, tmp_path):
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["root"] = str(tmp_path / "gone" / "digits")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert main(["export", str(run), str(tmp_path / "link")]) == 0
    card = (tmp_path / "empty" / "README.md").read_text()
    assert "not there when this was exported" in card
    assert "on digits" in card


def test_hostile_names_are_text_in_the_card(untrained, digits, tmp_path):
    data = Path(shutil.copytree(digits, tmp_path / "data"))
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["classes"][0] = "</td><script>alert(1)</script> | `x` *b*"
    manifest["name"] = "--- a: b"
    (data / "manifest.json").write_text(json.dumps(manifest))
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["root"] = str(data)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    weights = run / "model.safetensors"
    save_file(load_file(weights), weights, {"facts": '{"step": 1}'})  # of a version that asked the dataset for names
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script" not in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "timm"
    named = json.loads((tmp_path / "out" / "config.json").read_text())["label_names"]
    assert named[0] == manifest["classes"][0]
    assert "head.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_the_licence_follows_the_weights(untrained, tmp_path):
    config = TrainedRun(untrained).config

    def licence(**given):
        model = config.model.model_copy(update={"weights": given.pop("weights", "none")} | given)
        return origin_of(config.model_copy(update={"model": model}))

    assert licence().told == "Nothing pretrained is in these weights."
    dino = licence(weights="timm", backbone="vit_base_patch16_224.dino")
    assert (dino.licence, dino.base_model) == ("apache-2.0", "timm/vit_base_patch16_224.dino")
    dinov3 = licence(weights="timm", backbone="vit_small_patch16_dinov3.lvd1689m")
    assert (dinov3.licence, dinov3.licence_name) == ("other", "dinov3-license")
    assert licence(weights="/a/b.safetensors").licence_name == "of-the-pretrained-weights"
    # from the authors' files, also at second hand, whether or not the file is there still
    (tmp_path / "authors").write_bytes(b"")
    for init in (str(tmp_path / "authors"), "gone/model.pt"):
        first = Path(shutil.copytree(untrained, tmp_path / init.replace("/", "-")))
        told = yaml.safe_load((first / "config.yaml").read_text()) | {"init": init}
        (first / "config.yaml").write_text(yaml.safe_dump(told))
        second = config.model_copy(update={"init": str(first)})
        assert origin_of(second).licence == "cc-by-nc-sa-4.0"
    assert "CC BY-NC-SA 4.0 too" in origin_of(config.model_copy(update={"init": "runs/gone"})).told


@pytest.mark.parametrize("augment", ["crop_flip", "affine"])
def test_preprocessing_in_timm_s_words_is_the_evaluation_s(augment):
    """Of a photograph that is no square: timm resizes by Pillow, we by torch, which differ by a few levels of 255."""
    draws = np.random.default_rng(0)
    photo = Image.fromarray(draws.integers(0, 256, (12, 18, 3), np.uint8)).resize((450, 300), Image.Resampling.BICUBIC)
    config = preprocessing(augment, IMAGENET) | {"input_size": (3, 224, 224)}
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))(photo)
    encoded = io.BytesIO()
    photo.save(encoded, "png")
    ours = normalise(eval_view(augment, decode(encoded.getvalue()), 224)[None], IMAGENET)[0]
    difference = (theirs - ours).abs() * 255 * 0.225
    assert difference.mean() < 1
    assert difference.max() < 12
    others = {"crop_flip": "affine", "affine": "crop_flip"}
    swapped = normalise(eval_view(others[augment], decode(encoded.getvalue()), 224)[None], IMAGENET)[0]
    assert ((theirs - swapped).abs() * 255 * 0.225).mean() > 5
