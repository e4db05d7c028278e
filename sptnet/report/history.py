"""What a run was: method, configuration, data, revision, machines, time."""

import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sptnet.config import Config
from sptnet.data.format.manifest import KINDS, Manifest
from sptnet.run.folder import FINISHED, MODEL, is_unfinished
from sptnet.run.provenance import read_starts

SHOWN = 20  # starts


class History(NamedTuple):
    """facts: by name; config: the complete configuration as text, or None."""

    facts: list[tuple[str, str]]
    config: str | None


def history_of(folder: Path, method: str, config: Config | None, manifest: Manifest | None) -> History:
    """The facts of a run, as far as they are on disk."""
    facts = [("folder", str(folder)), ("method", method)]
    if config is not None:
        facts += [
            ("state", "unfinished" if is_unfinished(folder) else "finished"),
            ("model", f"{config.model.backbone} at {config.model.image_size} pixels, weights {config.model.weights}"),
            ("begins from", config.init or "no other run"),
            ("batch, epochs, seed", f"{config.data.batch_size}, {config.schedule.epochs}, {config.seed}"),
            ("data", config.data.root),
        ]
    if manifest is not None:
        counts = ", ".join(f"{manifest.samples(kind):,} {kind}" for kind in KINDS)
        facts += [
            ("dataset", f"{manifest.name}: {counts}; {manifest.num_old} old classes"),
            ("digest of the data", manifest.digest()),
        ]
    starts = read_starts(folder)
    facts += [("started", f"{len(starts)} times")] if len(starts) > 1 else []
    for number, start in enumerate(starts[-SHOWN:]):
        facts.append((f"start {max(0, len(starts) - SHOWN) + number + 1}", _start(start)))
    if starts and (took := _between(starts[0].get("time"), folder)):
        facts.append(("from the first start to the end", took))
    text = None if config is None else yaml.safe_dump(config.told(), sort_keys=False)
    return History(facts, text)


def _start(start: dict[str, Any]) -> str:
    strategy, nodes, packages = (start.get(key) for key in ("strategy", "nodes", "packages"))
    told = [str(start.get("time", "at an unknown time")), f"step {start.get('step', '?')}"]
    if isinstance(strategy, dict):
        told.append(", ".join(f"{name} {value}" for name, value in strategy.items()))
    if isinstance(nodes, dict):
        told.append("on " + ", ".join(f"{node} ({count} processes)" for node, count in nodes.items()))
    told.append(f"revision {start.get('git') or 'unknown: no checkout'}")
    if isinstance(packages, dict):
        told.append(", ".join(f"{name} {version}" for name, version in packages.items()))
    return "; ".join(told)


def _between(begin: object, folder: Path) -> str | None:
    """From a start to when the run was finished, or its model written."""
    try:
        end = (folder / FINISHED if (folder / FINISHED).exists() else folder / MODEL).stat().st_mtime
        seconds = end - datetime.strptime(str(begin), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (OSError, ValueError):
        return None
    if seconds < 0:
        return None
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else time.strftime("%H h %M min", time.gmtime(seconds % 86400))
        + (f" and {seconds // 86400:.0f} days" if seconds >= 86400 else "")
    )
