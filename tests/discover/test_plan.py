"""What is planned from measured steps: length, image size, memory; and the configurations that come of it."""

import json
import shutil
import time
from itertools import pairwise

import pytest
import torch
from PIL import Image
from sptnet_shards.make_shards import main as make_shards

from sptnet.config_file import load_config
from sptnet.data.format.manifest import read_manifest
from sptnet.data.image import decode
from sptnet.discover.measure import Bench
from sptnet.discover.plan import (
    EVALUATIONS,
    LOOKED_AT,
    MICRO_TIME,
    START_S,
    Cost,
    Length,
    Memory,
    Plan,
    Work,
    clock,
    make_plan,
    memory_for,
)
from sptnet.discover.planning import decoding_of
from sptnet.discover.recipe import batches_of, write_stage
from sptnet.discover.request import Request
from sptnet.discover.saved_state import plan_of
from sptnet.discover.stages import Machine, checked

RECIPE = Length(100, 25)
WORK = Work(steps_per_epoch=20, evaluated=2000, predicted=4000)
COSTS = {
    224: Cost(8.0, 16.0, 0.05, None, 0.0, 4e9, 40e9),
    168: Cost(4.0, 8.0, 0.03, None, 0.0, 2e9, 20e9),
    112: Cost(2.0, 4.0, 0.015, None, 0.0, 1e9, 10e9),
}


def plan(hours, available=1e12, costs=COSTS, fixed=False):
    return make_plan(costs, RECIPE, WORK, 3600 * hours, available, 64, fixed)


def test_with_time_enough_it_is_the_recipe():
    made = plan(100)
    assert (made.image_size, made.length, made.fits) == (224, RECIPE, True)
    assert sum(made.seconds) == pytest.approx(made.whole)
    # 100 epochs of 20 steps of 8 s, and 25 of 20 of 16 s, and the passes without training
    assert sum(made.seconds) == pytest.approx(16_000 + 8_000, rel=0.1)


def test_fewer_hours_are_fewer_pixels_and_then_fewer_epochs():
    made = [plan(hours) for hours in (100, 6, 4, 2, 1, 0.5)]
    assert [p.image_size for p in made] == sorted((p.image_size for p in made), reverse=True)
    assert {p.image_size for p in made} == {224, 168, 112}
    for hours, one in zip((100, 6, 4, 2, 1, 0.5), made, strict=True):
        assert one.fits
        assert sum(one.seconds) <= 3600 * hours
        if one.image_size != 112:
            assert one.length.first >= RECIPE.first / 2
    for more, less in pairwise(p for p in made if p.image_size == 112):
        assert more.length >= less.length
        assert more.length.second >= less.length.second
    # nearly all of the time that there is, is used
    assert sum(made[-1].seconds) > 0.7 * 1800


def test_the_first_has_two_thirds_of_what_does_not_suffice():
    made = plan(1, costs={112: COSTS[112]})
    assert made.length.first * 20 * 2.0 == pytest.approx(2 * made.length.second * 20 * 4.0, rel=0.1)
    # where the second stage needs less than its third, the first has the rest
    cheap = {112: COSTS[112]._replace(second=0.01)}
    assert plan(1, costs=cheap).length.second == 25


def test_what_is_kept_of_every_image_is_made_before_the_first_step():
    kept = {size: cost._replace(kept=0.1, once=600.0) for size, cost in COSTS.items()}
    made = plan(1, costs=kept)
    assert made.length.first == 100
    assert made.seconds[0] > 600 + 100 * 20 * 0.1
    assert sum(made.seconds) <= 3600
    # where it takes longer than the few epochs that there is time for, it is not made
    dear = {112: COSTS[112]._replace(kept=0.1, once=1e6)}
    assert plan(0.5, costs=dear).length == plan(0.5, costs={112: COSTS[112]}).length


def test_what_cannot_fit_is_taken_all_the_same_and_said():
    made = plan(0.01)
    assert (made.image_size, made.length, made.fits) == (112, Length(1, 1), False)


def test_epochs_that_were_said_stay():
    made = plan(0.5, fixed=True)
    assert (made.image_size, made.length, made.fits) == (112, RECIPE, False)


def test_memory():
    assert memory_for(1e9, 2e9, 64) == Memory("none", 1)
    assert memory_for(4e9, 2e9, 64) == Memory("full", 1)
    assert memory_for(40e9, 2e9, 64) == Memory("full", 8)
    assert memory_for(1e15, 2e9, 64) == Memory("full", 64)
    made = plan(100, available=5e9)
    assert (made.first_memory, made.second_memory) == (Memory("none", 1), Memory("full", 4))
    assert made.seconds[1] > plan(100).seconds[1]


def test_every_part_of_the_way_is_in_the_seconds():
    """Pieces cost more per step, the page is counted, and so is what was read again."""
    pieces = make_plan({112: COSTS[112]}, RECIPE, WORK, 1e9, 1.2e9 / 8, 64, False)
    assert pieces.first_memory.micro_batches > 1
    evaluations = EVALUATIONS * WORK.evaluated * COSTS[112].image + START_S
    assert pieces.seconds[0] == pytest.approx(RECIPE.first * 20 * 2.0 * MICRO_TIME + evaluations)
    made = plan(100)
    looked_at = (WORK.predicted + min(LOOKED_AT, WORK.evaluated)) * COSTS[224].image
    assert made.seconds[2] == pytest.approx(looked_at + WORK.decoding + 5 * START_S)
    slow = make_plan(COSTS, RECIPE, WORK._replace(decoding=999.0), 3.6e5, 1e12, 64, False)
    assert slow.seconds[2] - made.seconds[2] == pytest.approx(999.0 - WORK.decoding)


def test_a_kill_costs_minutes_at_most():
    made = plan(100)
    assert made.checkpoint_every.first * 8.0 <= 300
    assert made.checkpoint_every.second * 16.0 <= 300


def test_a_plan_goes_through_json():
    made = plan(1)
    assert plan_of(json.loads(json.dumps(made._asdict()))) == made


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.1, "1 s"), (61, "61 s"), (600, "10 min"), (7300, "2 h 02 min"), (86_400 * 3, "3.0 days")],
)
def test_clock(seconds, told):
    assert clock(seconds) == told


def test_no_step_is_measured_for_which_there_is_no_memory():
    taken = []
    bench = Bench(None, None, None, torch.device("cpu"), time.monotonic() + 60, available=1e9)
    assert bench._scaled(taken.append, 64, most=20) < 1
    assert sorted(set(taken)) == [4, 16, 20]
    taken.clear()
    bench._scaled(taken.append, 64)
    assert max(taken) == 64


def test_loading_is_timed_with_shards_that_are_open(digits, monkeypatch):
    config, now = load_config("quickstart_simgcd", ["run=r", f"data.root={digits}"]), [0.0]

    def batches(store, order, *, steps, **_):
        for step in steps:
            now[0] += (9.0, 0.5, 0.25, 2.0)[step]  # the first opens the shards, and other work runs beside the last
            yield step

    monkeypatch.setattr("sptnet.discover.measure.train_batches", batches)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    bench = Bench(config, None, None, torch.device("cpu"), time.monotonic() + 60, available=1e9)
    assert bench._loading == 0.25 / (2 * config.data.streams) * config.data.batch_size


def test_the_files_of_the_pile_are_decoded_for_the_plan(tmp_path, monkeypatch):
    """Photographs of 12 million pixels are predicted from as they are, whatever size the shards keep."""
    for name in ("l/a/1.png", "l/b/2.png", "l/c/3.png", *(f"u/{n}.png" for n in range(20))):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = sum(map(ord, name)) % 256
        Image.new("RGB", (2000, 1500) if name.startswith("u/") else (32, 32), (shade, 3, 9)).save(
            path, compress_level=0
        )
    request = request_for(tmp_path)
    roots = [str(tmp_path / name) for name in ("l", "u", "shards")]
    assert make_shards(["discover", *roots, "--resize", "32"]) == 0
    manifest = read_manifest(tmp_path / "shards")
    sizes = []

    def timed(encoded: bytes) -> None:
        sizes.append(decode(encoded).shape)

    monkeypatch.setattr("sptnet.discover.planning.decode", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.25 * len(sizes))  # each of them takes so long
    assert decoding_of(request, manifest) == 20 * 0.25
    assert set(sizes) == {(3, 1500, 2000)}
    assert len(sizes) >= 10
    shutil.rmtree(tmp_path / "u")
    assert decoding_of(request, manifest) == 0
    plain, with_files = (
        make_plan(COSTS, RECIPE, WORK._replace(decoding=decoding), 3600 * 9, 1e12, 64, False) for decoding in (0, 900)
    )
    assert with_files.seconds[2] == plain.seconds[2] + 900


def request_for(tmp_path, *overrides, then="sptnet"):
    given = tmp_path / "l", tmp_path / "u", tmp_path, 7, None, "vit_small_patch14_dinov2", "none", overrides, then
    return Request(*given)


def test_a_part_that_was_removed_is_made_again(digits, tmp_path):
    """As the message on a damaged one says."""
    (tmp_path / "shards").symlink_to(digits)
    parts = [tmp_path / "checks" / "simgcd" / "predictions" / f"part-{number:06d}.csv" for number in range(16)]
    for path in (tmp_path / "simgcd" / "model.safetensors", *parts, parts[0].parents[1] / "errors.csv"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert len(read_manifest(digits).of_kind("labelled")) == len(parts)
    stage = checked(request_for(tmp_path), "simgcd", Machine(1, 1, "no", 0))
    assert stage.is_done()
    parts[-1].unlink()
    assert not stage.is_done()


def made_for(length, size):
    memory = Memory("none", 1), Memory("full", 2)
    return Plan(size, length, *memory, Length(50, 20), (1.0, 1.0, 1.0), 9.0, True)


def test_a_stage_is_a_file_that_inherits_the_recipe(digits, tmp_path):
    dealt = batches_of(read_manifest(digits), (128, 4), 3)
    assert (dealt.size, dealt.streams, dealt.steps_per_epoch) == (120, 4, 1438 // 120)  # dealt to 3 processes too
    made = made_for(Length(50, 5), 112)
    first, second = (write_stage(name, request_for(tmp_path), 7, 2, dealt, made) for name in ("simgcd", "sptnet"))
    for name, config, epochs in zip(("simgcd", "sptnet"), (first, second), made.length, strict=True):
        assert load_config(tmp_path / f"{name}.yaml") == config
        assert f"base: configs/photographs_{name}.yaml" in (tmp_path / f"{name}.yaml").read_text()
        assert (config.method, config.run) == (name, str(tmp_path / name))
        assert (config.data.root, config.data.batch_size) == (str(tmp_path / "shards"), 120)
        assert config.schedule.epochs == epochs
    recipe = load_config("photographs_sptnet", ["run=x", "data.root=x"])
    assert (first.model.backbone, first.model.image_size, first.model.num_new) == ("vit_small_patch14_dinov2", 112, 7)
    assert second.init == first.run
    assert second.prompts.frame == recipe.prompts.frame // 2  # of half as many pixels
    assert second.prompts.warmup_steps < 5 * dealt.steps_per_epoch / 4
    shipped = load_config("photographs_simgcd", ["run=x", "data.root=x"])
    share = 50 / shipped.schedule.epochs
    assert first.loss.teacher_warmup_epochs == round(share * shipped.loss.teacher_warmup_epochs) > 0
    assert first.evaluate.every < first.schedule.epochs
    assert 2 * second.schedule.k <= 5 * dealt.steps_per_epoch  # both phases come
    assert (second.memory.gradient_checkpointing, second.memory.micro_batches) == ("full", 2)
    assert (second.optimizer, second.prompts.lr) == (recipe.optimizer, recipe.prompts.lr)
    assert first.checkpoint.every == 50


def test_simgcd_goes_on_with_fresh_views_and_what_the_model_of_sptnet_has(digits, tmp_path):
    request, dealt = request_for(tmp_path, then="continued"), batches_of(read_manifest(digits), (128, 4), 1)
    assert request.stages == ("simgcd", "continued")
    _, config = (write_stage(name, request, 7, 2, dealt, made_for(Length(50, 5), 112)) for name in request.stages)
    recipe = load_config("photographs_sptnet", ["run=x", "data.root=x"])
    assert (config.method, config.data.views, config.schedule.epochs) == ("simgcd", None, 5)
    assert (config.run, config.init) == (str(tmp_path / "continued"), str(tmp_path / "simgcd"))
    assert (config.optimizer, config.loss) == (recipe.optimizer, recipe.loss)
    assert (config.memory.gradient_checkpointing, config.checkpoint.every) == ("full", 20)
    shipped = load_config("photographs_continued", ["run=x", "data.root=x"])
    assert (shipped.optimizer, shipped.schedule.epochs) == (recipe.optimizer, recipe.schedule.epochs)


def test_what_the_user_says_wins(digits, tmp_path):
    overrides = ("schedule.epochs=3", "prompts.lr=7", "seed=5", "model.image_size=28", "prompts.kind=shared")
    dealt = batches_of(read_manifest(digits), (128, 4), 1)
    made = made_for(Length(3, 3), 28)
    first, second = (
        write_stage(name, request_for(tmp_path, *overrides), 7, 2, dealt, made) for name in ("simgcd", "sptnet")
    )
    assert (first.schedule.epochs, second.schedule.epochs, first.seed, second.seed) == (3, 3, 5, 5)
    assert (second.prompts.lr, second.prompts.kind, second.prompts.frame) == (7, "shared", 3)
    assert first.model.image_size == 28


def test_few_images_are_dealt_too(tmp_path, digits):
    manifest = read_manifest(digits)
    few = {"labelled": 15, "unlabelled": 15}

    class Few:
        def of_kind(self, kind):
            return manifest.of_kind(kind)[: 3 if kind == "labelled" else 15]

        def samples(self, kind):
            return few[kind]

    dealt = batches_of(Few(), (128, 4), 1)
    assert (dealt.size, dealt.streams, dealt.steps_per_epoch) == (12, 3, 2)
