"""The published experiments: configurations that load and say what was published, and a script for each."""

import re
import subprocess
from pathlib import Path

import pytest

from sptnet.build import build_loss, build_schedule
from sptnet.config_file import load_config

ROOT = Path(__file__).parents[1]
# prompt lr, model lr, me-max weight, prompts, SimGCD's me-max weight; SPTNet (ICLR 2024) and SimGCD (ICCV 2023).
# ImageNet-1K: SPTNet published none, ImageNet-100's are taken; batches of 1024, learning rates scaled linearly
PUBLISHED = {
    "cifar10": (1, 3e-3, 1, "spatial", 1),
    "cifar100": (5, 3e-3, 1, "spatial", 4),
    "imagenet100": (5, 3e-3, 1, "all", 1),
    "cub": (25, 5e-2, 2, "all", 2),
    "scars": (10, 5e-2, 1, "all", 1),
    "aircraft": (1, 5e-2, 1, "all", 1),
    "herbarium_19": (0.5, 1e-2, 1, "all", 1),
    "imagenet1k": (5 * 8, 3e-3 * 8, 1, "all", 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_are_the_published_ones(name):
    first, second = (load_config(ROOT / "configs" / file) for file in (f"{name}_simgcd.yaml", f"{name}.yaml"))
    prompt_lr, model_lr, memax, prompts, simgcd_memax = PUBLISHED[name]
    assert second.init == first.run
    batch = 1024 if name == "imagenet1k" else 128
    for config in (first, second):
        assert (config.data.root, config.data.batch_size) == (f"data/{name}", batch)
        assert (config.model.backbone, config.model.image_size) == ("vit_base_patch16_224.dino", 224)
        assert (config.model.train_from_block, config.loss.sup_weight) == (-1, 0.35)
        assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
        assert config.optimizer.shape == "cosine_epoch"
        streams = 64 if name == "imagenet1k" else 4
        assert (config.data.streams, config.data.window, config.data.augment) == (streams, 4, "crop_flip")
        # the temperatures of the student, of InfoNCE and of the supervised contrastive loss; the paper prints the last
        # two the other way round
        assert vars(build_loss(config)) == {
            "sup_weight": 0.35, "memax_weight": config.loss.memax_weight, "student_temperature": 0.1,
            "info_nce_temperature": 1.0, "sup_con_temperature": 0.07,
        }  # fmt: skip
        schedule = build_schedule(config, 10)
        assert (schedule.teacher_temperature, schedule.teacher_warmup_temperature) == (0.04, 0.07)
    rates = first.optimizer.lr * first.lr_factor, first.optimizer.lr * first.lr_factor * first.optimizer.final_factor
    assert rates == pytest.approx((0.1 * batch / 128, 1e-4 * batch / 128))
    assert (first.method, first.schedule.epochs, first.loss.teacher_warmup_epochs) == ("simgcd", 200, 30)
    assert (first.optimizer.weight_decay, first.loss.memax_weight) == (5e-5, simgcd_memax)
    assert (second.method, second.schedule.epochs, second.schedule.k) == ("sptnet", 1000, 20)
    assert second.prompts.lr * second.lr_factor == pytest.approx(prompt_lr)
    assert second.optimizer.lr * second.lr_factor == pytest.approx(model_lr)
    assert (second.optimizer.weight_decay, second.optimizer.final_factor) == (5e-4, 0.1)
    assert (second.loss.memax_weight, second.loss.teacher_warmup_epochs) == (memax, 10)
    spec = second.prompts
    assert (spec.kind, spec.border, spec.frame, spec.momentum, spec.warmup_steps) == (prompts, 1, 30, 0.9, 1000)
    assert (spec.init, spec.init_scale) == ("normal", 1.0)


@pytest.mark.parametrize("name", [*PUBLISHED, "quickstart"])
def test_every_experiment_has_a_script_that_bash_reads(name):
    script = ROOT / "slurm" / f"{name}.sbatch"
    assert f"launch/slurm_node.sh {name} " in script.read_text()
    for file in (script, ROOT / "launch" / "slurm_node.sh"):
        subprocess.run(["bash", "-n", file], check=True)


def test_discover_has_a_script_that_bash_reads():
    script = ROOT / "slurm" / "discover.sbatch"
    assert '"${SPTNET_BIN:-.venv/bin}/sptnet" discover "$@"' in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


def test_learning_rates_follow_the_batch_only_where_asked():
    config = load_config(ROOT / "configs" / "cub.yaml", ["data.batch_size=512"])
    assert config.lr_factor == 1
    config = load_config(ROOT / "configs" / "cub.yaml", ["data.batch_size=512", "schedule.lr_scaling=linear"])
    assert config.lr_factor == 4


def test_the_configurations_that_the_documents_show_load(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "discover.md").read_text(), re.S)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    first, second = (tmp_path / name for name in ("my_simgcd.yaml", "my_sptnet.yaml"))
    for path, block in zip((first, second), blocks, strict=True):
        path.write_text(block)
    first, second = load_config(first), load_config(second)
    assert (first.method, second.method, second.init) == ("simgcd", "sptnet", first.run)
    assert (first.optimizer.lr, first.schedule.epochs, first.data.views) == (0.05, 100, 4)
    assert (second.prompts.kind, second.prompts.init, second.optimizer.lr) == ("all", "zero", 0.05)
