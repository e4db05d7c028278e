"""What is said when the journey is over: sizes, both stages beside each other, what looks wrong, where the page is."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sptnet.data.features import FeatureFolder
from sptnet.data.format.files import folders_in, write_whole
from sptnet.data.format.manifest import Kind, Manifest
from sptnet.data.listing import ListingError, images_below
from sptnet.data.storage.store import LocalStore
from sptnet.data.table import count_rows, encode_rows
from sptnet.discover.diagnostics import (
    Agreement,
    Group,
    StageFacts,
    about_sizes,
    agreement,
    groups_of,
    own_class_share,
    predictions_by_features,
    worse,
)
from sptnet.discover.request import TITLES, Request, StageName
from sptnet.predict import ERRORS, has_changed
from sptnet.report.categories import read_predictions
from sptnet.report.text import printable
from sptnet.run.parts import writing_parts
from sptnet.run.tables import collapse, print_table, read_metrics

SHOWN = 30  # categories of the table; all of them are in the file
SIZES = "sizes.csv"


def told_apart(out: Path, manifest: Manifest) -> Agreement:
    """How often the backbone, as it comes, puts a labelled image next to one of its class."""
    labelled = FeatureFolder(out / "features", manifest).split("labelled")
    return agreement(labelled, labelled.targets)


def facts_of(out: Path, name: StageName, manifest: Manifest) -> StageFacts:
    """What is seen of one of the two runs. Raises RunError, FeaturesError."""
    unlabelled = FeatureFolder(out / "features", manifest).split("unlabelled")
    found, metrics = read_predictions(out / name)["unlabelled"], read_metrics(out / name)
    groups = predictions_by_features(unlabelled, found.uid, found.category)
    return StageFacts(
        TITLES[name], own_class_share(out / "checks" / name), agreement(unlabelled, groups),
        metrics["unlabelled"], metrics["test"],
    )  # fmt: skip


def say_goodbye(request: Request, manifest: Manifest, interval: tuple[int, int] | None, remarks: Sequence[str]) -> None:
    """Print it all, and write sizes.csv.

    Args:
        remarks: what was noticed on the way.
    """
    out = request.out
    stages = [facts_of(out, name, manifest) for name in request.stages]
    groups = groups_of(out / "sorted")
    num_new = stages[-1].result["classes"] - manifest.num_old
    _write_sizes(out, groups)
    print_table(_sizes(groups))
    if len(groups) > SHOWN:
        print(f"and {len(groups) - SHOWN} smaller ones; {out / SIZES} lists all")
    print()
    print_table(_beside(stages))
    wrong = [*remarks, *_about_images(out, manifest), *_about_stages(out, request, stages)]
    wrong += _about_changes(request, manifest)
    wrong += about_sizes(groups, num_new, interval, manifest.num_old)
    print("\nWhat looks wrong:" if wrong else "\nNothing looks wrong, by what can be seen without labels.")
    for sentence in wrong:
        print(f"- {printable(sentence, 1000)}")
    print(f"\nWhich image belongs where: {out / 'sorted' / 'predictions'}")
    print(f"Open this in a browser: {out / 'page.html'}", flush=True)


def _about_images(out: Path, manifest: Manifest) -> list[str]:
    told = []
    if manifest.skipped:
        told.append(
            f"{len(manifest.skipped)} images cannot be read or do not decode, and had no part in training, the first: "
            f"{manifest.skipped[0]['file']}"
        )
    if bad := count_rows(out / "sorted" / ERRORS, "csv"):
        told.append(f"{bad} images of the unlabelled ones cannot be read: {out / 'sorted' / ERRORS} names them")
    return told


def _about_stages(out: Path, request: Request, stages: Sequence[StageFacts]) -> list[str]:
    told = []
    first, last = stages
    for stage in stages:
        if sentence := collapse(stage.result):
            told.append(f"{stage.name}: {sentence}")
    if last.neighbours.is_chance:
        told.append(
            f"the categories are not in the images, as far as the backbone sees: of {100 * last.neighbours.found:.0f}% "
            f"of them the most similar other image is in the same category, by chance it would be of "
            f"{100 * last.neighbours.chance:.0f}%"
        )
    if reasons := worse(first, last):
        told.append(
            f"{last.name}, whose categories these are, is worse than {first.name} before it by what can be seen: "
            f"{'; '.join(reasons)}. `{_predict(request, 'simgcd', 'sorted_simgcd')}` writes those of {first.name}; "
            "a larger --hours allows more epochs"
        )
    return told


def _about_changes(request: Request, manifest: Manifest) -> list[str]:
    told = []
    for folder in changed_classes(request, manifest):
        told.append(
            f"{folder} holds other images, or other classes, than those that were trained on, and these have no part "
            "in it: a new OUT takes what is there now"
        )
    if has_changed(request.unlabelled, request.out / "sorted"):
        told.append(
            f"{request.unlabelled} holds other images now than those that were sorted: "
            f"`{_predict(request, request.then, 'sorted_again')}` sorts all that are there"
        )
    return told


def changed_classes(request: Request, manifest: Manifest) -> list[Path]:
    """Those of the folders with named classes whose images are others, by their names, than the shards'."""
    store = LocalStore(request.out / "shards", look=False)
    failed = {str(skipped["file"]) for skipped in manifest.skipped}
    changed = []
    folders: dict[Kind, Path | None] = {"labelled": request.labelled, "test": request.test}
    for kind, folder in folders.items():
        if folder is None or not folder.is_dir():
            continue
        shards = manifest.of_kind(kind)
        known = {path for shard in shards for path in store.paths(shard) or ()}
        try:
            there = {
                f"{kind}/{name}/{os.fsdecode(image)}"
                for name in folders_in(folder)
                for image in images_below(folder / name)
            }
        except (OSError, ListingError):
            there = set()  # it cannot be listed any more
        if known and (there - failed != known):
            changed.append(folder)
    return changed


def _predict(request: Request, stage: StageName, into: str) -> str:
    """The command that sorts the images by one of the trainings, for a shell."""
    out = request.out
    return shlex.join(["sptnet", "predict", str(out / stage), str(request.unlabelled), "--out", str(out / into)])


def _write_sizes(out: Path, groups: Sequence[Group]) -> None:
    head = ["class_name", "is_new", "images", "mean_confidence", "nearest_old_class"]
    rows = [[g.name, g.is_new, g.size, f"{g.confidence:.4f}", g.nearest] for g in groups]
    with writing_parts(out / SIZES):
        write_whole(out / SIZES, encode_rows([head, *rows]))


def _sizes(groups: Sequence[Group]) -> Table:
    total = sum(group.size for group in groups)
    new = [group for group in groups if group.is_new]
    title = f"{total} images in {len(groups)} categories, {sum(g.size for g in new)} of them in {len(new)} new ones"
    table = Table(title=title, title_justify="left")
    table.add_column("category", overflow="fold")
    table.add_column("images", justify="right")
    table.add_column("mean confidence", justify="right")
    table.add_column("nearest old class, mostly", overflow="fold")
    for group in groups[:SHOWN]:
        nearest = printable(group.nearest) if group.is_new else ""
        table.add_row(printable(group.name), str(group.size), f"{group.confidence:.2f}", nearest)
    return table


def _beside(stages: Sequence[StageFacts]) -> Table:
    table = Table(title="The two stages, by what can be seen without labels", title_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("labelled images in their own class", [f"{100 * s.own_class.value:.1f}%" for s in stages]),
        ("nearest neighbour in the same category", [f"{100 * s.neighbours.found:.1f}%" for s in stages]),
        ("by chance", [f"{100 * s.neighbours.chance:.1f}%" for s in stages]),
        ("categories in use", [f"{s.result['classes_used']} of {s.result['classes']}" for s in stages]),
        ("effective number of categories", [f"{s.result['effective_classes']}" for s in stages]),
        ("mean confidence", [f"{s.result.get('confidence', float('nan')):.2f}" for s in stages]),
    ]
    if all(stage.test is not None for stage in stages):
        rows.append(("test images, All / Old / New, %", [_shares(stage.test or {}) for stage in stages]))
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _shares(result: dict[str, Any]) -> str:
    values = [result[name] for name in ("all", "old", "new")]
    return " / ".join("-" if v is None or np.isnan(v) else f"{100 * v:.1f}" for v in values)
