"""The model card: README.md of an exported folder, as the hub shows it. What a dataset says of itself is text in it."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml

from sptnet.data.format.faults import DatasetError
from sptnet.data.format.manifest import KINDS, Manifest
from sptnet.export.origin import Origin, origin_of
from sptnet.run.folder import METRICS
from sptnet.run.model_file import read_facts, unfinished
from sptnet.run.provenance import read_starts
from sptnet.run.records import known
from sptnet.run.tables import NAMES, PROTOCOL_TITLES, collapse, read_metrics
from sptnet.trained import TrainedRun, manifest_of

METHODS = {"sptnet": "SPTNet (Wang, Vaze, Han, ICLR 2024)", "simgcd": "SimGCD (Wen, Zhao, Qi, ICCV 2023)"}
LISTED = 1000  # classes; config.json names all
SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~-])")


class Files(NamedTuple):
    """What beside timm's two files is in the folder; None where it is not."""

    program: str | None = None
    onnx: str | None = None


def markdown(text: object) -> str:
    """Plain text as Markdown that shows it: neither HTML nor markup of its own, on one line."""
    return SPECIAL.sub(r"\\\1", html.escape(" ".join(str(text).split())))


def model_card(run: TrainedRun, architecture: str, reference: str, files: Files) -> str:
    """The card's text.

    Args:
        reference: by which `timm.create_model` finds the folder: `local-dir:FOLDER` or `hf-hub:REPO`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sptnet.export", ""), undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
        autoescape=False,  # it is Markdown: `markdown` escapes
    )  # fmt: skip
    manifest, origin = _manifest_if_there(run), origin_of(run.config)
    data_name = Path(run.config.data.root).name if manifest is None else manifest.name
    metrics = read_metrics(run.folder) if (run.folder / METRICS).exists() else {}
    names, num_old = run.classes.names, run.classes.num_old
    return environment.get_template("card.md.j2").render(
        front=_front(origin),
        title=markdown(f"{METHODS[run.config.method].partition(' ')[0]} on {data_name}"),
        told_method=f"Trained by {METHODS[run.config.method]}.",
        origin=origin._replace(told=markdown(origin.told)),
        num_classes=len(names),
        num_old=num_old,
        architecture=architecture,
        size=run.encoder.image_size,
        prompt=run.encoder.prompt is not None,
        reference=_quoted(reference),
        folder=_quoted(reference.partition(":")[2]),
        program=files.program,
        onnx=files.onnx,
        temperature=run.temperature,
        rows=[_row(title, metrics[name]) for name, title in PROTOCOL_TITLES.items() if metrics.get(name)],
        notes=list(_notes(run, metrics)),
        facts=[(name, markdown(value)) for name, value in (*_data_facts(manifest), *_facts(run))],
        named=[(i, "old" if i < num_old else "new", markdown(name)) for i, name in enumerate(names[:LISTED])],
    )


def _quoted(path: str) -> str:
    """A path inside of quotation marks of Python."""
    return json.dumps(path)[1:-1]


def _front(origin: Origin) -> str:
    told: dict[str, Any] = {"library_name": "timm", "pipeline_tag": "image-classification", "license": origin.licence}
    if origin.licence_name is not None:
        told["license_name"] = origin.licence_name
    if origin.base_model is not None:
        told["base_model"] = origin.base_model
    told["tags"] = ["image-classification", "generalized-category-discovery", "timm", "transformers"]
    return yaml.safe_dump(told, sort_keys=False)


def _row(title: str, result: dict[str, Any]) -> dict[str, str]:
    shares = {name: f"{100 * result[name]:.1f}" if known(result[name]) else "not known" for name in NAMES}
    return {"protocol": title, **shares, "samples": f"{result['samples']:,}"}


def _notes(run: TrainedRun, metrics: dict[str, Any]) -> Iterator[str]:
    if how_far := unfinished(run.folder):
        yield f"**Unfinished**: {markdown(how_far)}."
    for name, title in PROTOCOL_TITLES.items():
        if metrics.get(name) and (told := collapse(metrics[name])):
            yield f"**{title}**: {markdown(told)}."


def _manifest_if_there(run: TrainedRun) -> Manifest | None:
    """Of the run's dataset; a model is exported where its images are not."""
    try:
        return manifest_of(run.config)
    except DatasetError:
        return None


def _data_facts(manifest: Manifest | None) -> Iterator[tuple[str, object]]:
    if manifest is None:
        yield "data", "not there when this was exported"
        return
    counts = [f"{manifest.samples(kind):,} {kind}" for kind in KINDS]
    yield "data", ", ".join([manifest.name, *counts])
    if manifest.protocol:
        yield "protocol of the split", json.dumps(manifest.protocol)
    yield "digest of the data", manifest.digest()


def _facts(run: TrainedRun) -> Iterator[tuple[str, object]]:
    """How it was trained, by name."""
    config, facts = run.config, read_facts(run.folder)
    yield "epochs", config.schedule.epochs
    if facts.step is not None:
        yield "steps", facts.step
    yield "batch", f"{config.data.batch_size}, half of it labelled"
    yield "optimizer", f"{config.optimizer.name}, learning rate {config.optimizer.lr * config.lr_factor:g}"
    if run.encoder.prompt is not None:
        yield "prompts", f"{config.prompts.kind}, learning rate {config.prompts.lr * config.lr_factor:g}"
    yield "precision", "float32" if facts.precision in (None, "no") else facts.precision
    yield "seed", config.seed
    starts = read_starts(run.folder)
    if starts:
        last = starts[-1]
        yield "last start", last.get("time", "unknown")
        yield "revision of the code", last.get("git") or "not of a checkout"
        packages = last.get("packages")
        if isinstance(packages, dict):
            yield "packages", ", ".join(f"{name} {version}" for name, version in packages.items())
