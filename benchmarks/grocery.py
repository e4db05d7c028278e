"""From photographs in class folders to a table, on this machine: k-means, SimGCD from kept tokens, SPTNet.

    python benchmarks/grocery.py PHOTOS OUT --backbone vit_small_patch14_dinov2 --weights FILE --old 40 --seeds 0 1 2

PHOTOS has train/ and test/ with class folders (GroceryStoreDataset: Klasson et al., WACV 2019). Only `sptnet` and
`make_shards.py` do the work; each command is printed, is left out where its result is there, and goes on where it was
killed. The tokens are made once, for all seeds.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SPTNET = (sys.executable, "-m", "sptnet")
STAGES = ("simgcd", "sptnet")
console = Console(width=110, highlight=False)


def call(*command: str) -> float:
    """Run a command; the seconds that it took."""
    console.print(f"$ {' '.join(command)}")
    begin = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--old", default="40", help="how many classes are old")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="of SimGCD, e.g. schedule.epochs=20")
    given = parser.parse_args()
    shards, features = given.out / "shards", given.out / "features"
    if not (shards / "manifest.json").exists():
        tool = [sys.executable, f"{ROOT}/shards/make_shards.py", "imagefolder"]
        call(*tool, str(given.photos), str(shards), "--old", given.old)
    rows: dict[str, list[Path]] = {name: [] for name in ("k-means, whitened", *given.stages)}
    call(
        *SPTNET, "features", str(shards), "--out", str(features), "--backbone", given.backbone, "--weights",
        given.weights, "--image-size", str(given.image_size),
    )  # fmt: skip
    kmeans = given.out / "kmeans"
    if not (kmeans / "metrics.json").exists():
        call(*SPTNET, "kmeans", str(shards), str(kmeans), "--features", str(features), "--pca", "128", "--whiten")
    rows["k-means, whitened"].append(kmeans)
    for seed in given.seeds:
        for stage in given.stages:
            run = given.out / f"{stage}-{seed}"
            rows[stage].append(run)
            if (run / "finished").exists():
                continue
            settings = [f"run={run}", f"data.root={shards}", f"seed={seed}", *model_of(given)]
            if stage == "simgcd":
                settings += [f"trunk_cache={given.out / 'tokens'}", *given.settings]
            else:
                settings += [f"init={given.out / f'simgcd-{seed}'}", f"prompts.frame={frame_of(given.image_size)}"]
            seconds = call(*SPTNET, "train", f"{ROOT}/configs/photographs_{stage}.yaml", *settings)
            console.print(f"{stage}, seed {seed}: {seconds / 60:.1f} min")
    table = Table(title=f"{given.photos.name}, {given.backbone}, {given.image_size} px: All/Old/New")
    for column in ("", "seeds", "unlabelled", "test"):
        table.add_column(column)
    for name, runs in rows.items():
        table.add_row(name, str(len(runs)), *(figures(runs, protocol) for protocol in ("unlabelled", "test")))
    console.print(table)


def model_of(given: argparse.Namespace) -> list[str]:
    """The settings that name the model."""
    return [
        f"model.backbone={given.backbone}",
        f"model.weights={given.weights}",
        f"model.image_size={given.image_size}",
    ]


def frame_of(image_size: int) -> int:
    """Width in pixels of the prompts' frame: the paper's share of the image."""
    return round(30 * image_size / 224)


def accuracies(runs: list[Path], protocol: str) -> np.ndarray | None:
    """[runs, 3]: All, Old and New of each, in per cent; None where a run has none."""
    found = [json.loads((run / "metrics.json").read_text()).get(protocol) for run in runs]
    if not all(found):
        return None
    return 100 * np.array([[metrics[part] for part in ("all", "old", "new")] for metrics in found])


def figures(runs: list[Path], protocol: str) -> str:
    """Mean and deviation over runs of All, Old and New, in per cent."""
    values = accuracies(runs, protocol)
    if values is None:
        return ""
    deviations = values.std(0, ddof=1) if len(values) > 1 else [None] * 3
    return " / ".join(
        f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
        for mean, deviation in zip(values.mean(0), deviations, strict=True)
    )


def minutes(runs: list[Path], name: str) -> str:
    """What the last call of each run took, by its file `name`; one that was killed before it was written has none."""
    told = [run / name for run in runs if (run / name).exists()]
    return ", ".join(f"{json.loads(path.read_text())['seconds'] / 60:.0f}" for path in told)


if __name__ == "__main__":
    main()
