"""The way from two folders to a page: every command in its order, each skipped where its result is there and whole."""

import json
import os
import sys
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from sptnet.data.files import write_whole
from sptnet.data.listing import images_below
from sptnet.data.manifest import KINDS, Manifest, read_manifest
from sptnet.discover import stages
from sptnet.discover.children import Children, StageError, shown
from sptnet.discover.closing import TITLES, say_goodbye, told_apart
from sptnet.discover.plan import Cost, Length, Plan, Work, clock, make_plan, plan_of
from sptnet.discover.recipe import STAGES, Batches, write_stage
from sptnet.discover.request import Request, check
from sptnet.discover.stages import Machine, Stage
from sptnet.discover.verdict import few_images
from sptnet.report.text import printable
from sptnet.run.parts import begin_parts, writing_parts
from sptnet.run.throughput import matmul_peak

CHOICES = "plan.json"
LARGE_IMAGE = 150_000  # bytes of an image file, from which on decoding them again and again takes too long
SAMPLED = 1000  # image files that are looked at for it
CROP = 0.875  # of an image's short side that a model sees
BUSY = 1.5  # processes that want to run, for every core
WORTH_IT = 1.5  # times as fast, from which on half precision is taken


class Journey:
    """What is known on the way.

    Attributes:
        remarks: what looks wrong so far, for the end.
    """

    def __init__(self, request: Request, hours: float, machine: Machine, children: Children, steps: int):
        self.request, self.hours, self.machine, self.children = request, hours, machine, children
        self.out, self.steps, self.step = request.out, steps, 0
        self.begun = time.monotonic()
        self.remarks: list[str] = []

    def take(self, stage: Stage) -> None:
        """Run a command, unless its result is there.

        Raises:
            StageError: it failed.
            StoppedError: asked to stop.
        """
        self.step += 1
        self.children.check()
        head = f"== {self.step} of {self.steps}: {stage.title}"
        line = shown(stage.command, stage.environment)
        if stage.is_done():
            print(f"{head}: there already\n   {printable(line, 2000)}", flush=True)
            return
        print(f"{head}\n   {printable(line, 2000)}", flush=True)
        begin = time.monotonic()
        code = self.children.run(stage.command, stage.environment)
        if code != 0:
            told = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            why = "; SIGKILL is usually the kernel's, for want of memory" if code == -9 else "; it says above why"
            advice = f". {stage.advice[0].upper()}{stage.advice[1:]}" if stage.advice else ""
            raise StageError(f"step {self.step}, {stage.title}, {told}{why}. What is finished stays{advice}")
        print(f"   took {clock(time.monotonic() - begin)}", flush=True)

    def skip(self, stage: Stage) -> None:
        """A command whose result was of use already."""
        self.step += 1
        print(f"== {self.step} of {self.steps}: {stage.title}: there already", flush=True)

    def warn(self, sentence: str | None) -> None:
        """Say at once what looks wrong, and keep it for the end."""
        if sentence:
            self.remarks.append(sentence)
            print(f"warning: {printable(sentence, 1000)}", file=sys.stderr, flush=True)


def discover(request: Request, hours: float, processes: int | None) -> None:
    """Go the whole way, or what is left of it, and say at the end what was found.

    Args:
        hours: that it may take, from here.
        processes: that share the work; None: one per GPU, or one.

    Raises:
        RequestError, StageError, StoppedError, PartsError, ConfigError, DatasetError: what is finished stays.
    """
    remarks = check(request)
    begin_parts(request.out / "discover.json", request.says())
    with Children(request.out) as children:
        choices = _choices(request)
        machine = look_at_machine(request, processes, choices["precision"])
        journey = Journey(request, hours, machine, children, 9 + (request.new is None))
        for remark in remarks:
            journey.warn(remark)
        journey.take(stages.shards(request, choices["resize"]))
        manifest = read_manifest(request.out / "shards")
        journey.warn(few_images(manifest.samples("labelled"), manifest.samples("unlabelled"), manifest.num_old))
        journey.take(stages.features(request, _features_size(journey, choices), machine))
        journey.warn(_about_backbone(request.out, manifest))
        num_new, interval = _number_of_new(journey)
        plan = planned(journey, choices, manifest, num_new)
        for name, title, epochs in zip(TITLES, TITLES.values(), plan.length, strict=True):
            journey.take(stages.train(request, name, f"{title}, {epochs} epochs at {plan.image_size} pixels", machine))
        for name in TITLES:
            journey.take(stages.checked(request, name, machine))
        journey.take(stages.predict(request, machine))
        journey.take(stages.page(request))
        print(flush=True)
        say_goodbye(request, manifest, interval, journey.remarks)


def look_at_machine(request: Request, processes: int | None, precision: str) -> Machine:
    """How many processes and cores there are; loaders are few where the CPU computes too."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or gpus or 1
    share = cores // processes
    workers = min(8, max(1, share - 1)) if gpus else min(4, max(1, share // 2))
    told = request.chosen().get("data.workers", workers)
    return Machine(processes, cores, precision, told if isinstance(told, int) else workers)


def _choices(request: Request) -> dict[str, Any]:
    """What is chosen once for a journey: precision, and whether stored images are made smaller."""
    path = request.out / CHOICES
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and {"precision", "resize"} <= found.keys():
            return found
        raise StageError(f"{path} is damaged: remove it, and it is planned anew")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({error}): remove it, and it is planned anew") from None
    choices = {"precision": _precision(), "resize": _resize(request)}
    _keep(request.out, choices)
    return choices


def _keep(out: Path, choices: dict[str, Any]) -> None:
    with writing_parts(out / CHOICES):
        write_whole(out / CHOICES, (json.dumps(choices, indent=1) + "\n").encode())


def _precision() -> str:
    """bf16 where this machine multiplies faster in it."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    half, whole = (matmul_peak(torch.device("cpu"), dtype) for dtype in (torch.bfloat16, torch.float32))
    return "bf16" if half > WORTH_IT * whole else "no"


def _resize(request: Request) -> int | None:
    """The short side that stored images get, where the files are large; None: they are kept as they are."""
    paths = chain.from_iterable(
        (root / os.fsdecode(name) for name in islice(images_below(root), SAMPLED))
        for root in (request.labelled, request.unlabelled)
    )
    sizes = [path.stat().st_size for path in paths if path.exists()]
    if not sizes or sum(sizes) / len(sizes) < LARGE_IMAGE:
        return None
    size = request.chosen().get("model.image_size", 224)
    return max(256, round(size / CROP)) if isinstance(size, int) else 256


def _features_size(journey: Journey, choices: dict[str, Any]) -> int:
    """The image size of the recipe, before anything was planned."""
    if "image_size" not in choices:
        choices["image_size"] = write_stage("simgcd", journey.request, 1, journey.machine.workers).model.image_size
        _keep(journey.out, choices)
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


def _number_of_new(journey: Journey) -> tuple[int, tuple[int, int] | None]:
    """How many new classes there are, and the interval of an estimate of all classes."""
    if journey.request.new is not None:
        return journey.request.new, None
    journey.take(stages.estimate(journey.request))
    found = json.loads((journey.out / "estimate_k" / "estimate_k.json").read_bytes())
    print(f"   {found['median']} classes, between {found['low']} and {found['high']}; {found['num_old']} have a name")
    if found["num_new"] < 1:
        journey.warn("the estimate found no class beyond the named ones; one new category is looked for all the same")
    return max(1, found["num_new"]), (found["low"], found["high"])


def planned(journey: Journey, choices: dict[str, Any], manifest: Manifest, num_new: int) -> Plan:
    """What each stage will do: of an earlier start, or from a few steps that are measured now. Says it."""
    request, machine, hours = journey.request, journey.machine, journey.hours
    fixed_size = "model.image_size" in request.chosen()
    measuring = stages.measured(request, machine, fixed_size)
    begun = (journey.out / "simgcd").exists()
    if "plan" in choices and (begun or choices["hours"] == hours):
        journey.skip(measuring)
        if choices["hours"] != hours:
            print(f"   planned for {choices['hours']:g} hours when training began, which stays so")
    else:
        drafts = [write_stage(name, request, num_new, machine.workers) for name in STAGES]
        wanted = drafts[0].data.batch_size, drafts[0].data.streams
        dealt = Batches(manifest, wanted, machine.processes)
        for name in STAGES:
            write_stage(name, request, num_new, machine.workers, dealt)
        journey.take(measuring)
        measured = json.loads((journey.out / "measured.json").read_bytes())
        recipe = Length(*(draft.schedule.epochs for draft in drafts))
        counts = [manifest.samples(kind) for kind in KINDS]
        work = Work(dealt.steps_per_epoch, counts[1] + counts[2], 2 * counts[0] + counts[1])
        made = make_plan(
            {int(size): Cost(**cost) for size, cost in measured["costs"].items()}, recipe, work,
            3600 * hours - (time.monotonic() - journey.begun), measured["available"],
            dealt.size // machine.processes, "schedule.epochs" in request.chosen(),
        )  # fmt: skip
        for name in STAGES:
            write_stage(name, request, num_new, machine.workers, dealt, made)
        choices |= {"hours": hours, "plan": made._asdict(), "recipe": recipe, "batch": dealt.size}
        choices["device"] = f"{machine.processes} x {measured['device']}, precision {measured['precision']}"
        _keep(journey.out, choices)
    plan = plan_of(choices["plan"])
    _say_plan(journey, choices, plan)
    return plan


def _say_plan(journey: Journey, choices: dict[str, Any], plan: Plan) -> None:
    recipe, size, hours = Length(*choices["recipe"]), choices["image_size"], choices["hours"]
    first, second, behind = plan.seconds
    print(
        f"\nPlan: {plan.length.simgcd} epochs of SimGCD (about {clock(first)}), then {plan.length.sptnet} of SPTNet "
        f"(about {clock(second)}), at {plan.image_size} pixels, batches of {choices['batch']}; then {clock(behind)} "
        f"for predictions and the page: about {clock(sum(plan.seconds))} in all ({choices['device']})"
    )
    for name, memory in zip(TITLES.values(), (plan.simgcd_memory, plan.sptnet_memory), strict=True):
        if memory.gradient_checkpointing != "none":
            pieces = f", in {memory.micro_batches} pieces" if memory.micro_batches > 1 else ""
            print(f"   {name}: blocks are computed again in the backward pass{pieces}, so that memory suffices")
    if os.getloadavg()[0] > BUSY * journey.machine.cores:
        print("   other work keeps this machine busy, and times may be far off")
    print(f"   {journey.out / 'simgcd.yaml'} and {journey.out / 'sptnet.yaml'} have it\n", flush=True)
    if not plan.fits:
        journey.warn(f"--hours {hours:g} are too few: an epoch of each alone takes longer; they are taken all the same")
    if plan.length != recipe or plan.image_size != size:
        journey.warn(
            f"the training is shorter than the recipe's {recipe.simgcd} and {recipe.sptnet} epochs at {size} pixels, "
            f"which would take about {clock(plan.whole)} here: --hours says how long it may take"
        )
