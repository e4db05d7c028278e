"""Gradient checkpointing: which blocks compute again, and that they compute the same."""

from collections import Counter

import pytest
import torch

from sptnet.config_sections import Every
from sptnet.method.model import create_model
from sptnet.strategy.recompute import checkpoint_blocks

DEPTH = 5


def gradients(spec):
    """Of the prompt and the trained weights, and how often every block computed."""
    model = create_model(
        "vit_tiny_patch16_224", 2, 2, image_size=16, weights="none",
        backbone_options={"patch_size": 8, "embed_dim": 24, "depth": DEPTH, "num_heads": 3},
    )  # fmt: skip
    passes = Counter()
    for number, block in enumerate(model.backbone.blocks):
        block.norm2.register_forward_pre_hook(lambda *_, number=number: passes.update([number]))
    checkpoint_blocks(model, spec)
    generator = torch.Generator().manual_seed(0)
    images, prompt = (torch.randn(n, 3, 16, 16, generator=generator) for n in (3, 1))
    outputs = model(images, prompt.requires_grad_())
    (outputs.logits.square().sum() + outputs.projections.square().sum()).backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    return [prompt.grad, *trained], [passes[number] for number in range(DEPTH)]


@pytest.mark.parametrize(
    ("spec", "passes"),
    [("full", [2, 2, 2, 2, 2]), (Every(every=2), [2, 1, 2, 1, 2]), (Every(every=3), [1, 2, 1, 1, 2])],
)
def test_every_n_th_block_counted_from_the_last_computes_twice_and_the_same(spec, passes):
    expected, once = gradients("none")
    assert once == [1] * DEPTH
    found, counted = gradients(spec)
    assert counted == passes
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
