"""Attention by explicit products: which passes have it, and that it computes the same."""

from collections import Counter

import pytest
import torch
from launching import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from sptnet.cli import main
from sptnet.method.model import create_model
from sptnet.strategy.attention import attend_by_products, choose_attention
from sptnet.strategy.recompute import checkpoint_blocks

BLOCKS = 3  # the last one attends with one query, by products of its own


class Kernels(TorchDispatchMode):
    """Counts calls of torch's fused attention."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls["backward" if name.endswith("backward") else "forward"] += "flash_attention" in name
        return function(*args, **(kwargs or {}))


def tiny(backbone="vit_tiny_patch16_224", image_size=24, train_from_block=-1):
    return create_model(
        backbone, 2, 2, image_size=image_size, weights="none", train_from_block=train_from_block,
        backbone_options={"patch_size": 8, "embed_dim": 48, "depth": BLOCKS, "num_heads": 3},
    )  # fmt: skip


def gradient_of_prompt(model):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, model.image_size, model.image_size, generator=generator)
    prompt = torch.randn(1, *images.shape[1:], generator=generator, requires_grad=True)
    with Kernels() as counted:
        logits = model(images, prompt).logits
        logits.square().sum().backward()
    return logits.detach(), prompt.grad, counted.calls


@pytest.mark.parametrize("recomputed", ["none", "full"])
@pytest.mark.parametrize(
    "backbone",
    ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_18x2_224", "vit_base_patch16_xp_224",
     "vit_pwee_patch16_reg1_gap_256"],
)  # fmt: skip
def test_passes_with_a_gradient_compute_the_same_by_products(backbone, recomputed):
    plain, model = tiny(backbone), tiny(backbone)
    attend_by_products(model)
    for each in (plain, model):
        checkpoint_blocks(each, recomputed)
    assert list(model.state_dict()) == list(plain.state_dict())
    *expected, fused = gradient_of_prompt(plain)
    assert fused["forward"] >= BLOCKS - 1
    assert fused["backward"] >= BLOCKS - 1
    *found, explicit = gradient_of_prompt(model)
    assert not explicit["forward"]
    assert not explicit["backward"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_passes_that_lead_no_gradient_have_the_same_bits():
    plain, model = tiny(), tiny()
    attend_by_products(model)
    gradient_of_prompt(model)
    images = torch.randn(2, 3, 24, 24)
    # a model step: its trunk is frozen, and what a cache of it keeps was computed without a gradient
    with Kernels() as counted:
        found = model(images).logits
    assert found.requires_grad
    assert counted.calls["forward"] == BLOCKS - 1
    with torch.no_grad():
        assert torch.equal(found, plain(images).logits)


def test_trained_blocks_lead_a_gradient():
    model = tiny(train_from_block=1)
    attend_by_products(model)
    with Kernels() as counted:
        model(torch.randn(2, 3, 24, 24)).logits.sum().backward()
    assert counted.calls == {"forward": 1, "backward": 0}


def test_long_sequences_stay_as_they_are():
    model = tiny(image_size=8 * 25)
    attend_by_products(model)
    assert not any(block._forward_pre_hooks for block in model.backbone.blocks)


def test_it_is_chosen_in_bf16_on_a_cpu_with_instructions_for_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    cases = [(0, cpu, "bf16", 1), (1, cpu, "bf16", 1), (1, cpu, "no", 1), (1, cpu, "fp16", 1), (1, gpu, "bf16", 1)]
    for able, device, precision, pieces in [*cases, (1, cpu, "bf16", 2)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: bool(able))
        choose_attention(model := tiny(), device, precision, pieces)
        assert bool(model.backbone.blocks[0]._forward_pre_hooks) is ((able, device, precision, pieces) == cases[1])


def test_a_run_has_it(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    settings = [f"run={tmp_path / 'run'}", f"data.root={digits}", "schedule.epochs=1", "data.batch_size=512",
                "data.workers=0", "model.train_from_block=0", "trunk_cache=off",
                "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}"]  # fmt: skip
    with Kernels() as counted:
        assert main(["train", f"{ROOT}/configs/quickstart_simgcd.yaml", *settings]) == 0
    assert counted.calls["backward"] == 0
    assert counted.calls["forward"] > 0  # evaluations
