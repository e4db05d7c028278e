"""The page: what is known of runs, and the galleries of the last one that has a model, in one HTML file."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import jinja2

import sptnet
from sptnet.data.format.files import write_whole
from sptnet.data.format.temporary import temporary_of
from sptnet.method.families import IMAGENET
from sptnet.report.categories import FINE_CONFIDENCE, FINE_PURITY
from sptnet.report.curves import HEIGHT, WIDTH, Row, read_steps, rows_of
from sptnet.report.embedding import SIZE
from sptnet.report.inference import HALF
from sptnet.report.prompts import Pictures, pictures_of
from sptnet.report.sprites import PLANS, Galleries, Sprite, galleries_of
from sptnet.report.subject import Run, Subject, run_of, sampled, subject_of
from sptnet.report.text import per_cent, printable
from sptnet.run.folder import RunError, writing
from sptnet.run.model_file import has_model, load_prompt, read_facts
from sptnet.run.tables import PROTOCOL_TITLES, collapse

FEWEST_CATEGORIES = 50  # that are shown, where there are so many
WITHOUT_PICTURES = 0.6  # of a page at most
MARK = b'<meta name="generator" content="sptnet '  # within the first bytes of every page
HEAD = 2048
NONE = Galleries({}, None)


class Written(NamedTuple):
    """What a page has: its size, how many categories, how many with a gallery, and what could not be had."""

    size: int
    categories: int
    galleries: int
    missing: list[str]


class _Told(NamedTuple):
    """What a page says beside its galleries."""

    runs: list[Run]
    pictures: dict[str, Pictures]
    curves: list[Row]
    max_mb: float


def write_page(folders: Sequence[Path], path: Path, max_mb: float) -> Written:
    """Write the page of some runs.

    Args:
        path: of the file; replaced where it is a page already.
        max_mb: its size at most, in 10^6 bytes.

    Raises:
        RunError: a run without an evaluation or with damage, a page that does not fit, a file that cannot be written.
    """
    _check_place(path)
    runs = [run_of(folder) for folder in folders]
    subject = subject_of(runs)
    told = _Told(runs, _pictures(runs, subject), rows_of([read_steps(run.folder) for run in runs]), max_mb)
    limit = int(max_mb * 1e6)
    page = _render(told, subject, NONE)
    while subject is not None and len(page) > WITHOUT_PICTURES * limit and len(subject.categories) > FEWEST_CATEGORIES:
        subject = _fewer(subject)
        page = _render(told, subject, NONE)
    if len(page) > limit:
        raise RunError(f"the page takes {len(page) / 1e6:.2f} MB without any gallery: raise --max-mb {max_mb:g}")
    galleries = NONE
    if subject is not None:
        room = limit - len(_render(told, subject, _blank(subject)))
        galleries = galleries_of(subject.categories, subject.images, room)
        page = _render(told, subject, galleries)
        subject.images.close()
    with writing(path):
        write_whole(path, page)
    if subject is None:
        return Written(len(page), 0, 0, [])
    missing = [*subject.notes, *subject.images.missing]
    return Written(len(page), len(subject.categories), len(galleries.sprites), missing)


def _pictures(runs: Sequence[Run], subject: Subject | None) -> dict[str, Pictures]:
    """The prompts of every run that has any, on images of the one that is looked into."""
    images = [] if subject is None else sampled(subject)
    found = {}
    for run in runs:
        if run.config is None or not has_model(run.folder):
            continue
        size = run.config.model.image_size
        prompt = load_prompt(run.folder, run.config.prompts, size)
        if prompt is not None:
            std = read_facts(run.folder).std or IMAGENET[1]
            found[str(run.folder)] = pictures_of(prompt, std, [one for one in images if one[1].shape[-1] == size])
    return found


def _blank(subject: Subject) -> Galleries:
    """Galleries that take what any takes beside its picture."""
    shown = [one for one in subject.categories if one.shown]
    return Galleries({one.id: Sprite("", HALF, 2, list(range(len(one.shown)))) for one in shown}, PLANS[-1])


def _fewer(subject: Subject) -> Subject:
    """The larger half of the categories."""
    kept = len(subject.categories) // 2
    left_out = subject.left_out + len(subject.categories) - kept
    return subject._replace(categories=subject.categories[:kept], left_out=left_out)


def _check_place(path: Path) -> None:
    """Raise RunError for what must not be replaced by a page."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise RunError(f"{path} is a folder: name a file for the page")
    if path.is_file():
        with writing(path), open(path, "rb") as there:
            ours = MARK in (head := there.read(HEAD)) or not head
    if path.exists() and not (path.is_file() and ours):
        raise RunError(f"{path} is there and no page of sptnet: it is not replaced, choose another file")
    with writing(path):  # before minutes of work
        (trial := temporary_of(path)).touch()
        trial.unlink()


def _render(told: _Told, subject: Subject | None, galleries: Galleries) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sptnet.report", ""), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"printable": printable, "per_cent": per_cent}
    style, script = (files("sptnet.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("page.html.j2").render(
        runs=told.runs, subject=subject, galleries=galleries, pictures=told.pictures, curves=told.curves,
        max_mb=f"{told.max_mb:g}",
        style=style, script=script, digest=digest, version=sptnet.__version__, protocols=PROTOCOL_TITLES,
        collapse=collapse, half=HALF, first_plan=PLANS[0], width=WIDTH, height=HEIGHT, size=SIZE,
        fine=(FINE_PURITY, FINE_CONFIDENCE),
    )  # fmt: skip
    return page.encode("utf-8", "backslashreplace")
