"""Spatial prompts: the pixels SPTNet learns and adds to every image (SPTNet, section 3.2).

Only live pixels are parameters. `prompt()` composes them into one image [1, 3, H, W], in the units of the
normalised input, that the model adds to every image of the batch.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sptnet.names import PromptKind


class LivePixels(nn.Module):
    """An image that is zero outside `mask`; the pixels inside are parameters [3, live], drawn from N(0, 1).

    Args:
        mask: [h, w] bool, True where a pixel is learned.
        tiles: how often (rows, columns) the pattern is repeated, every repetition sharing its parameters.
        generator: source of the initial values; None draws from torch's global one.
    """

    live: Tensor

    def __init__(self, mask: Tensor, tiles: tuple[int, int] = (1, 1), generator: torch.Generator | None = None):
        super().__init__()
        self.shape = (mask.shape[0], mask.shape[1])
        self.tiles = tiles
        self.register_buffer("live", mask.flatten().nonzero().squeeze(1), persistent=False)
        self.pixels = nn.Parameter(torch.randn(3, len(self.live), generator=generator))

    def forward(self) -> Tensor:
        height, width = self.shape
        image = self.pixels.new_zeros(3, height * width).index_copy(1, self.live, self.pixels)
        # [3, h * w] -> [1, 3, rows * h, columns * w]
        return image.view(1, 3, height, width).repeat(1, 1, *self.tiles)

    @torch.no_grad()
    def copy_from(self, image: Tensor) -> None:
        """Take the live pixels out of a full pattern [1, 3, h, w]; what it holds elsewhere is ignored."""
        self.pixels.copy_(image.reshape(3, -1).index_select(1, self.live.to(image.device)))


class Prompt(nn.Module):
    """The sum of one or two parts (`spatial`, `global`); calling it gives the prompt image [1, 3, H, W]."""

    def __init__(self, kind: PromptKind, image_size: int, parts: Mapping[str, LivePixels]):
        super().__init__()
        self.kind = kind
        self.image_size = image_size
        self.parts = nn.ModuleDict(parts)

    def part(self, name: str) -> LivePixels:
        """`spatial` or `global`."""
        part = self.parts[name]
        assert isinstance(part, LivePixels)
        return part

    def forward(self) -> Tensor:
        return torch.stack([part() for part in self.parts.values()]).sum(0)


def ring(size: int, width: int) -> Tensor:
    """[size, size] bool: True on the outermost `width` pixels of a square."""
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[width : size - width, width : size - width] = False
    return mask


def create_prompt(
    kind: PromptKind,
    image_size: int,
    patch_size: int,
    border: int = 1,
    frame: int = 30,
    generator: torch.Generator | None = None,
    deviation: float = 1.0,
) -> Prompt:
    """Build the prompt of a square image.

    Args:
        kind: `spatial` (a border inside every patch, separate for each), `shared` (one border for all patches),
            `global` (a frame around the image), `all` (global + spatial, the paper's choice for most datasets).
        image_size, patch_size: pixels; the first a multiple of the second.
        border: width m of the border inside a patch, pixels.
        frame: width p of the frame around the image, pixels.
        generator: source of the initial values, N(0, 1) times `deviation`.
        deviation: in units of the normalised input; 0 begins where a model without a prompt stands.

    Raises:
        ValueError: unknown kind, or sizes that leave no room for the prompt.
    """
    if kind not in ("spatial", "shared", "global", "all"):
        raise ValueError(f"prompt kind {kind!r} is unknown: use spatial, shared, global or all")
    if patch_size < 1 or image_size % patch_size:
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch_size}")
    grid = image_size // patch_size
    parts: dict[str, LivePixels] = {}
    if kind in ("global", "all"):
        if not 0 < 2 * frame < image_size:
            raise ValueError(
                f"a frame of {frame} pixels does not fit an image of {image_size}: use 1 to {(image_size - 1) // 2}"
            )
        parts["global"] = LivePixels(ring(image_size, frame), generator=generator)
    if kind != "global":
        if not 0 < 2 * border <= patch_size:
            raise ValueError(
                f"a border of {border} pixels does not fit a patch of {patch_size}: use 1 to {patch_size // 2}"
            )
        patch = ring(patch_size, border)
        if kind == "shared":
            parts["spatial"] = LivePixels(patch, (grid, grid), generator)
        else:
            parts["spatial"] = LivePixels(patch.repeat(grid, grid), generator=generator)
    with torch.no_grad():
        for part in parts.values():
            part.pixels.mul_(deviation)
    return Prompt(kind, image_size, parts)
