"""What each stage will do, from a few steps that are measured before it trains."""

import os
import time
from contextlib import suppress
from typing import Any

from sptnet.data.format.files import LARGEST_IMAGE, read_regular
from sptnet.data.format.manifest import KINDS, Manifest
from sptnet.data.image import DecodeError, decode
from sptnet.data.storage.store import LocalStore
from sptnet.discover import stages
from sptnet.discover.children import StageError
from sptnet.discover.choices import keep
from sptnet.discover.pipeline import Pipeline
from sptnet.discover.plan import Length, Plan, Work, clock, make_plan
from sptnet.discover.recipe import Batches, batches_of, write_stage
from sptnet.discover.request import TITLES, Request
from sptnet.discover.saved_state import Measured, plan_of, read_kept

DECODED = 16  # files of the pile, about, whose decoding is timed
BUSY = 1.5  # processes that want to run, for every core


def planned(journey: Pipeline, choices: dict[str, Any], manifest: Manifest, num_new: int) -> Plan:
    """What each stage will do: of an earlier start, or from a few steps that are measured now. Says it."""
    request, hours = journey.request, journey.hours
    measuring = stages.measured(request, journey.machine, "model.image_size" in request.chosen())
    begun = (journey.out / "simgcd").exists()
    if "plan" in choices and (begun or choices["hours"] == hours):
        journey.skip(measuring)
        _write_again(journey, choices, num_new)
        if choices["hours"] != hours:
            print(f"   planned for {choices['hours']:g} hours when training began, which stays so")
    else:
        choices |= _made(journey, measuring, manifest, num_new)
        keep(journey.out, choices)
    plan = plan_of(choices["plan"])
    _say_plan(journey, choices, plan)
    return plan


def _made(journey: Pipeline, measuring: stages.Stage, manifest: Manifest, num_new: int) -> dict[str, Any]:
    """Measure, plan, and write both configurations; what of it is kept."""
    request, machine = journey.request, journey.machine
    drafts = [write_stage(name, request, num_new, machine.workers) for name in request.stages]
    dealt = batches_of(manifest, (drafts[0].data.batch_size, drafts[0].data.streams), machine.processes)
    for name in request.stages:
        write_stage(name, request, num_new, machine.workers, dealt)
    journey.take(measuring)
    measured = read_kept(journey.out / "measured.json", Measured)
    recipe = Length(*(draft.schedule.epochs for draft in drafts))
    counts = [manifest.samples(kind) for kind in KINDS]
    made = make_plan(
        measured.costs, recipe,
        Work(
            dealt.steps_per_epoch, counts[1] + counts[2], 2 * counts[0] + counts[1],
            decoding_of(request, manifest) / min(machine.cores, machine.processes * max(1, machine.workers)),
        ),
        3600 * journey.hours - (time.monotonic() - journey.begun), measured.available,
        dealt.size // machine.processes, "schedule.epochs" in request.chosen(),
    )  # fmt: skip
    for name in request.stages:
        write_stage(name, request, num_new, machine.workers, dealt, made)
    device = f"{machine.processes} x {measured.device}, precision {measured.precision}"
    return {
        "hours": journey.hours, "plan": made._asdict(), "recipe": recipe, "batch": dealt.size, "device": device,
        "dealt": dealt,
    }  # fmt: skip


def decoding_of(request: Request, manifest: Manifest) -> float:
    """Seconds of a core for all files of the pile, by a few of them."""
    store, shards, took = LocalStore(request.out / "shards"), manifest.of_kind("unlabelled"), []
    for i in range(0, len(shards), -(-len(shards) // DECODED)):
        for path in (store.paths(shards[i]) or [])[: max(1, DECODED // len(shards))]:
            begin = time.perf_counter()
            with suppress(OSError, DecodeError):
                decode(read_regular(request.unlabelled / path.removeprefix("unlabelled/"), LARGEST_IMAGE))
                took.append(time.perf_counter() - begin)
    return manifest.samples("unlabelled") * sum(took) / max(len(took), 1)


def _write_again(journey: Pipeline, choices: dict[str, Any], num_new: int) -> None:
    """Both configurations of a kept plan: OUT may lie elsewhere now, and what decides no number may be another.

    Raises:
        StageError: a batch cannot be dealt to so many processes.
    """
    if "dealt" not in choices:
        return  # planned by an earlier version, which wrote them once
    dealt, processes = Batches(*choices["dealt"]), journey.machine.processes
    if dealt.size % processes:
        raise StageError(
            f"a batch has {dealt.size} images, as it was planned, and cannot be dealt to {processes} processes: say "
            f"--processes {max(n for n in range(1, processes) if dealt.size % n == 0)}"
        )
    for name in journey.request.stages:
        write_stage(name, journey.request, num_new, journey.machine.workers, dealt, plan_of(choices["plan"]))


def _say_plan(journey: Pipeline, choices: dict[str, Any], plan: Plan) -> None:
    recipe, size, hours = Length(*choices["recipe"]), choices["image_size"], choices["hours"]
    first, second, behind = plan.seconds
    names = journey.request.stages
    titles = [TITLES[name] for name in names]
    print(
        f"\nPlan: {plan.length.first} epochs of {titles[0]} (about {clock(first)}), then {plan.length.second} of "
        f"{titles[1]} (about {clock(second)}), at {plan.image_size} pixels, batches of {choices['batch']}; then "
        f"{clock(behind)} for predictions and the page: about {clock(sum(plan.seconds))} in all ({choices['device']})"
    )
    for name, memory in zip(titles, (plan.first_memory, plan.second_memory), strict=True):
        if memory.gradient_checkpointing != "none":
            pieces = f", in {memory.micro_batches} pieces" if memory.micro_batches > 1 else ""
            print(f"   {name}: blocks are computed again in the backward pass{pieces}, so that memory suffices")
    if os.getloadavg()[0] > BUSY * journey.machine.cores:
        print("   other work keeps this machine busy, and times may be far off")
    files = " and ".join(str(journey.out / f"{name}.yaml") for name in names)
    print(f"   written to {files}\n", flush=True)
    if not plan.fits and plan.length == recipe:
        told = f"{recipe.first} and {recipe.second} epochs at {plan.image_size} pixels take longer"
        journey.warn(f"--hours {hours:g} is too short: {told}, and are trained nevertheless")
    elif not plan.fits:
        journey.warn(f"--hours {hours:g} is too short for one epoch of each stage, and they are trained nevertheless")
    if plan.length != recipe or plan.image_size != size:
        journey.warn(
            f"the training is shorter than the recipe's {recipe.first} and {recipe.second} epochs at {size} pixels, "
            f"which would take about {clock(plan.whole)} here: a larger --hours allows more"
        )
