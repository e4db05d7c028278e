"""A trained run, or a bare backbone, for use: `sptnet.load(RUN)` from Python, `Encoder` for the commands.

run = sptnet.load("runs/photos/sptnet")
table = run.predict(["a.jpg", "b.jpg"])     # columns by name; pandas.DataFrame(table)
tokens = run.features(["a.jpg", "b.jpg"])   # float32 [2, D]
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sptnet.build import build_store, build_untrained, num_new_classes
from sptnet.columns import Classes, named, prediction_columns
from sptnet.config import Config
from sptnet.data.augment import eval_view, normalise
from sptnet.data.format.faults import DatasetError
from sptnet.data.format.files import LARGEST_IMAGE, is_url, read_regular
from sptnet.data.format.manifest import LARGEST_MANIFEST, MANIFEST, Manifest, parse_manifest
from sptnet.data.image import DecodeError, check_size, decode, decode_pillow
from sptnet.data.table import Table
from sptnet.errors import SptnetError
from sptnet.method.model import Outputs, PromptedViT, create_model
from sptnet.method.prompts import Prompt
from sptnet.names import AugmentName
from sptnet.run.folder import read_config
from sptnet.run.model_file import load_model, number_of_classes, read_facts, unfinished
from sptnet.strategy.kernels import MatmulPrecision

ImageLike = str | PathLike[str] | Image.Image | NDArray[np.uint8]
BACKBONE_BATCH = 64  # images of a forward pass where no run says how many


MANY_NDIM = 4  # of an array of images, [N, H, W, 3]


class ImageError(SptnetError, ValueError):
    """An image given from Python that is none."""


@dataclass(frozen=True)
class Encoder:
    """A model with its prompt, and what decides its numbers beside the weights.

    Attributes:
        module, prompt: on the CPU, in evaluation mode; the prompt as an image [1, 3, S, S], or None.
        batch_size: images of a forward pass; another one may round differently.
        source: who it is, for people.
        kernels: precision of float32 products and whether sums have a fixed order, on a GPU.
    """

    module: PromptedViT
    prompt: Tensor | None
    augment: AugmentName
    image_size: int
    batch_size: int
    source: str
    kernels: tuple[MatmulPrecision, bool] = ("highest", False)

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the class token of an image, as plain values."""
        mean, std = self.module.statistics
        return {
            "source": self.source,
            "weights": weights_digest(self.module, self.prompt),
            "image_size": self.image_size,
            "batch_size": self.batch_size,
            "view": self.augment,
            "mean": list(mean),
            "std": list(std),
        }


def weights_digest(module: PromptedViT, prompt: Tensor | None) -> str:
    """sha256 over names, types, shapes and values of backbone and prompt; the head has no part in class tokens."""
    digest = hashlib.sha256()
    named = [*sorted(module.backbone.state_dict().items()), *([] if prompt is None else [("prompt", prompt)])]
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encoder_of_backbone(backbone: str, weights: str, image_size: int) -> Encoder:
    """A timm ViT as it comes; `weights` as for `model.weights`. Raises BackboneError."""
    # the head is not read: as small as it can be
    module = create_model(backbone, 1, 1, image_size=image_size, weights=weights, head_hidden=8, head_bottleneck=8)
    return Encoder(module.eval(), None, "crop_flip", image_size, BACKBONE_BATCH, f"{backbone} ({weights})")


def classes_of(folder: Path, config: Config) -> Classes:
    """Names for a run's classes; a new class has no name but its number, also where a benchmark knows better.

    They are those that its model file tells, so that the dataset need not be there; files of earlier versions did not.

    Raises:
        RunError, DatasetError: no model there, or nothing that tells its classes.
    """
    facts = read_facts(folder)
    if facts.classes is not None and facts.num_old is not None:
        # neither the configuration nor the names need say how many are new: the dataset may have
        return named(facts.classes, facts.num_old, number_of_classes(folder))
    manifest = manifest_of(config)
    return named(manifest.classes, manifest.num_old, manifest.num_old + num_new_classes(config, manifest))


def manifest_of(config: Config) -> Manifest:
    """The manifest of a run's dataset, whose shards need not be there. Raises DatasetError."""
    if is_url(config.data.root):
        return build_store(config).manifest
    path = Path(config.data.root) / MANIFEST
    try:
        return parse_manifest(read_regular(path, LARGEST_MANIFEST), str(path))
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}): it tells what the run was trained on; copy it there"
        ) from None


class TrainedRun:
    """A run's model and its classes, in this process.

    Attributes:
        config: of the run.
        encoder: its model and prompt.
        classes: what the outputs mean.
    """

    def __init__(self, folder: str | PathLike[str], device: str | torch.device = "cpu"):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.classes = classes_of(self.folder, self.config)
        num_old = self.classes.num_old
        module, prompt = build_untrained(self.config, num_old, len(self.classes.names) - num_old)
        load_model(self.folder, module, prompt)
        self.device = torch.device(device)
        module.eval().to(self.device)
        self.encoder = Encoder(
            module, _image_of(prompt, self.device), self.config.data.augment, self.config.model.image_size,
            self.config.evaluate.batch_size, str(self.folder),
            (self.config.matmul_precision, self.config.deterministic),
        )  # fmt: skip

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """uint8 [n, 3, S, S] -> features [n, D], projections [n, P], logits [n, K]."""
        return self.encoder.module(self.normalise(images.to(self.device)), self.encoder.prompt)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [..., 3, S, S] -> float32, as the model was trained with."""
        return normalise(images, self.encoder.module.statistics)

    def predict(self, images: Iterable[ImageLike], top: int = 5) -> Table:
        """A row for every image: the columns that `prediction_columns` tells, `path` before them.

        Args:
            images: paths, PIL images, or uint8 arrays [H, W, 3] or [H, W], of any iterable; `path` is empty for what is
                no path.
            top: how many classes are told, at most.

        Raises:
            ImageError: one that cannot be read; the message says which.
        """
        images = _listed(images)
        logits = [self.forward(batch).logits.cpu().numpy() for batch in self._batches(images)]
        paths = [str(image) if isinstance(image, str | PathLike) else "" for image in images]
        together = np.concatenate(logits or [np.zeros((0, len(self.classes.names)), np.float32)])
        return {"path": paths, **prediction_columns(together, self.classes, self.temperature, top)}

    def features(self, images: Iterable[ImageLike]) -> NDArray[np.float32]:
        """Class tokens as the head reads them: [N, D]. Raises ImageError."""
        tokens = [self.forward(batch).features.float().cpu().numpy() for batch in self._batches(_listed(images))]
        return np.concatenate(tokens or [np.zeros((0, self.encoder.module.backbone.num_features), np.float32)])

    @property
    def temperature(self) -> float:
        """By which logits are divided for a confidence: the student's, with which the head was trained."""
        return self.config.loss.student_temperature

    def _batches(self, images: Sequence[ImageLike]) -> Iterator[Tensor]:
        size = self.encoder.batch_size
        for begin in range(0, len(images), size):
            some = images[begin : begin + size]
            yield torch.stack([self._seen(image, begin + i) for i, image in enumerate(some)])

    def _seen(self, image: ImageLike, number: int) -> Tensor:
        """An image as an evaluation sees it: uint8 [3, S, S]. Raises ImageError."""
        try:
            return eval_view(self.encoder.augment, _pixels(image, number), self.encoder.image_size)
        except (OSError, DecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            told = image if isinstance(image, str | PathLike) else f"a {type(image).__name__}"
            raise ImageError(f"image {number}, {told}, cannot be read: {reason}") from None


def load(run: str | PathLike[str], device: str | torch.device | None = None) -> TrainedRun:
    """A trained run for use from Python; a warning where it was not trained to its end.

    Args:
        run: the run's folder, wherever it was copied to; its dataset need not be there.
        device: a GPU if there is one, by default.

    Raises:
        RunError, DatasetError: nothing trained there; a run of an earlier version whose dataset is not there.
        ConfigError, BackboneError: its configuration, or its backbone, is none of this version.
    """
    if how_far := unfinished(Path(run)):
        warnings.warn(how_far, stacklevel=2)
    return TrainedRun(run, device or ("cuda" if torch.cuda.is_available() else "cpu"))


@torch.no_grad()
def _image_of(prompt: Prompt | None, device: torch.device) -> Tensor | None:
    return None if prompt is None else prompt().to(device)


def _listed(images: Iterable[ImageLike]) -> Sequence[ImageLike]:
    """The images one by one, however they were given. Raises ImageError for what is one image, or none."""
    if isinstance(images, np.ndarray) and (images.ndim == 0 or (images.dtype == np.uint8 and images.ndim != MANY_NDIM)):
        told = f"{images.dtype} {list(images.shape)}"
        raise ImageError(
            f"images is a single array, {told}: give a list, [image] for one, list(images) for a stack of grey ones"
        )
    if isinstance(images, str | bytes | PathLike | Image.Image | Tensor) or not isinstance(images, Iterable):
        raise ImageError(f"images is a {type(images).__name__}: give a list of images, [image] for one")
    return list(images)


def _pixels(image: ImageLike, number: int) -> Tensor:
    """uint8 [3, H, W] of an image in any of its forms. Raises ImageError, OSError, DecodeError."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ImageError(
                f"image {number} is an array of {image.dtype} {list(image.shape)}: give uint8 [H, W, 3] or [H, W]"
            )
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        check_size(*image.size)
        try:
            return decode_pillow(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise whatever damage makes of a file
            raise DecodeError(str(error) or type(error).__name__) from None
    if not isinstance(image, str | PathLike):
        raise ImageError(f"image {number} is a {type(image).__name__}: give a path, a PIL image or a uint8 array")
    return decode(read_regular(Path(image), LARGEST_IMAGE))
