"""SPTNet at scale: generalized category discovery with spatial prompts, on one process or many.

The public names are loaded when first used, so that reading shards needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sptnet.losses import GCDLoss as GCDLoss
    from sptnet.metrics import clustering_accuracy as clustering_accuracy
    from sptnet.model import PromptedViT as PromptedViT
    from sptnet.model import create_model as create_model
    from sptnet.prompts import create_prompt as create_prompt
    from sptnet.reference import load_reference as load_reference

__version__ = "0.1.0"

_HOMES = {
    "GCDLoss": "sptnet.losses",
    "PromptedViT": "sptnet.model",
    "clustering_accuracy": "sptnet.metrics",
    "create_model": "sptnet.model",
    "create_prompt": "sptnet.prompts",
    "load_reference": "sptnet.reference",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sptnet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
