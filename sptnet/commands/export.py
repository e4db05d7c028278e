"""Write a run as an ordinary model.

FOLDER is then a model for timm (`timm.create_model("local-dir:FOLDER", pretrained=True)`) and for transformers, which
needs nothing of sptnet: the learned prompt is inside its position embedding. It has a model card and, where asked for,
the model as an exported program of torch and as ONNX.
"""

import argparse

from sptnet.arguments import path
from sptnet.data.format.files import local


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", type=path, help="the run's folder")
    command.add_argument("out", metavar="FOLDER", type=local, help="made here")
    command.add_argument("--onnx", action="store_true", help="model.onnx too (needs the extra onnx)")
    command.add_argument("--pt2", action="store_true", help="model.pt2 too, for torch.export.load")
    command.add_argument("--push", metavar="REPO", help="OWNER/NAME: send it to the Hugging Face hub")


def run(arguments: argparse.Namespace) -> int:
    """Export, say how exact it is, and send it."""
    from sptnet.export.folder import check_repo, export_run, push

    out, repo = arguments.out, arguments.push
    if repo is not None:
        check_repo(repo)
    found = export_run(arguments.run_folder, out, arguments.onnx, arguments.pt2, repo)
    exact = ", ".join(f"{reader} {difference:.1e}" for reader, difference in found.items())
    print(f"{out} is written; largest difference of a cosine to the run: {exact}")
    if repo is not None:
        print(f"sent to {push(out, repo)}")
    return 0
