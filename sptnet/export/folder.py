"""The folder of an exported run, whole or not at all.

config.json, model.safetensors   for `timm.create_model("local-dir:FOLDER", pretrained=True)` and transformers
model.pt2, model.onnx            where asked for
README.md                        the model card

Before the folder gets its name, everything in it is read by its own reader and compared with the run.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from sptnet.data.format.temporary import remove_leftovers, temporary_of, writer_of
from sptnet.export.card import Files, model_card
from sptnet.export.folding import ExportError, hub_config, plain_vit
from sptnet.export.graphs import INPUT, ONNX, OUTPUTS, PROGRAM, Classifier, check_onnx, write_onnx, write_program
from sptnet.run.folder import writing
from sptnet.trained import TrainedRun

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
COMPARED = 3  # images; another batch than that of the graphs' example
LARGEST_DIFFERENCE = 1e-4  # of cosines; a fold that is wrong is wrong by far more


def export_run(
    run_folder: Path, out: Path, onnx: bool = False, pt2: bool = False, repo: str | None = None
) -> dict[str, float]:
    """Write a run as an ordinary model.

    Args:
        out: made here; must not be there, or be empty.
        onnx, pt2: those files too.
        repo: of the hub, which the card then names; nothing is sent.

    Returns:
        For every reader of the files the largest difference of cosines to the run, on random images.

    Raises:
        RunError, DatasetError: nothing trained, no manifest, a folder that cannot be written.
        ExportError: a run or a folder that it cannot be done with.
    """
    if onnx:
        check_onnx()
    run = TrainedRun(run_folder)
    vit = plain_vit(run)
    classifier, size = Classifier(vit, run.temperature).eval(), run.encoder.image_size
    with _new_folder(out) as place:
        (place / CONFIG).write_text(json.dumps(hub_config(run, vit), indent=1) + "\n", encoding="utf-8")
        (place / WEIGHTS).write_bytes(save(vit.state_dict(), metadata={"format": "pt"}))
        if pt2:
            write_program(classifier, size, place / PROGRAM)
        if onnx:
            write_onnx(classifier, size, place / ONNX)
        files = Files(PROGRAM if pt2 else None, ONNX if onnx else None)
        reference = f"hf-hub:{repo}" if repo else f"local-dir:{out}"
        card = model_card(run, vit.pretrained_cfg["architecture"], reference, files)
        (place / CARD).write_text(card, encoding="utf-8")
        return _differences(run, place)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it, if all goes well, or in it, if it is there. Raises ExportError, RunError.

    One that is there may be a mount point, or the only folder that may be written: its files are moved into it then,
    config.json, without which it is no model, last.
    """
    out = Path(os.path.realpath(out))
    there = out.exists()
    if there and not (out.is_dir() and all(writer_of(name) for name in os.listdir(out))):
        raise ExportError(f"{out} is there already: remove it, or choose another folder")
    with writing(out):
        remove_leftovers(out if there else out.parent)  # of exports that were killed
        place = temporary_of(out / "export" if there else out)
        place.mkdir(parents=True)
        try:
            yield place
            if there:
                for path in sorted(place.iterdir(), key=lambda path: path.name == CONFIG):
                    path.replace(out / path.name)
            else:
                place.replace(out)
        finally:
            if place.exists():
                shutil.rmtree(place)


@torch.no_grad()
def _differences(run: TrainedRun, place: Path) -> dict[str, float]:
    """The largest difference of cosines of what every reader makes of the files. Raises ExportError."""
    size = run.encoder.image_size
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COMPARED, 3, size, size), dtype=torch.uint8, generator=draws)
    expected, pixels = run.forward(images), run.normalise(images)
    found = {reader: float((cosines - expected.logits).abs().max()) for reader, cosines in _read_back(place, pixels)}
    for reader, difference in found.items():
        if not difference <= LARGEST_DIFFERENCE:
            raise ExportError(
                f"what {reader} reads differs from {run.folder} by {difference:.1e} in a cosine, more than "
                f"{LARGEST_DIFFERENCE:.0e}: nothing was exported"
            )
    return found


def _read_back(place: Path, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    vit = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    token = vit.forward_head(vit.forward_features(pixels), pre_logits=True)
    yield "timm", vit.head(F.normalize(token, dim=1))
    if (place / PROGRAM).exists():
        yield "torch.export", torch.export.load(place / PROGRAM).module()(pixels)["logits"]
    if (place / ONNX).exists():
        import onnxruntime

        session = onnxruntime.InferenceSession(place / ONNX, providers=["CPUExecutionProvider"])
        found = dict(zip(OUTPUTS, session.run(list(OUTPUTS), {INPUT: pixels.numpy()}), strict=True))
        yield "onnxruntime", torch.from_numpy(found["logits"])


def check_repo(repo: str) -> None:
    """Raise ExportError for a name that no repository of the hub can have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if "/" not in repo:  # by which timm and transformers would not find it
        raise ExportError(f"--push {repo}: name its owner too, as OWNER/{repo}")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ExportError(f"--push {repo}: {' '.join(str(error).split())[:200]}") from None


def push(out: Path, repo: str) -> str:
    """Send an exported folder to a repository of the Hugging Face hub, made if need be; returns its address.

    Raises:
        ExportError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="sptnet")
    try:
        name = api.create_repo(repo, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=out, commit_message="Add model")
        return f"{api.endpoint}/{name}"
    except Exception as error:  # of one of three HTTP libraries, as its version has it, or of the hub itself
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{out} is written, and could not be sent to {repo}: {reason}") from None
