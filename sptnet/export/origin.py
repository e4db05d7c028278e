"""What a run's weights began from, back through the runs that it began from, and under which licence that is."""

from pathlib import Path
from typing import NamedTuple

import timm

from sptnet.config import Config
from sptnet.run.folder import CONFIG, RunError, read_config

# by which the hub knows a licence; another one is `other`, with its name beside it
LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")
AUTHORS = "cc-by-nc-sa-4.0"  # of the files that the authors of SPTNet and SimGCD publish


class Origin(NamedTuple):
    """licence: as the hub writes it; `other` with `licence_name`. base_model: its name on the hub. told: a sentence."""

    licence: str
    licence_name: str | None
    base_model: str | None
    told: str


def origin_of(config: Config) -> Origin:
    """Where a run's weights come from, as far as it can be followed."""
    seen: set[str] = set()
    while config.init is not None:
        start = Path(config.init)
        if (start / CONFIG).is_file() and str(start) not in seen:
            seen.add(str(start))
            try:
                config = read_config(start)
            except RunError:
                return _unknown(start, "which cannot be read")
        elif start.is_file() or start.suffix in (".pt", ".pth"):
            return Origin(
                AUTHORS, None, None,
                f"Training began from {start.name}, a checkpoint in the authors' format: their files are CC BY-NC-SA "
                "4.0, and so is what is made of them.",
            )  # fmt: skip
        else:
            return _unknown(start, "which is not there any more")
    return _of_backbone(config)


def _unknown(start: Path, why: str) -> Origin:
    return Origin(
        "other", "unknown", None,
        f"Training began from {start.name}, {why}: if it was made of the authors' files, this is CC BY-NC-SA 4.0 too.",
    )  # fmt: skip


def _of_backbone(config: Config) -> Origin:
    name, weights = config.model.backbone, config.model.weights
    if weights == "none":
        return Origin("other", "of-the-trainer", None, "Nothing pretrained is in these weights.")
    if weights != "timm":
        told = f"The backbone began from the file {Path(weights).name}, of whatever licence that is."
        return Origin("other", "of-the-pretrained-weights", None, told)
    known = timm.get_pretrained_cfg(name)
    hub = known.hf_hub_id if known is not None else None
    licence = (known.license if known is not None else None) or "unknown"
    told = f"The backbone began from timm's {name}, of licence {licence}."
    if licence in LICENCES:
        return Origin(licence, None, hub, told)
    return Origin("other", licence, hub, told)
