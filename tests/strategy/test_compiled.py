"""Blocks under torch.compile, really compiled. Worlds of several processes: tests/multiprocess/test_world_size.py."""

import pytest
import torch
from torch._dynamo.utils import counters

from sptnet.build import check_strategy
from sptnet.config import ConfigError
from sptnet.config_file import load_config
from sptnet.method.model import create_model
from sptnet.run.outcome import explain
from sptnet.strategy.compiled import compile_blocks
from sptnet.strategy.connect import connect
from sptnet.strategy.create import create_strategy
from sptnet.strategy.recompute import checkpoint_blocks


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(depth=1):
    options = {"patch_size": 8, "embed_dim": 48, "depth": depth, "num_heads": 3}
    return create_model("vit_tiny_patch16_224", 2, 2, image_size=24, weights="none", backbone_options=options)


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def gradient(model, images, prompt):
    prompt = prompt.clone().requires_grad_()
    model(images, prompt).logits.square().sum().backward()
    return prompt.grad, model.backbone.blocks[-1].mlp.fc1.weight.grad


def test_a_step_is_compiled_and_an_evaluation_is_not():
    plain, model = tiny(), tiny()
    compile_blocks(model)
    checkpoint_blocks(model, "full")
    assert list(model.state_dict()) == list(plain.state_dict())
    images, prompt = torch.randn(6, 3, 24, 24), torch.randn(1, 3, 24, 24)
    for expected, got in zip(gradient(plain, images, prompt), gradient(model, images, prompt), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert (before := compiled_graphs()) > 0
    accelerator, launch = connect(60, "cpu")
    strategy = create_strategy(accelerator, launch, model, lambda m: torch.optim.SGD(m.parameters(), fused=True), 6)
    strategy.compiled = True
    found = strategy.forward_evaluation(images[:5], None).logits
    assert compiled_graphs() == before
    assert torch.equal(found, plain(images[:5], None).logits)


def test_what_a_cache_keeps_is_computed_as_the_cache_computes_it():
    model = tiny(depth=2)
    model.round_tokens = torch.float16
    compile_blocks(model)
    assert ["forward" in vars(block) for block in model.backbone.blocks] == [False, True]


def test_zero3_is_refused(tmp_path):
    config = load_config("quickstart", [f"run={tmp_path}", "init=null", "compile=true"])
    _, launch = connect(60, "cpu")
    with pytest.raises(ConfigError, match="compile: ZeRO-3 gathers weights in the middle of a block"):
        check_strategy(config, launch._replace(strategy="zero3"))
    check_strategy(config, launch)


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    model = tiny()
    compile_blocks(model)
    with torch._inductor.utils.fresh_cache(), pytest.raises(RuntimeError) as raised:
        model(torch.randn(3, 3, 24, 24))
    told, outcome = explain(raised.value)
    assert told.startswith("torch.compile failed: set compile=false"), told
    assert "\n" not in told
    assert outcome == "final"
