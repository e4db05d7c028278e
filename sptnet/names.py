"""What a configuration chooses by name, apart from what the names stand for: a typo is told before torch is loaded."""

from typing import Literal

AugmentName = Literal["crop_flip", "affine"]
PromptKind = Literal["spatial", "shared", "global", "all"]
PromptedPair = Literal["copy", "views"]
LrShape = Literal["cosine_epoch", "one_cycle"]
