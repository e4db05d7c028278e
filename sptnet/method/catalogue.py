"""The ViTs of timm that can be used, as timm describes them: nothing is downloaded, and no weights are made."""

from collections.abc import Iterator
from typing import NamedTuple

import timm
import torch

from sptnet.method.families import MODULES, BackboneError, family_of
from sptnet.method.model import plain_backbone


class Described(NamedTuple):
    """A backbone by the name that `model.backbone` takes.

    pixels: that it is made for; it takes any multiple of `patch`. parameters: without a classifier. licence: of the
    pretrained weights, as timm states it; None where timm has none.
    """

    name: str
    width: int
    depth: int
    patch: int
    pixels: int
    parameters: int
    licence: str | None


def catalogue(word: str = "") -> Iterator[Described]:
    """Every backbone that can be used and has `word` in its name, by kind and name.

    Raises:
        BackboneError: there is none; the message says why the first model of timm with such a name cannot be used.
    """
    pretrained: dict[str, list[str]] = {}
    for name in timm.list_models(pretrained=True):
        pretrained.setdefault(name.partition(".")[0], []).append(name)
    found = False
    for module in MODULES:
        for architecture in timm.list_models(module=module):
            names = [n for n in pretrained.get(architecture, [architecture]) if word.lower() in n.lower()]
            if names:
                yield from _described(architecture, names)
                found = True
    if not found:
        raise _nothing(word)


def _described(architecture: str, names: list[str]) -> Iterator[Described]:
    with torch.device("meta"):
        vit = plain_backbone(architecture, None, False)
    parameters = sum(p.numel() for p in vit.parameters())
    patch, pixels = vit.patch_embed.patch_size[0], vit.patch_embed.img_size[0]
    for name in names:
        known = timm.get_pretrained_cfg(name) if "." in name else None
        licence = None if known is None else known.license or "not stated"
        yield Described(name, vit.num_features, len(vit.blocks), patch, pixels, parameters, licence)


def _nothing(word: str) -> BackboneError:
    others = timm.list_models(f"*{word.lower()}*")
    try:
        if others:
            with torch.device("meta"):
                family_of(timm.create_model(others[0], num_classes=0), others[0])
    except BackboneError as error:
        return error
    return BackboneError(f"timm has no model with {word!r} in its name: `sptnet backbones` lists all that can be used")
