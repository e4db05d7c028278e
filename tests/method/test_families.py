"""Every ViT of timm that this project takes: features of prompted images are timm's of prompted pixels."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from sptnet.method.families import IMAGENET, MODULES, BackboneError
from sptnet.method.last_block import BeitClassTokenBlock, ClassTokenBlock, EvaClassTokenBlock
from sptnet.method.model import DINOHead, PromptedViT, create_model, plain_backbone

GRID = 2  # patches a side
STEMS = ("vit_base_mci", "_r26_", "_r50_", "resnet", "vit_tiny_r_")  # of vision_transformer_hybrid
NAMES = [name for module in MODULES for name in timm.list_models(module=module)]
# one of each way to be taken apart
FAMILIES = {
    "positions, pooled by attention": "vit_base_patch16_siglip_224",
    "positions, pooled by average": "vit_base_patch16_siglip_gap_224",
    "takes any size": "test_vit",
    "rotary, DINOv3": "vit_small_patch16_dinov3",
    "rotary and positions, norm behind the pooling": "eva02_tiny_patch14_224",
    "rotary, learned frequencies": "vit_small_patch16_rope_mixed_224",
    "rotary, shared heads of keys": "vit_base_patch16_sapiens2",
    "relative positions": "beit_base_patch16_224",
    "relative positions, by a network": "vit_relpos_small_patch16_224",
}


def small(name: str) -> tuple[int, dict]:
    """Pixels and arguments that make a model small, its kind as timm's own entry point has it."""
    found = re.search(r"patch(\d+)", name)
    told = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    # Sapiens2's heads of keys are a list, with a number for each of its blocks
    return GRID * int(found[1] if found else 16), told | ({"num_kv_heads": 1} if "sapiens2" in name else {})


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter counts: as they come, many are 0 or 1."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * (0.15 if parameter.ndim > 1 else 0.3))
    return module


def images_and_prompt(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, size, size, generator=draws), torch.randn(1, 3, size, size, generator=draws)


def features_of(plain, images: torch.Tensor) -> torch.Tensor:
    tokens = plain.forward_features(images)
    if hasattr(plain, "dist_token"):  # timm averages two heads' tokens, ours reads the class token
        return tokens[:, 0]
    return plain.forward_head(tokens, pre_logits=True)


@pytest.mark.parametrize("name", NAMES)
def test_prompted_features_are_timms_of_prompted_pixels(name):
    size, options = small(name)
    plain = randomised(plain_backbone(name, size, False, options)).eval()
    images, prompt = images_and_prompt(size)
    with torch.no_grad():
        expected, clean = features_of(plain, images + prompt), features_of(plain, images)
        model = PromptedViT(plain, DINOHead(32, 4, 8, 8), -1).train()  # nothing of training is random
        found = model(images, prompt, with_clean=True).features
    torch.testing.assert_close(found, torch.cat([clean, expected]), atol=1e-4, rtol=0)
    assert (clean - expected).abs().max() > 1e-2


def built(name: str, **options) -> PromptedViT:
    size, told = small(name)
    return create_model(
        name, 3, 2, image_size=size, weights="none", backbone_options=told, head_hidden=8, head_bottleneck=8, **options
    )


def test_it_is_these_names():
    """A name that a new timm adds is tested with the others; these are what the documents count."""
    kinds: dict[str, int] = {}
    for name in NAMES:
        kind = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + 1
    assert kinds["eva"] >= 65
    assert kinds["beit"] >= 7
    assert len(NAMES) >= 265


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_trained_parts_and_gradients(name):
    model = randomised(built(name))
    assert {n for n, p in model.backbone.named_parameters() if p.requires_grad} == {
        n for n, _ in model.backbone.named_parameters() if n.startswith("blocks.1.")
    }
    images, prompt = images_and_prompt(model.image_size)
    # tokens that were kept lead to the same as their images
    assert torch.equal(model(model.trunk(images)).features, model(images).features)
    twin = randomised(built(name, train_from_block=0))
    twin.load_state_dict(model.state_dict())
    ours, plain = (
        torch.autograd.grad(features.square().sum(), prompt)[0]
        for prompt in [prompt.requires_grad_()]
        for features in (model(images, prompt).features, twin(images + prompt).features)
    )
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-3)
    whole = twin(images)
    # of every parameter: autograd refuses one that the outputs do not depend on
    for gradient in torch.autograd.grad(whole.projections.sum() + whole.logits.square().sum(), list(twin.parameters())):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_half_precision(name):
    model = randomised(built(name))
    images, prompt = images_and_prompt(model.image_size)
    with torch.no_grad():
        exact = model(images, prompt).features
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images, prompt).features
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.05 * exact.norm()


def test_shortcuts_of_the_last_block():
    for name, kind in (
        ("vit_tiny_patch16_224", ClassTokenBlock), ("vit_small_patch16_dinov3", EvaClassTokenBlock),
        ("vit_base_patch16_sapiens2", EvaClassTokenBlock), ("beit_base_patch16_224", BeitClassTokenBlock),
    ):  # fmt: skip
        model = built(name)
        assert type(model.backbone.blocks[-1]) is kind
        with torch.no_grad():
            size = model.image_size
            assert model.backbone.blocks[-1](
                model.trunk(torch.zeros(1, 3, size, size)), **model.family.block_arguments(model.backbone)[-1]
            ).shape == (1, 1, 32)


def test_the_class_token_is_read_where_there_is_one():
    for name in (
        "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_pe_core_base_patch16_224",
    ):  # fmt: skip
        backbone = built(name).backbone
        assert timm.create_model(name, num_classes=0, **small(name)[1]).global_pool != "token"
        assert backbone.global_pool == "token"
        assert isinstance(backbone.fc_norm, torch.nn.Identity)
    assert built("vit_base_patch16_siglip_224").backbone.attn_pool is not None
    assert built("vit_base_patch16_siglip_gap_224").backbone.global_pool == "avg"


def test_statistics():
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    # CLIP's own are others: who has trained with ImageNet's goes on with them
    for name in ("vit_base_patch16_224.dino", "vit_base_patch16_clip_224.openai", "vit_base_patch16_224.augreg_in21k"):
        assert built(name).statistics == IMAGENET
    assert built("vit_base_patch16_siglip_224").statistics == half
    assert built("beit_base_patch16_224.in22k_ft_in22k").statistics == half
    assert built("vit_small_patch16_dinov3.lvd1689m").statistics == IMAGENET
    assert built("eva02_tiny_patch14_224").statistics[0] == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-3)


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_weights_from_a_file_in_timms_own_names(name, tmp_path):
    size, options = small(name)
    donor = randomised(timm.create_model(name, num_classes=7, img_size=size, **options))
    save_file(donor.state_dict(), tmp_path / "weights.safetensors")
    given = {"image_size": size, "backbone_options": options, "head_hidden": 8, "head_bottleneck": 8}
    model = create_model(name, 3, 2, weights=str(tmp_path / "weights.safetensors"), **given).eval()
    images, prompt = images_and_prompt(size)
    if model.backbone.global_pool == "token" and donor.global_pool != "token":
        donor.reset_classifier(0, "token")
    with torch.no_grad():
        expected = features_of(donor.eval(), images + prompt)
        torch.testing.assert_close(model(images, prompt).features, expected, atol=1e-4, rtol=0)
    # at another size positions are resized
    larger = create_model(
        name, 3, 2, weights=str(tmp_path / "weights.safetensors"), **{**given, "image_size": 2 * size}
    )
    assert larger.image_size == 2 * size
    save_file({"nonsense": torch.zeros(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(BackboneError, match="does not fit"):
        create_model(name, 3, 2, weights=str(tmp_path / "bad.safetensors"), **given)


@pytest.mark.parametrize("name", [*FAMILIES.values(), "eva_large_patch14_196"], ids=[*FAMILIES, "eva_large"])
def test_weights_of_the_hub_land_whole(name, tmp_path):
    """As timm loads them: beside a classifier that it leaves out, what does not fit is left out in silence."""
    size, options = small(name)
    donor = randomised(timm.create_model(name, num_classes=1000, img_size=size, **options))
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 1000, "custom_load": False}
    found = plain_backbone(name, size, True, options | {"pretrained_cfg_overlay": overlay}).state_dict()
    expected = donor.state_dict()
    for key, value in found.items():
        as_timm_has_it = key if key in expected else f"fc_{key}"
        assert torch.equal(value, expected[as_timm_has_it]), key


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("resnet18", "a ResNet: hierarchical"), ("swin_tiny_patch4_window7_224", "a SwinTransformer: hierarchical"),
        ("vit_base_r50_s16_224", "is a HybridEmbed, not linear"), ("vitamin_small_224", "is a HybridEmbed, not linear"),
        ("naflexvit_base_patch16_gap", "a NaFlexVit"), ("cait_xxs24_224", "a Cait"), ("volo_d1_224", "a VOLO"),
        ("samvit_base_patch16", "a VisionTransformerSAM"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_that_names_what_does(name, why):
    with pytest.raises(BackboneError) as raised:
        create_model(name, 3, 2, weights="none", backbone_options={"embed_dim": 32, "depth": 1})
    told = str(raised.value)
    assert why in told
    assert "\n" not in told
    assert name in told
    assert "vit_base_patch16_224.dino can" in told
    assert "`sptnet backbones` lists" in told
