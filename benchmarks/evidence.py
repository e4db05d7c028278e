"""Does SPTNet help? It against a SimGCD that is given the same steps, on photographs that grocery.py has sharded.

    python benchmarks/evidence.py OUT --weights FILE --steps 132 --arms continued held SPTNet --seeds 0 1 2

OUT is a folder of benchmarks/grocery.py: its shards, tokens and SimGCD runs are used (a run that is missing is
trained), and each arm is a folder `evidence/STEPS/ARM-SEED` in it. What is there is not trained again.

All arms but the first begin from the finished SimGCD model of their seed, with the same restart: `--steps` steps of
the optimizer, learning rates and batches that configs/photographs_continued.yaml and photographs_sptnet.yaml share.
`SPTNet` pairs an image with its own copy, as published; one factor differs from it in each arm behind it. A step is
2 x 128 images through the network in every arm. The differences are paired: of each seed, an arm against the control
that is best in All on average.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import yaml
from grocery import ROOT, SPTNET, accuracies, call, console, figures, frame_of, minutes, model_of
from rich.table import Table

LONGER = "longer"  # one schedule over the whole length, from kept tokens
CONTROLS: dict[str, list[str]] = {
    LONGER: [],
    "continued": [],  # through the trunk, on fresh views
    "continued 0.01": ["optimizer.lr=0.01"],
    "held": ["prompts.lr=0"],  # prompts that stay at zero: pairs of an image and itself
}
ARMS: dict[str, list[str]] = CONTROLS | {
    "SPTNet": [],
    "random prompts": ["prompts.init=normal"],
    "small random prompts": ["prompts.init=normal", "prompts.init_scale=0.1"],
    "in patches": ["prompts.kind=spatial"],
    "frame": ["prompts.kind=global"],
    "prompts 0.1": ["prompts.lr=0.1"],
    "prompts 10": ["prompts.lr=10"],
    "model 0.01": ["optimizer.lr=0.01"],
    "model 0.003": ["optimizer.lr=0.003"],
    "model with warm-up": ["optimizer.shape=one_cycle"],
    "model to zero": ["optimizer.final_factor=1.0e-3"],
    "k 5": ["schedule.k=5"],
    "two views": ["prompts.pair=views"],  # a view and another one that is prompted: the recipe
    "two views k 5": ["prompts.pair=views", "schedule.k=5"],
    "two views 0.01": ["prompts.pair=views", "optimizer.lr=0.01"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--steps", type=int, default=132, help="of a restart; rounded to whole epochs")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of them in which the prompts' rate rises")
    parser.add_argument("--arms", nargs="+", default=["longer", "continued", "held", "SPTNet"], choices=list(ARMS),
                        metavar="ARM", help=", ".join(ARMS))  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    for seed in given.seeds:
        for arm in given.arms:
            train(given, arm, seed)
    tell(given)


def settings_of(given: argparse.Namespace, arm: str, seed: int, epochs: int) -> tuple[str, list[str]]:
    """Configuration and settings of an arm that lasts `epochs` beyond its start."""
    if arm == LONGER:
        whole = simgcd_epochs(given) + epochs
        return "photographs_simgcd", [f"schedule.epochs={whole}", f"trunk_cache={given.out / 'tokens'}"]
    shared = [f"init={start_of(given, seed)}", f"schedule.epochs={epochs}"]
    if arm.startswith("continued"):
        return "photographs_continued", [*shared, *ARMS[arm]]
    frame, warmup = frame_of(given.image_size), round(given.warmup * given.steps)
    published = [f"prompts.frame={frame}", f"prompts.warmup_steps={warmup}", "prompts.pair=copy"]
    return "photographs_sptnet", [*shared, *published, *ARMS[arm]]


def train(given: argparse.Namespace, arm: str, seed: int) -> None:
    """Train an arm, unless it is there."""
    run = folder_of(given, arm, seed)
    if (run / "finished").exists():
        return
    call_train(given, "photographs_simgcd", start_of(given, seed), seed, [f"trunk_cache={given.out / 'tokens'}"])
    epochs = max(1, round(given.steps / steps_per_epoch(start_of(given, seed))))
    config, settings = settings_of(given, arm, seed, epochs)
    call_train(given, config, run, seed, settings)


def call_train(given: argparse.Namespace, config: str, run: Path, seed: int, settings: list[str]) -> None:
    if (run / "finished").exists():
        return
    seconds = call(
        *SPTNET, "train", f"{ROOT}/configs/{config}.yaml", f"run={run}", f"seed={seed}",
        f"data.root={given.out / 'shards'}", *model_of(given), "evaluate.every=1000", *settings,
    )  # fmt: skip
    (run / "evidence.json").write_text(json.dumps({"seconds": seconds}))


def start_of(given: argparse.Namespace, seed: int) -> Path:
    return given.out / f"simgcd-{seed}"


def folder_of(given: argparse.Namespace, arm: str, seed: int) -> Path:
    return given.out / "evidence" / str(given.steps) / f"{arm.replace(' ', '-')}-{seed}"


def last_line(run: Path) -> dict[str, float]:
    """Of a run's steps."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "phase" in line][-1]


def steps_per_epoch(run: Path) -> int:
    last = last_line(run)
    return round((last["step"] + 1) / (last["epoch"] + 1))


def simgcd_epochs(given: argparse.Namespace) -> int:
    return int(last_line(start_of(given, given.seeds[0]))["epoch"]) + 1


def tell(given: argparse.Namespace) -> None:
    """The table: accuracies, paired differences from the best control, and what they took."""
    table = Table(title=f"{given.backbone}, {given.image_size} px, {given.steps} steps, seeds {given.seeds}")
    for column in ("arm", "unlabelled All/Old/New", "test", "paired, All/New", "10^3 images", "min"):
        table.add_column(column)
    starts = [start_of(given, seed) for seed in given.seeds]
    table.add_row("SimGCD, where they begin", *(figures(starts, kind) for kind in ("unlabelled", "test")), "", "", "")
    for arm in given.arms:
        runs = [folder_of(given, arm, seed) for seed in given.seeds]
        table.add_row(
            arm, *(figures(runs, kind) for kind in ("unlabelled", "test")), paired(given, arm), passes(runs[0]),
            minutes(runs, "evidence.json"),
        )  # fmt: skip
    console.print(table)
    console.print("10^3 images: two a place of the batch in every step, through the network or from its kept tokens")


def passes(run: Path) -> str:
    """Images, in thousands, that the steps of a run look at."""
    batch = yaml.safe_load((run / "config.yaml").read_text())["data"]["batch_size"]
    return f"{2 * batch * (last_line(run)['step'] + 1) / 1000:.1f}"


def paired(given: argparse.Namespace, arm: str) -> str:
    """Mean over seeds of an arm's difference from the other control that is best on average, of All and of New."""
    others = [name for name in given.arms if name in CONTROLS and name != arm]
    if not others:
        return ""
    own, best = accuracy(given, arm), max((accuracy(given, name) for name in others), key=lambda a: a.mean(0)[0])
    differences = own - best
    spread = differences.std(0, ddof=1) if len(given.seeds) > 1 else None
    return " / ".join(
        f"{differences.mean(0)[i]:+.1f}" + ("" if spread is None else f" ± {spread[i]:.1f}") for i in (0, 2)
    )


def accuracy(given: argparse.Namespace, arm: str) -> np.ndarray:
    """[seeds, 3], in per cent of the unlabelled images."""
    found = accuracies([folder_of(given, arm, seed) for seed in given.seeds], "unlabelled")
    assert found is not None
    return found


if __name__ == "__main__":
    main()
