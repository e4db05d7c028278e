"""The way from two folders to a page: every command in its order, each skipped where its result is there and whole."""

from pathlib import Path
from typing import Any

from sptnet.data.format.manifest import Manifest, read_manifest
from sptnet.discover import stages
from sptnet.discover.children import Children
from sptnet.discover.choices import choices_of, keep, look_at_machine
from sptnet.discover.closing import say_goodbye, told_apart
from sptnet.discover.diagnostics import few_images
from sptnet.discover.pipeline import Pipeline
from sptnet.discover.planning import planned
from sptnet.discover.recipe import write_stage
from sptnet.discover.request import TITLES, Request, RequestError, check, check_backbone
from sptnet.discover.saved_state import Estimated, read_kept
from sptnet.estimate_k import RESULT
from sptnet.run.parts import begin_parts

BEGUN = "discover.json"  # what was asked for


def discover(request: Request, hours: float, processes: int | None) -> None:
    """Go the whole way, or what is left of it, and say at the end what was found.

    Args:
        hours: that it may take, from here.
        processes: that share the work; None: one per GPU, or one.

    Raises:
        RequestError, StageError, StoppedError, PartsError, ConfigError, DatasetError: what is finished stays.
    """
    remarks = check(request)
    begun = (request.out / BEGUN).exists()
    begin_parts(request.out / BEGUN, request.says())
    if not begun:
        _check_backbone(request)
    with Children(request.out) as children:
        choices = choices_of(request, children)
        machine = look_at_machine(request, processes, choices["precision"])
        journey = Pipeline(request, hours, machine, children, 9 + (request.new is None))
        for remark in remarks:
            journey.warn(remark)
        if left_out := choices.get("left_out"):
            journey.remarks.append(left_out)  # the shards' command says it at once
        journey.take(stages.shards(request, choices["resize"]))
        manifest = read_manifest(request.out / "shards")
        stages.check_shards(request, manifest)
        journey.warn(few_images(manifest.samples("labelled"), manifest.samples("unlabelled"), manifest.num_old))
        journey.take(stages.features(request, _features_size(journey, choices), machine))
        journey.warn(_about_backbone(request.out, manifest))
        num_new, interval = _number_of_new(journey)
        plan = planned(journey, choices, manifest, num_new)
        for name, epochs in zip(request.stages, plan.length, strict=True):
            title = f"{TITLES[name]}, {epochs} epochs at {plan.image_size} pixels"
            journey.take(stages.train(request, name, title, machine))
        for name in request.stages:
            journey.take(stages.checked(request, name, machine))
        journey.take(stages.predict(request, machine))
        journey.take(stages.page(request))
        print(flush=True)
        say_goodbye(request, manifest, interval, journey.remarks)


def _check_backbone(request: Request) -> None:
    """Before an hour of conversion; where it cannot be had, the same OUT takes another one. Raises RequestError."""
    try:
        check_backbone(request)
    except RequestError:
        (request.out / BEGUN).unlink(missing_ok=True)
        raise


def _features_size(journey: Pipeline, choices: dict[str, Any]) -> int:
    """The image size of the recipe, before anything was planned."""
    if "image_size" not in choices:
        choices["image_size"] = write_stage("simgcd", journey.request, 1, journey.machine.workers).model.image_size
        keep(journey.out, choices)
    return int(choices["image_size"])


def _about_backbone(out: Path, manifest: Manifest) -> str | None:
    """A sentence where the backbone does not tell the named classes apart: training hardly will."""
    found = told_apart(out, manifest)
    if manifest.num_old < 2 or not found.is_chance:
        return None
    return (
        f"the backbone does not tell the named classes apart: of {100 * found.found:.0f}% of their images the most "
        f"similar other one is of the same class, by chance it would be of {100 * found.chance:.0f}%. Are these "
        "photographs, and in the right folders? Does --backbone fit them?"
    )


def _number_of_new(journey: Pipeline) -> tuple[int, tuple[int, int] | None]:
    """How many new classes there are, and the interval of an estimate of all classes."""
    if journey.request.new is not None:
        return journey.request.new, None
    journey.take(stages.estimate(journey.request))
    found = read_kept(journey.out / "estimate_k" / RESULT, Estimated)
    print(f"   {found.median} classes, between {found.low} and {found.high}; {found.num_old} have a name")
    if found.num_new < 1:
        journey.warn("the estimate found no class beyond the named ones; one new category is looked for all the same")
    return max(1, found.num_new), (found.low, found.high)
