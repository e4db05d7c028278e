"""Which recipe photographs should get: one factor of SimGCD's at a time, on photographs that grocery.py has sharded.

    python benchmarks/study.py OUT --weights FILE --arms "4 views, 100 epochs" "rate 0.1" --seeds 0

OUT is a folder of benchmarks/grocery.py: its shards and tokens are used, and each run is a folder `study/ARM-SEED` in
it. What is there is not trained again. Runs of other views or sizes make tokens of their own below `OUT/tokens`.
"""

import argparse
import json
from pathlib import Path

from grocery import ROOT, SPTNET, call, console, figures, minutes, model_of
from rich.table import Table

RECIPE = "4 views, 100 epochs"
ARMS: dict[str, list[str]] = {
    RECIPE: [],
    "2 views": ["data.views=2"],
    "8 views": ["data.views=8"],
    "2 views, rate 0.1": ["data.views=2", "optimizer.lr=0.1"],
    "8 views, rate 0.1": ["data.views=8", "optimizer.lr=0.1"],
    "16 views": ["data.views=16"],
    "50 epochs": ["schedule.epochs=50", "loss.teacher_warmup_epochs=15"],
    "200 epochs": ["schedule.epochs=200", "loss.teacher_warmup_epochs=60"],
    "rate 0.1": ["optimizer.lr=0.1"],  # as published
    "rate 0.025": ["optimizer.lr=0.025"],
    "rate 0.2": ["optimizer.lr=0.2"],
    "168 px": ["model.image_size=168"],
    "224 px": ["model.image_size=224"],
    "published: fresh views, 200 epochs": [
        "data.views=null",
        "trunk_cache=off",
        "schedule.epochs=200",
        "optimizer.lr=0.1",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--image-size", type=int, default=112, help="where an arm does not say another")
    parser.add_argument("--arms", nargs="+", default=[RECIPE], choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    table = Table(title=f"{given.backbone}, seeds {given.seeds}: All/Old/New")
    for column in ("", "unlabelled", "test", "classes used", "min"):
        table.add_column(column)
    for arm in given.arms:
        runs = [given.out / "study" / f"{arm.replace(' ', '-')}-{seed}" for seed in given.seeds]
        for run, seed in zip(runs, given.seeds, strict=True):
            if not (run / "finished").exists():
                seconds = call(
                    *SPTNET, "train", f"{ROOT}/configs/photographs_simgcd.yaml", f"run={run}", f"seed={seed}",
                    f"data.root={given.out / 'shards'}", f"trunk_cache={given.out / 'tokens'}", "evaluate.every=25",
                    *model_of(given), *ARMS[arm],
                )  # fmt: skip
                (run / "study.json").write_text(json.dumps({"seconds": seconds}))
        used = [json.loads((run / "metrics.json").read_text())["unlabelled"]["classes_used"] for run in runs]
        table.add_row(
            arm, *(figures(runs, protocol) for protocol in ("unlabelled", "test")), ", ".join(map(str, used)),
            minutes(runs, "study.json"),
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
