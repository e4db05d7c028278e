"""What was asked for, checked before anything is computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sptnet.config_file import keys_of, load_config, published, read_override
from sptnet.data.format.faults import DatasetError
from sptnet.data.format.files import folders_in, is_utf8
from sptnet.errors import SptnetError
from sptnet.method.families import BackboneError
from sptnet.run.resume import decides
from sptnet.trained import encoder_of_backbone

Then = Literal["continued", "sptnet"]
StageName = Literal["simgcd"] | Then
TITLES: dict[StageName, str] = {
    "simgcd": "SimGCD", "continued": "SimGCD continued on fresh views", "sptnet": "SPTNet",
}  # fmt: skip
FEWEST_OLD = 3  # classes that `sptnet estimate-k` can compare
OURS = ("run", "init", "method", "resume", "data.root", "model.num_new", "model.backbone", "model.weights")


class RequestError(SptnetError, ValueError):
    """A journey that cannot begin; the message says why."""

    exit_code = 2


@dataclass(frozen=True)
class Request:
    """What decides the result; `hours` and `processes` decide how it is come by.

    Attributes:
        new: how many new classes there are; None: it is estimated.
        test: class folders to measure on, or None.
        overrides: `section.key=value`, for both trainings.
        then: what trains behind SimGCD.
    """

    labelled: Path
    unlabelled: Path
    out: Path
    new: int | None
    test: Path | None
    backbone: str
    weights: str
    overrides: tuple[str, ...]
    then: Then

    @property
    def stages(self) -> tuple[StageName, StageName]:
        """The two trainings, by the names of their folders and of their recipes."""
        return "simgcd", self.then

    def says(self) -> dict[str, Any]:
        """For the file that begins OUT; overrides that decide no number may change on the way."""
        deciding = [override for override in self.overrides if any(map(decides, self._keys_of(override)))]
        then = {} if self.then == "sptnet" else {"then": self.then}  # nor was it said before there was a choice
        return {
            "labelled": str(self.labelled.resolve()), "unlabelled": str(self.unlabelled.resolve()),
            "test": None if self.test is None else str(self.test.resolve()), "new": self.new,
            "backbone": self.backbone, "weights": self.weights, "overrides": deciding, **then,
        }  # fmt: skip

    def chosen(self) -> dict[str, Any]:
        """The overrides by dotted key, those of a whole section key by key. Raises ConfigError."""
        return {key: value for override in self.overrides for key, value in self._keys_of(override).items()}

    @staticmethod
    def _keys_of(override: str) -> dict[str, Any]:
        known, found = {key for key, _ in keys_of()}, {}
        left = [read_override(override)]
        while left:
            key, value = left.pop()
            if isinstance(value, dict) and key not in known:
                left += [(f"{key}.{name}", inner) for name, inner in reversed(value.items())]
            else:
                found[key] = value
        return found


def check(request: Request) -> list[str]:
    """What cannot work is an error before the first second is spent; returns sentences on what hardly will.

    Raises:
        RequestError, ConfigError: the message says what to do.
    """
    folders = [request.labelled, request.unlabelled, *([] if request.test is None else [request.test])]
    for folder in folders:
        if not folder.is_dir():
            raise RequestError(f"{folder} is missing or not a folder")
        if request.out.resolve().is_relative_to(folder.resolve()):
            raise RequestError(f"{request.out} lies among the images of {folder}: choose a folder outside of it")
    if not is_utf8(request.out.resolve()):
        raise RequestError(f"the path {str(request.out)!r} is not UTF-8: choose another folder")
    for key in request.chosen():
        if key.startswith(OURS):
            raise RequestError(f"override of {key}: discover sets it from its own arguments")
    load_config(published("configs", f"photographs_{request.then}"), [*request.overrides, "run=x", "data.root=x"])
    if request.weights not in ("timm", "none") and not Path(request.weights).is_file():
        raise RequestError(
            f"--weights {request.weights}: no such file; `timm` fetches pretrained weights, `none` means random ones"
        )
    try:
        classes = folders_in(request.labelled)
    except OSError as error:
        raise DatasetError(f"{error.filename or request.labelled} cannot be listed: {error.strerror}") from None
    if not classes:
        raise RequestError(
            f"{request.labelled} has no class folders: every folder in it is a class, named by the folder"
        )
    if len(classes) < FEWEST_OLD and request.new is None:
        raise RequestError(
            f"{request.labelled} has {len(classes)} class{'es' if len(classes) > 1 else ''}, and estimating the "
            f"number of new ones takes at least {FEWEST_OLD}: say --new N, or name more classes"
        )
    if len(classes) == 1:
        return [
            f"{request.labelled} has one class, {classes[0]}: nothing in it says what tells one class from another, "
            "and what is found may be any difference between images"
        ]
    return []


def check_backbone(request: Request) -> None:
    """Build the backbone and read its weights, from timm's hub where they are not here yet, and let go of both.

    Raises:
        RequestError: it cannot be built, or nothing has its weights.
    """
    recipe = load_config(published("configs", "photographs_simgcd"), ["run=x", "data.root=x"])
    size = request.chosen().get("model.image_size", recipe.model.image_size)
    try:
        encoder_of_backbone(request.backbone, request.weights, size)
    except BackboneError as error:
        told = f"--backbone {request.backbone} --weights {request.weights}: {error}"
        raise RequestError(told).with_outcome(error.outcome) from None
