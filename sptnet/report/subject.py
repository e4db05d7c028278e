"""What is known of runs, and of what the one discovered that is looked into, as far as their files are still there."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sptnet.build import build_store
from sptnet.columns import Classes, named
from sptnet.config import Config
from sptnet.data.augment import eval_view
from sptnet.data.format.faults import DatasetError
from sptnet.data.format.manifest import Kind, Manifest
from sptnet.data.image import DecodeError, decode
from sptnet.report.categories import Category, Ids, Sorted, categories_of, name_of, read_predictions
from sptnet.report.confusion import Confusion, confusion_of
from sptnet.report.embedding import MAPPED, Map, map_of
from sptnet.report.history import History, history_of
from sptnet.report.inference import Images, Inferred, look, nearest_by_prototypes
from sptnet.run.folder import CONFIG, RunError, read_config
from sptnet.run.model_file import has_model, read_facts
from sptnet.run.tables import read_metrics
from sptnet.trained import TrainedRun, manifest_of

MOST_CATEGORIES = 2000  # that are shown
PROMPTED = 3  # images that the prompt is shown on


class Run(NamedTuple):
    """What is known of a run without looking at an image; None, where it is not on disk."""

    folder: Path
    metrics: dict[str, Any]
    config: Config | None
    manifest: Manifest | None
    history: History


class Subject(NamedTuple):
    """The run whose categories are shown.

    Attributes:
        left_out: how many categories there are beyond those shown.
        notes: sentences on what could not be had.
    """

    run: Run
    found: Sorted
    classes: Classes
    categories: list[Category]
    images: Images
    confusion: Confusion | None
    map: Map | None
    left_out: int
    notes: list[str]


def run_of(folder: Path) -> Run:
    """What is known of a run; raises RunError where it was not evaluated, or is damaged."""
    metrics = read_metrics(folder)
    config = read_config(folder) if (folder / CONFIG).exists() else None
    manifest = None
    if config is not None:
        try:
            manifest = manifest_of(config)
        except DatasetError:
            manifest = None  # the page says what it misses where it looks for images
    return Run(folder, metrics, config, manifest, history_of(folder, metrics["method"], config, manifest))


def subject_of(runs: Sequence[Run]) -> Subject | None:
    """The last run that has a model, looked into; None where none has. Raises RunError."""
    having = [run for run in runs if run.config is not None and has_model(run.folder)]
    if not having:
        return None
    run = having[-1]
    assert run.config is not None
    predictions = read_predictions(run.folder)
    kind: Kind = "unlabelled" if "unlabelled" in predictions else "test"
    if kind not in predictions or not _is_of(run.metrics[kind], predictions[kind]):
        raise RunError(
            f"the predictions of {run.folder} are not those that its metrics.json tells of: `sptnet eval {run.folder}` "
            "makes both again"
        )
    found = predictions[kind]
    notes: list[str] = []
    trained, classes, true_names = _classes(run, found, notes)
    highest, lowest = int(found.category.max()), int(found.category.min())
    if lowest < 0 or highest >= len(classes.names):
        raise RunError(
            f"the predictions of {run.folder} are of class {highest if lowest >= 0 else lowest}, its model has "
            f"{len(classes.names)}: `sptnet eval {run.folder}` makes them again"
        )
    categories = categories_of(found, classes.names, classes.num_old, true_names)
    shown = categories[:MOST_CATEGORIES]
    images = images_of(run, found) if trained is not None else Images(None, found, [])
    looked = None
    if trained is not None and images.store is not None:
        looked = look(trained, images, shown)
    if trained is not None and (looked is None or not len(looked.rows)):
        nearest_by_prototypes(trained, shown)
    confusion = confusion_of(found, classes.num_old, lambda number: name_of(number, true_names))
    return Subject(
        run, found, classes, shown, images, confusion, _mapped(looked, found), len(categories) - len(shown), notes
    )


def _is_of(result: dict[str, Any], found: Sorted) -> bool:
    """Whether as many images are in as many classes as an evaluation has counted."""
    used = len(np.unique(found.category))
    return bool(result["samples"] == len(found.uid) and result["classes_used"] == used)


def images_of(run: Run, found: Sorted) -> Images:
    """The images of a split; what cannot be had is said in `missing`, and no error."""
    assert run.config is not None
    try:
        store = build_store(run.config)
    except DatasetError as error:
        return Images(None, found, [str(error)])
    evaluated, manifest = run.metrics["dataset"], store.manifest
    # what earlier versions wrote does not say of which dataset it is
    same = len(found.uid) == manifest.samples(found.kind) if evaluated is None else evaluated == manifest.digest()
    if same:
        return Images(store, found)
    told = f"{run.config.data.root} has other shards than {run.folder} was evaluated on: `sptnet eval {run.folder}`"
    return Images(None, found, [told])


def _classes(run: Run, found: Sorted, notes: list[str]) -> tuple[TrainedRun | None, Classes, list[str]]:
    """The model, where its dataset still names its classes; what its classes are called, and those of the dataset."""
    assert run.config is not None
    try:
        on_gpu = torch.cuda.is_available() and run.config.device != "cpu"
        trained = TrainedRun(run.folder, "cuda" if on_gpu else "cpu")
    except DatasetError as error:
        notes.append(str(error))
    else:
        return trained, trained.classes, run.manifest.classes if run.manifest is not None else trained.classes.names
    facts = read_facts(run.folder)
    true_names = list(facts.classes or ())
    num_old = facts.num_old if facts.num_old is not None else len(true_names)
    return None, named(true_names, num_old, int(found.category.max()) + 1), true_names


def _mapped(looked: Inferred | None, found: Sorted) -> Map | None:
    if looked is None or not len(looked.rows):
        return None
    print(f"report: t-SNE of {min(len(looked.rows), MAPPED)} images", file=sys.stderr, flush=True)
    return map_of(looked, found)


def sampled(subject: Subject) -> list[tuple[str, torch.Tensor]]:
    """Names and pixels of a few images, of new categories first."""
    config = subject.run.config
    assert config is not None
    some = sorted((one for one in subject.categories if one.shown), key=lambda one: not one.is_new)[:PROMPTED]
    places = subject.images.places(_first_rows(some)) if some else {}
    found = []
    for category in some:
        if (place := places.get(category.shown[0])) is None:
            continue
        sample = subject.images.read(place)
        try:
            pixels = eval_view(config.data.augment, decode(sample.encoded), config.model.image_size)
        except DecodeError:
            continue
        found.append((f"an image of {category.name}", pixels))
    return found


def _first_rows(categories: Sequence[Category]) -> Ids:
    return np.array([category.shown[0] for category in categories], np.int64)
