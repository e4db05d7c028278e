"""SPTNet at scale: generalized category discovery with spatial prompts, on one process or many.

The public names are loaded when first used, so that reading shards needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sptnet.method.losses import GCDLoss as GCDLoss
    from sptnet.method.metrics import clustering_accuracy as clustering_accuracy
    from sptnet.method.model import PromptedViT as PromptedViT
    from sptnet.method.model import create_model as create_model
    from sptnet.method.prompts import create_prompt as create_prompt
    from sptnet.method.reference import load_reference as load_reference
    from sptnet.trained import load as load

__version__ = "0.1.0"

_HOMES = {
    "GCDLoss": "sptnet.method.losses",
    "PromptedViT": "sptnet.method.model",
    "clustering_accuracy": "sptnet.method.metrics",
    "create_model": "sptnet.method.model",
    "create_prompt": "sptnet.method.prompts",
    "load": "sptnet.trained",
    "load_reference": "sptnet.method.reference",
}
__all__ = sorted(_HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sptnet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
