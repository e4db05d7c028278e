"""The model as one graph without Python: an exported program of torch (.pt2), and ONNX. Any batch size."""

import importlib.util
import io
import warnings
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sptnet.export.folding import ExportError

PROGRAM, ONNX = "model.pt2", "model.onnx"
INPUT, OUTPUTS = "images", ("embedding", "logits", "probabilities")
OPSET = 18
LARGEST_PROTOBUF = 1_900_000_000  # bytes; weights beyond it go into a file beside the .onnx


class Classifier(nn.Module):
    """normalised images [N, 3, S, S] -> embedding [N, D] (the class token), logits [N, K] (cosines), probabilities.

    Args:
        vit: a timm ViT with unit prototypes as its head.
        temperature: by which cosines are divided for probabilities.
    """

    def __init__(self, vit: Any, temperature: float):
        super().__init__()
        self.vit, self.temperature = vit, temperature

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        embedding = self.vit.forward_head(self.vit.forward_features(images), pre_logits=True)
        logits = F.linear(F.normalize(embedding, dim=1), self.vit.head.weight)
        return {
            "embedding": embedding,
            "logits": logits,
            "probabilities": (logits / self.temperature).softmax(1),
        }


def check_onnx() -> None:
    """Raise ExportError where the packages are not there that write ONNX and read it back."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"--onnx needs {', '.join(missing)} (in the checkout: pip install -c constraints.txt -e '.[onnx]')"
        )


def write_program(classifier: Classifier, image_size: int, path: Path) -> None:
    """Write an exported program; `torch.export.load(path).module()(images)` gives a dict. Raises OSError."""
    example = torch.zeros(2, 3, image_size, image_size)
    batch = torch.export.Dim("batch", min=1, max=65_536)
    program = torch.export.export(classifier, (example,), dynamic_shapes={INPUT: {0: batch}})
    # through a buffer: torch names a file that cannot be written in a RuntimeError of several lines
    written = io.BytesIO()
    torch.export.save(program, written)
    path.write_bytes(written.getvalue())


def write_onnx(classifier: Classifier, image_size: int, path: Path) -> None:
    """Write ONNX, with float32 inputs `images` and outputs named as OUTPUTS. Raises ExportError, OSError."""
    check_onnx()
    example = torch.zeros(2, 3, image_size, image_size)
    batch = torch.export.Dim("batch", min=1, max=65_536)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # it tells its every step
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                classifier, (example,), dynamo=True, dynamic_shapes={INPUT: {0: batch}}, input_names=[INPUT],
                output_names=list(OUTPUTS), opset_version=OPSET, verbose=False,
            )  # fmt: skip
        except ImportError as error:
            told = f"--onnx: torch {torch.__version__} and onnxscript {version('onnxscript')} do not fit: {error}"
            raise ExportError(f"{told}; pip install -U onnxscript") from None
    assert program is not None  # it is, of dynamo
    size = sum(value.numel() * value.element_size() for value in classifier.state_dict().values())
    program.save(str(path), external_data=size > LARGEST_PROTOBUF)
