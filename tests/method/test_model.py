"""The cheap formulations compute what the plain ones do; only what should be trained is."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sptnet import create_model, create_prompt
from sptnet.method.families import BackboneError
from sptnet.method.model import plain_backbone
from sptnet.method.weights import read_state_dict

TINY = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


def plain_twin(model, name, options):
    twin = timm.create_model(name, num_classes=0, global_pool="token", img_size=model.image_size, **options)
    twin.load_state_dict(model.backbone.state_dict())
    return twin


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", TINY),
        ("vit_small_patch14_dinov2", {**TINY, "init_values": 0.5}),
        ("vit_small_patch14_reg4_dinov2", {**TINY, "init_values": 0.5}),
        ("vit_tiny_patch16_224", {**TINY, "qkv_bias": False}),
        ("vit_tiny_patch16_224", {**TINY, "qk_norm": True}),  # its keys do not fold
    ],
)
def test_prompted_tokens_and_class_token_block_are_exact(name, options):
    model = create_model(name, 3, 2, image_size=32, weights="none", backbone_options=options, head_hidden=32)
    with torch.no_grad():
        for parameter in model.parameters():  # gains of norms begin at 1, their shifts and most biases at 0
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    prompt = create_prompt("all", 32, 8, 1, 3)
    images = torch.randn(4, 3, 32, 32)
    twin = plain_twin(model, name, options)
    torch.testing.assert_close(model(images, prompt()).features, twin(images + prompt()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images).features, twin(images), rtol=1e-5, atol=1e-5)
    parts = list(prompt.parameters())
    trained, of_twin = ([*m.blocks[-1].parameters()] for m in (model.backbone, twin))
    ours = torch.autograd.grad(model(images, prompt()).features.square().sum(), parts + trained)
    plain = torch.autograd.grad(twin(images + prompt()).square().sum(), parts + of_twin)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    both = model(images, prompt(), with_clean=True).logits
    torch.testing.assert_close(both, torch.cat([model(images).logits, model(images, prompt()).logits]))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is computed; a view of one that was there is none."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        there = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in there:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "beit_base_patch16_224"])
def test_tokens_that_no_gradient_leads_to_are_not_differentiated(name):
    model = create_model(name, 3, 2, image_size=32, weights="none", backbone_options=TINY, head_hidden=32)
    with torch.no_grad():
        tokens = model.trunk(torch.randn(64, 3, 32, 32))
    with Largest() as forward:
        out = model(tokens)
        total = out.projections.sum() + out.logits.square().sum()
    with Largest() as backward:
        total.backward()
    assert all(parameter.grad is not None for parameter in model.backbone.blocks[-1].parameters())
    assert forward.elements == tokens.numel() > backward.elements


def test_prompt_sizes_of_the_paper():
    def count(kind):
        return sum(p.numel() for p in create_prompt(kind, 224, 16).parameters())

    assert (count("spatial"), count("global"), count("shared")) == (35_280, 69_840, 180)
    assert count("all") == 35_280 + 69_840
    with pytest.raises(ValueError, match="does not fit a patch"):
        create_prompt("spatial", 32, 8, border=5)


def test_where_prompts_begin():
    def at(deviation):
        return create_prompt("all", 32, 8, 1, 3, torch.Generator().manual_seed(3), deviation)()

    assert not at(0.0).any()
    torch.testing.assert_close(at(0.25), at(1.0) / 4)
    live = at(1.0)[at(1.0) != 0]
    assert 0.8 < live.std() < 1.5  # where border and frame meet there are two


@pytest.mark.parametrize(("start", "trained"), [(-1, {2}), (1, {1, 2}), (3, set()), (0, {0, 1, 2})])
def test_what_is_trained(start, trained):
    options = {"image_size": 32, "weights": "none", "backbone_options": TINY, "head_hidden": 32}
    model = create_model("vit_tiny_patch16_224", 3, 2, train_from_block=start, **options)
    names = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    assert {int(name.split(".")[1]) for name in names if name.startswith("blocks")} == trained
    assert any(name.startswith("patch_embed") for name in names) == (start == 0)
    assert all(p.requires_grad for p in model.head.parameters())


def test_same_seed_same_weights_and_torch_is_left_alone():
    before = torch.random.get_rng_state()
    first, second = (
        create_model("vit_tiny_patch16_224", 3, 2, image_size=32, weights="none", backbone_options=TINY)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_local_weights_are_resized_and_misfits_are_named(tmp_path):
    donor = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, **TINY)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in donor.state_dict().items()}}, tmp_path / "dino.pth")
    options = {"image_size": 32, "backbone_options": TINY}
    model = create_model("vit_tiny_patch16_224", 3, 2, weights=str(tmp_path / "dino.pth"), **options)
    assert model.backbone.pos_embed.shape[1] == 17
    assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, donor.blocks[0].attn.qkv.weight)
    torch.save({"nonsense": torch.zeros(1)}, tmp_path / "bad.pth")
    with pytest.raises(BackboneError, match="lacks blocks"):
        create_model("vit_tiny_patch16_224", 3, 2, weights=str(tmp_path / "bad.pth"), **options)
    with pytest.raises(BackboneError, match="resnet18"):
        create_model("resnet18", 3, 2, weights="none")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x80", bytes(100)])
def test_weights_that_did_not_arrive(tmp_path, suffix, content):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(BackboneError, match=rf"weights\.{suffix} is not a plain file of weights: .+"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("name", "status", "outcome"),
    [
        ("HTTPError", 429, "retry"),
        ("HTTPError", 503, "retry"),
        ("HTTPError", 404, "final"),
        ("ReadTimeout", None, "retry"),
        ("ConnectError", None, "final"),
    ],
)
def test_a_hub_that_is_busy_is_asked_again_later_and_one_that_is_not_there_is_not(monkeypatch, name, status, outcome):
    def unanswered(*_, **__):
        inner = type(name, (Exception,), {"response": SimpleNamespace(status_code=status)})(f"{name} {status}")
        raise RuntimeError("cannot load weights") from inner

    monkeypatch.setattr("sptnet.method.model._why_never", lambda _: None)
    monkeypatch.setattr("timm.create_model", unanswered)
    with pytest.raises(BackboneError, match="timm cannot build 'vit_tiny_patch16_224'") as raised:
        plain_backbone("vit_tiny_patch16_224", None, pretrained=True)
    assert raised.value.outcome == outcome
