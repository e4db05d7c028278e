"""Everything that the authors' implementations also compute, against what they computed."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from sptnet.method.families import BackboneError
from sptnet.method.losses import GCDLoss
from sptnet.method.metrics import clustering_accuracy
from sptnet.method.model import DINOHead
from sptnet.method.prompts import create_prompt
from sptnet.method.reference import FRAME_SIDES, _frame_image, load_reference
from sptnet.method.schedule import Schedule
from sptnet.steps import Learner
from sptnet.strategy.base import parameter_groups
from sptnet.strategy.launcher import launch_settings
from sptnet.strategy.plain import PlainStrategy


@pytest.mark.parametrize("epoch", [0, 5, 30])
def test_losses_and_their_gradient(reference, epoch):
    z = reference(f"losses_epoch{epoch}.npz")
    features = torch.tensor(z["features"], requires_grad=True)
    head = DINOHead(32, 10, 64, 24)
    state = {k.removeprefix("head."): torch.tensor(z[k]) for k in z.files if k.startswith("head.mlp")}
    head.load_state_dict(state | {"prototypes": torch.tensor(z["head.last_layer.weight_v"])})
    schedule = Schedule(int(z["epochs"]), 1, teacher_warmup_epochs=int(z["warmup_epochs"]))
    loss = GCDLoss(float(z["sup_weight"]), float(z["memax_weight"]))
    projections, logits = head(features)
    temperature = schedule.teacher_temperature_at(epoch)
    terms = loss(projections, logits, torch.tensor(z["labels"]), torch.tensor(z["labelled"]), temperature)
    names = ("loss", "cls", "cluster", "me_max", "info_nce", "sup_con")
    for term, name in zip(terms, names, strict=True):
        assert term.item() == pytest.approx(float(z[name]), rel=1e-5), name
    (gradient,) = torch.autograd.grad(terms.total, features)
    np.testing.assert_allclose(gradient.numpy(), z["grad_features"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name"), [("spatial", "patch"), ("shared", "shared"), ("global", "pad"), ("all", "both")]
)
def test_prompted_images(reference, kind, name):
    z = reference("prompters.npz")
    prompt = create_prompt(
        kind, int(z["image_size"]), int(z["patch_size"]), int(z["patch_border"]), int(z["pad_border"])
    )
    if kind != "global":
        prompt.part("spatial").copy_from(torch.tensor(z["shared.patch" if kind == "shared" else "patch.patch"]))
    if kind in ("global", "all"):
        prompt.part("global").copy_from(_frame_image({side: torch.tensor(z[f"pad.{side}"]) for side in FRAME_SIDES}))
    prompted = torch.tensor(z["x"]) + prompt()
    np.testing.assert_allclose(prompted.detach().numpy(), z[name], atol=1e-6)


def test_published_checkpoints_give_their_logits(reference):
    z = reference("model.npz")
    images = torch.tensor(z["x"])
    model, prompt = load_reference(reference("reference_sptnet.pt"), num_heads=3)
    assert prompt is not None
    assert prompt.kind == "all"
    for outputs, prefix in ((model(images, prompt()), ""), (model(images), "clean_")):
        np.testing.assert_allclose(outputs.logits.detach().numpy(), z[prefix + "logits"], atol=1e-4)
        np.testing.assert_allclose(outputs.projections.detach().numpy(), z[prefix + "proj"], atol=1e-4)


def test_simgcd_checkpoint_in_its_training_wrapper(reference, tmp_path):
    plain = torch.load(reference("reference_simgcd.pt"), weights_only=True)
    torch.save({"model": {f"module.{k}": v for k, v in plain.items()}, "epoch": 3}, tmp_path / "wrapped.pt")
    model, prompt = load_reference(tmp_path / "wrapped.pt", num_heads=3)
    bare, _ = load_reference(reference("reference_simgcd.pt"), num_heads=3)
    assert prompt is None
    for name, value in bare.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_unexpected_keys_are_named(reference, tmp_path):
    plain = torch.load(reference("reference_simgcd.pt"), weights_only=True)
    torch.save(plain | {"2.surprise": torch.zeros(1)}, tmp_path / "odd.pt")
    with pytest.raises(BackboneError, match=r"2\.surprise"):
        load_reference(tmp_path / "odd.pt", num_heads=3)
    with pytest.raises(BackboneError, match="num_heads"):
        load_reference(reference("reference_simgcd.pt"))
    with pytest.raises(BackboneError, match=r"reference_sptnet.pt has prompts that cannot be: a border of 99 pixels"):
        load_reference(reference("reference_sptnet.pt"), num_heads=3, border=99)


@pytest.mark.parametrize("case", range(4))
def test_clustering_accuracy_is_the_same_number(reference, case):
    z = reference("accuracy.npz")
    y, p, old = z[f"y{case}"], z[f"p{case}"], int(z[f"old{case}"])
    np.testing.assert_allclose(clustering_accuracy(y, p, old), z[f"v2_{case}"], rtol=0, atol=1e-15)
    np.testing.assert_allclose(clustering_accuracy(y, p, old, balanced=True), z[f"v2b_{case}"], rtol=0, atol=1e-12)


def reference_batches(seed, count=45, size=16, pixels=48, old=5):
    """The batches of the reference trajectory, as ../reference/README.md of its source defines them."""
    draws = np.random.default_rng(seed)
    prototypes = draws.standard_normal((10, 3, pixels, pixels)).astype("f4")
    for _ in range(count):
        y = draws.integers(0, 10, size)
        labelled = (draws.random(size) < 0.6) & (y < old)
        labelled[:2] = True
        y[:2] = draws.integers(0, old, 2)
        noise = [0.7 * draws.standard_normal((size, 3, pixels, pixels)) for _ in range(2)]
        views = np.stack([(prototypes[y] + n).astype("f4") for n in noise])
        yield torch.tensor(views), torch.tensor(y), torch.tensor(labelled)


def test_a_whole_alternating_run(reference, tmp_path):
    z = reference("trajectory.npz")
    model, prompt = load_reference(reference("trajectory_init.pt"), num_heads=3)
    assert prompt is not None
    schedule = Schedule(
        epochs=3, steps_per_epoch=45, phase_schedule="reference", k=20, prompt_lr=1.0, prompt_warmup_steps=20,
        model_lr=0.05, final_factor=0.1, teacher_warmup_epochs=2,
    )  # fmt: skip
    strategy = PlainStrategy(
        Accelerator(cpu=True), launch_settings(), model,
        lambda m: torch.optim.SGD(parameter_groups(m, 5e-4), lr=0.05, momentum=0.9, fused=True),
    )  # fmt: skip
    prompt_optimizer = torch.optim.SGD(prompt.parameters(), lr=1.0, momentum=0.9, fused=True)
    learner = Learner(strategy, GCDLoss(), schedule, prompt, prompt_optimizer)
    losses = []
    for epoch in range(3):
        for views, targets, labelled in reference_batches(2100 + epoch):
            step = len(losses)
            assert schedule.phase(step) == ("prompt", "model")[z["phase"][step]]
            assert schedule.prompt_lr_at(step) == pytest.approx(z["prompt_lr"][step])
            assert schedule.model_lr_at(step) == pytest.approx(z["classifier_lr"][step])
            losses.append(learner.step(step, views, targets, labelled).terms.total.item())
    np.testing.assert_allclose(losses, z["losses"], rtol=1e-4)

    final = {k.removeprefix("final."): torch.tensor(z[k]) for k in z.files if k.startswith("final.")}
    torch.save(final, tmp_path / "final.pt")
    expected, expected_prompt = load_reference(tmp_path / "final.pt", num_heads=3)
    assert expected_prompt is not None
    for ours, theirs in ((model, expected), (prompt, expected_prompt)):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-3, msg=name)
