"""A slice in pieces: the step of the whole one, through the frozen trunk once."""

import pytest
import torch
from accelerate.state import AcceleratorState

from sptnet.build import assemble
from sptnet.config_file import load_config
from sptnet.method.model import create_model
from sptnet.method.prompts import create_prompt
from sptnet.method.schedule import Schedule
from sptnet.strategy.connect import connect

SIZE, IMAGES, PIECES = 24, 8, 3
OPTIONS = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


@pytest.fixture(autouse=True)
def _one_process():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def learner_of(method, pieces, first=-1, rounded=None, pair="copy"):
    config = load_config(
        f"configs/quickstart{'_simgcd' if method == 'simgcd' else ''}.yaml",
        ["data.root=nowhere", f"data.batch_size={IMAGES}", *(["init=null"] if method == "sptnet" else []),
         f"memory.micro_batches={pieces}", "optimizer.name=sgd", "optimizer.lr=0.1", f"prompts.pair={pair}"],
    )  # fmt: skip
    model = create_model(
        "vit_tiny_patch16_224", 3, 3, image_size=SIZE, weights="none", backbone_options=OPTIONS,
        train_from_block=first, head_hidden=64, head_bottleneck=16,
    )  # fmt: skip
    model.round_tokens = rounded
    prompt = create_prompt("all", SIZE, 8, 1, 3, torch.Generator().manual_seed(0)) if method == "sptnet" else None
    shape = "alternating" if method == "sptnet" else "model_only"
    accelerator, launch = connect(60)
    return assemble(config, accelerator, launch, model, prompt, Schedule(10, 100, phase_schedule=shape, k=4))


def taken(learner, passes=None, kept=False):
    """Weights behind a step of the model phase; `passes` gets the images that go through each block."""
    step = next(step for step in range(9) if learner.schedule.phase(step) == "model")
    module = learner.strategy.module
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(learner.views_at(step), IMAGES, 3, SIZE, SIZE, generator=generator)
    if kept:
        with torch.no_grad():
            views = module.trunk(views.flatten(0, 1)).unflatten(0, (2, IMAGES))
    counts = [0] * len(module.backbone.blocks)
    for i, block in enumerate(module.backbone.blocks):
        block.register_forward_pre_hook(lambda _, tokens, i=i: counts.__setitem__(i, counts[i] + len(tokens[0])))
    done = learner.step(step, views, torch.arange(IMAGES) % 3, None)
    if passes is not None:
        passes += [count // (2 * IMAGES) for count in counts]
    return [*done.terms, *(p.detach().clone() for _, p in learner.strategy.trained())]


@pytest.mark.parametrize(
    ("method", "first", "rounded", "expected"),
    [
        ("simgcd", -1, None, [1, 1, 1, 2]),
        ("simgcd", 2, torch.float16, [1, 1, 2, 2]),
        ("sptnet", -1, None, [1, 1, 1, 2]),
        ("sptnet", 4, None, [1, 1, 1, 1]),
        ("sptnet", 0, None, [2, 2, 2, 2]),
    ],
)
def test_the_frozen_trunk_runs_once_and_the_step_is_that_of_the_whole_slice(method, first, rounded, expected):
    passes: list[int] = []
    pieces = taken(learner_of(method, PIECES, first, rounded), passes)
    whole = taken(learner_of(method, 1, first, rounded))
    assert passes == expected
    for ours, theirs in zip(pieces, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_pair_of_two_views_is_the_first_as_it_is_and_the_second_with_the_prompt():
    prompted, plain = learner_of("sptnet", 1, pair="views"), learner_of("sptnet", 1)
    assert plain.views_at(4) == 1
    plain.prompt = None
    prompt, step = prompted.prompt().detach(), 4
    assert prompted.schedule.phase(step) == plain.schedule.phase(step) == "model"
    assert [prompted.views_at(phase) for phase in (0, step)] == [2, 2]
    views = torch.randn(2, IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    terms = prompted.step(step, views, torch.arange(IMAGES) % 3, None).terms
    by_hand = plain.step(step, torch.stack([views[0], views[1] + prompt]), torch.arange(IMAGES) % 3, None).terms
    torch.testing.assert_close(terms, by_hand, rtol=1e-6, atol=0)
    without = plain.step(step, views, torch.arange(IMAGES) % 3, None).terms
    assert abs(terms.total - without.total) > 1e-3


def test_a_pair_of_two_views_in_pieces_is_that_of_the_whole_slice():
    passes: list[int] = []
    pieces = taken(learner_of("sptnet", PIECES, pair="views"), passes)
    assert passes == [1, 1, 1, 2]
    for ours, theirs in zip(pieces, taken(learner_of("sptnet", 1, pair="views")), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_kept_tokens_go_through_no_trunk():
    passes: list[int] = []
    pieces = taken(learner_of("simgcd", PIECES), passes, kept=True)
    assert passes == [0, 0, 0, 2]
    for ours, theirs in zip(pieces, taken(learner_of("simgcd", 1)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
