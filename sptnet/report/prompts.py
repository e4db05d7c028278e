"""The learned prompts as pictures, and what they look like added to images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sptnet.data.sheet import encoded_as
from sptnet.method.prompts import Prompt
from sptnet.report.sprites import data_uri

QUALITY = 85  # of WebP
PART_TITLES = {"spatial": "borders of patches", "global": "frame"}


class Picture(NamedTuple):
    """A picture of a prompt, or of an image with it."""

    title: str
    uri: str


class Pictures(NamedTuple):
    """prompts: its parts and their sum, on one scale; added: pairs of an image without and with it.

    scale: what white means, in standard deviations of the images; grey is nothing, black as much the other way.
    """

    prompts: list[Picture]
    added: list[tuple[Picture, Picture]]
    scale: float
    size: int


@torch.no_grad()
def pictures_of(prompt: Prompt, std: Sequence[float], images: Sequence[tuple[str, Tensor]] = ()) -> Pictures:
    """Draw a prompt.

    Args:
        std: deviation of the channels by which the model's images are normalised.
        images: names and uint8 [3, S, S] pixels to which it is added.
    """
    parts = {PART_TITLES[name]: prompt.part(name)()[0].cpu() for name in prompt.parts}
    together = prompt()[0].cpu()
    if len(parts) > 1:
        parts["sum"] = together
    scale = max(float(part.abs().max()) for part in parts.values()) or 1.0
    drawn = [Picture(title, _uri(127.5 + 127.5 * part / scale)) for title, part in parts.items()]
    deviation = 255 * torch.tensor(std).view(3, 1, 1)
    added = [
        (Picture(name, _uri(pixels.float())), Picture(f"{name}, with the prompt", _uri(pixels + together * deviation)))
        for name, pixels in images
    ]
    return Pictures(drawn, added, scale, prompt.image_size)


def _uri(pixels: Tensor) -> str:
    """[3, H, W] between 0 and 255, clipped."""
    array: NDArray[np.uint8] = pixels.clamp(0, 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return data_uri(encoded_as(Image.fromarray(array), "WEBP", quality=QUALITY, method=4))
