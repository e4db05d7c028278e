"""Where FSDP2 keeps frozen blocks."""

import pytest
import torch

from sptnet.strategy.frozen import frozen_bytes, least_memory, matrices, place_frozen

GB = 10**9


@pytest.mark.parametrize(
    ("asked", "taken", "memory", "whole", "told"),
    [
        ("auto", 3 * GB, 80 * GB, True, "whole on every rank: 3 GB are 3.8% of a rank's 80 GB, below 5%"),
        ("auto", 4 * GB, 80 * GB, False, "sharded: 4 GB are 5% of a rank's 80 GB, not below 5%"),
        ("whole", 40 * GB, 80 * GB, True, "whole on every rank, as memory.frozen_blocks says: 40 GB in all"),
        ("sharded", 3 * GB, 80 * GB, False, "sharded, as memory.frozen_blocks says: 3 GB in all"),
        ("sharded", 0, 80 * GB, True, ""),
    ],
)
def test_they_are_whole_where_they_take_little(asked, taken, memory, whole, told):
    assert place_frozen(asked, taken, memory) == (whole, told)


def test_what_is_counted(monkeypatch):
    from sptnet.method.model import create_model

    options = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model = create_model("vit_tiny_patch16_224", 2, 2, image_size=24, weights="none", backbone_options=options)
    frozen = [p for block in model.backbone.blocks[:2] for p in block.parameters()]
    assert frozen_bytes(model) == 4 * sum(p.numel() for p in frozen)
    gathered = matrices(model.backbone.blocks[0])
    assert sum(p.numel() for p in gathered) == 12 * 48 * 48
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = least_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert least_memory(torch.device("cpu")) == alone // 4
    assert alone > GB
