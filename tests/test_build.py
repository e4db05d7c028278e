"""What a configuration says arrives in the parts that are made of it."""

import math

import pytest
from accelerate.state import AcceleratorState
from launching import ROOT

from sptnet.build import assemble, build_data, build_loss, build_schedule, build_untrained
from sptnet.cli import main
from sptnet.config_file import load_config
from sptnet.data.loader import train_batches
from sptnet.method.prompts import create_prompt
from sptnet.strategy.base import parameter_groups
from sptnet.strategy.connect import connect

TINY = "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}"


def config_of(*settings, name="quickstart"):
    return load_config(ROOT / "configs" / f"{name}.yaml", settings)


@pytest.fixture
def learner():
    """`learner(*settings)`: model, prompts and their optimizers, on one process."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def made(*settings):
        config = config_of("init=null", "data.root=nowhere", TINY, *settings)
        accelerator, launch = connect(60)
        parts = build_untrained(config, 5, 5)
        return assemble(config, accelerator, launch, *parts, build_schedule(config, 10))

    yield made
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_seed_decides_weights_prompts_and_order(digits):
    made = []
    for seed in (0, 1, 0):
        config = config_of("init=null", TINY, f"data.root={digits}", f"seed={seed}")
        model, prompt = build_untrained(config, 5, 5)
        order = build_data(config)[1]
        weights = model.head.prototypes, model.backbone.patch_embed.proj.weight, prompt()
        made.append([str(order.batch(0)), *(tensor.tolist() for tensor in weights)])
    for one, other, again in zip(*made, strict=True):
        assert one == again != other


def test_a_seed_decides_the_views(digits, tmp_path, monkeypatch):
    seeds = []

    def batches(*given, **named):
        seeds.append(named["seed"])
        return train_batches(*given, **named)

    monkeypatch.setattr("sptnet.preparing.train_batches", batches)
    settings = [f"run={tmp_path / 'run'}", f"data.root={digits}", "seed=3", "schedule.epochs=1", TINY,
                "data.workers=0", "trackers=[]"]  # fmt: skip
    assert main(["train", f"{ROOT}/configs/quickstart_simgcd.yaml", *settings]) == 0
    assert seeds == [3]


def test_learning_rates_follow_the_batch():
    plain, scaled = (
        build_schedule(config_of("init=null", "data.batch_size=256", f"schedule.lr_scaling={scaling}"), 10)
        for scaling in ("none", "linear")
    )
    assert scaled.prompt_lr == 2 * plain.prompt_lr
    assert scaled.model_lr == 2 * plain.model_lr
    published = build_schedule(config_of(name="imagenet1k"), 10)
    assert (published.prompt_lr, published.model_lr) == pytest.approx((40, 0.024))


def test_the_loss_has_the_weights_and_temperatures_of_the_configuration():
    told = {"sup_weight": 0.11, "memax_weight": 0.12, "student_temperature": 0.13, "info_nce_temperature": 0.14,
            "sup_con_temperature": 0.15}  # fmt: skip
    loss = build_loss(config_of("init=null", *(f"loss.{key}={value}" for key, value in told.items())))
    assert {key: getattr(loss, key) for key in told} == told


def test_the_learner_has_what_the_configuration_says(learner):
    one = learner("loss.scope=local", "prompts.momentum=0.5", "prompts.pair=views", "memory.micro_batches=2")
    assert not one.global_loss
    assert (one.pair, one.micro_batches) == ("views", 2)
    assert one.prompt_optimizer.param_groups[0]["momentum"] == 0.5
    other = learner("loss.scope=global", "prompts.momentum=0.9", "optimizer.momentum=0.7")
    assert other.global_loss
    assert other.prompt_optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimizer_has_decay_and_momentum(learner, name):
    made = learner(f"optimizer.name={name}", "optimizer.momentum=0.7", "optimizer.weight_decay=0.3")
    groups = made.strategy._optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert name != "sgd" or all(group["momentum"] == 0.7 for group in groups)


def test_the_schedule_is_that_of_the_configuration():
    told = {
        "epochs": 7, "phase_schedule": "reference", "k": 3, "prompt_lr": 1.5, "prompt_warmup_steps": 11,
        "model_lr": 0.25, "model_lr_shape": "one_cycle", "final_factor": 0.2, "warmup_fraction": 0.4,
        "teacher_temperature": 0.05, "teacher_warmup_temperature": 0.06, "teacher_warmup_epochs": 4,
    }  # fmt: skip
    sections = {"epochs": "schedule", "phase_schedule": "schedule", "k": "schedule", "prompt_lr": "prompts",
                "prompt_warmup_steps": "prompts", "model_lr": "optimizer", "model_lr_shape": "optimizer",
                "final_factor": "optimizer", "warmup_fraction": "optimizer"}  # fmt: skip
    keys = {"prompt_lr": "lr", "prompt_warmup_steps": "warmup_steps", "model_lr": "lr", "model_lr_shape": "shape"}
    settings = [f"{sections.get(name, 'loss')}.{keys.get(name, name)}={value}" for name, value in told.items()]
    made = build_schedule(config_of("init=null", *settings), 10)
    assert {name: getattr(made, name) for name in told} == told


def test_order_and_prompt_are_those_of_the_configuration(digits):
    config = config_of("init=null", TINY, f"data.root={digits}", "data.streams=2", "data.window=3", "seed=9",
                       "prompts.kind=all", "prompts.border=2", "prompts.frame=4")  # fmt: skip
    for split in build_data(config)[1].splits:
        assert (split.streams, split.window, split.seed) == (2, 3, 9)
    prompt = build_untrained(config, 5, 5)[1]
    wanted = create_prompt("all", 24, 6, 2, 4)
    assert {n: p.shape for n, p in prompt.named_parameters()} == {n: p.shape for n, p in wanted.named_parameters()}


def test_what_is_one_dimensional_is_not_decayed():
    model, _ = build_untrained(config_of("init=null", TINY), 5, 5)
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    biases = [p for name, p in model.named_parameters() if p.requires_grad and (name.endswith(".bias") or p.ndim == 1)]
    assert {id(p) for p in plain["params"]} == {id(p) for p in biases}
    assert len(decayed["params"]) + len(plain["params"]) == sum(p.requires_grad for p in model.parameters())


def test_one_cycle_rises_and_falls_by_steps():
    """Three of ten steps upwards, then a cosine to a tenth, which the step behind the last one would have."""
    schedule = build_schedule(
        config_of("init=null", "schedule.epochs=1", "optimizer.lr=1", "optimizer.shape=one_cycle",
                  "optimizer.final_factor=0.1", "optimizer.warmup_fraction=0.3"), 10
    )  # fmt: skip
    falling = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 7)) / 2 for step in range(7)]
    found = [schedule.model_lr_at(step) for step in range(10)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0, *falling])
    assert schedule.model_lr_at(10) == pytest.approx(0.1)
