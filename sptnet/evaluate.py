"""Exact distributed evaluation: every sample predicted once, gathered, and matched once on the gathered whole.

Two protocols: `unlabelled`, the unlabelled training images (transductive, the papers' numbers), and `test`.
"""

import io
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sptnet.build import build_store, build_untrained, num_new_classes
from sptnet.config import Config
from sptnet.data.augment import normalise
from sptnet.data.files import write_whole
from sptnet.data.loader import eval_batches
from sptnet.data.manifest import Kind
from sptnet.data.store import Store
from sptnet.data.tokens import Tokens
from sptnet.errors import SptnetError
from sptnet.method.metrics import clustering_accuracy
from sptnet.method.prompts import Prompt
from sptnet.run.folder import METRICS, PREDICTIONS, RunError, read_config, writing
from sptnet.run.model_file import load_model
from sptnet.run.progress import Progress
from sptnet.strategy.base import Strategy, parameter_groups
from sptnet.strategy.collectives import gather_rows, rank, world_size
from sptnet.strategy.connect import connect
from sptnet.strategy.create import create_strategy

MILLION = 1_000_000  # a confidence travels as a whole number, beside uids
PROTOCOLS: tuple[Kind, Kind] = ("unlabelled", "test")


class EvaluationError(SptnetError, RuntimeError):
    """Predictions that are not one of every sample; no number is given."""


class Predictions(NamedTuple):
    """[N] each, sorted by uid; a target is -1 where nobody knows it."""

    uid: NDArray[np.int64]
    target: NDArray[np.int64]
    prediction: NDArray[np.int64]
    confidence: NDArray[np.float32] | None = None


def expected_uids(store: Store, kind: Kind) -> NDArray[np.int64]:
    """The uids of a split, sorted, from the indexes of its shards."""
    indexes = [store.entries(shard)["uid"] for shard in store.manifest.of_kind(kind)]
    return np.sort(np.concatenate(indexes)) if indexes else np.zeros(0, np.int64)


def exactly_once(gathered: NDArray[np.int64], expected: NDArray[np.int64]) -> Predictions:
    """Check gathered rows [N, 4] of (uid, target, prediction, confidence) against the uids of the manifest.

    Raises:
        EvaluationError: uids that are missing, there twice, or of no sample; the message names the first of them.
    """
    rows = gathered[np.argsort(gathered[:, 0], kind="stable")]
    # sets of millions of uids take minutes: they are made only where there is something to be found
    if not np.array_equal(rows[:, 0], expected):
        raise EvaluationError(f"of {len(expected)} samples, {_faults(rows[:, 0], expected)}: no accuracy is given")
    return Predictions(rows[:, 0], rows[:, 1], rows[:, 2], (rows[:, 3] / MILLION).astype(np.float32))


def _faults(uids: NDArray[np.int64], expected: NDArray[np.int64]) -> str:
    """What is wrong with sorted uids that are not the expected ones."""
    found, counts = np.unique(uids, return_counts=True)
    faults = {
        "missing": np.setdiff1d(expected, found),
        "there more than once": found[counts > 1],
        "of no sample": np.setdiff1d(found, expected),
    }
    return "; ".join(f"{len(u)} {what} (uid {', '.join(map(str, u[:5]))})" for what, u in faults.items() if len(u))


def predict(
    strategy: Strategy,
    prompt: Tensor | None,
    config: Config,
    store: Store,
    kind: Kind,
    each_round: Callable[[int], None] = lambda images: None,
    tokens: Tokens | None = None,
) -> Tensor:
    """This rank's share of a split's predictions, on the device.

    int64 [n, 4] of (uid, target, prediction, confidence in millionths): the softmax of the predicted class at the
    student's temperature.

    Args:
        each_round: called on every rank equally often, with the images that all ranks together have taken; it may
            raise, if it does so on all ranks at once.
        tokens: of the evaluated views, to be read in place of the images.
    """
    device = strategy.device
    rows = [torch.zeros(0, 4, dtype=torch.int64, device=device)]
    batches = eval_batches(
        store, kind, batch_size=config.evaluate.batch_size, augment=config.data.augment,
        image_size=config.model.image_size, tokens=tokens, workers=config.data.workers, rank=rank(),
        world_size=world_size(),
    )  # fmt: skip
    samples, size = store.manifest.samples(kind), config.evaluate.batch_size
    rounds = math.ceil(math.ceil(samples / size) / world_size())
    for number in range(rounds):
        batch = next(batches, None)
        if batch is None:
            strategy.forward_evaluation(_blank(config, tokens).to(device), prompt)
        else:
            images = batch.images.to(device, non_blocking=True)
            pixels = images if tokens is not None else normalise(images, strategy.module.statistics)
            outputs = strategy.forward_evaluation(pixels, prompt)
            told = torch.stack([batch.uids, batch.targets], dim=1).to(device, non_blocking=True)
            best = outputs.logits.argmax(1, keepdim=True)
            shares = torch.softmax(outputs.logits.float() / config.loss.student_temperature, 1).gather(1, best)
            rows.append(torch.cat([told, best, (shares * MILLION).round().long()], dim=1))
        each_round(min((number + 1) * size * world_size(), samples))
    return torch.cat(rows)


def _blank(config: Config, tokens: Tokens | None) -> Tensor:
    """For a rank with fewer batches: where weights are sharded a forward pass is a collective, of the same blocks."""
    if tokens is not None:
        return torch.from_numpy(tokens.empty(1)).zero_()
    return torch.zeros(1, 3, *2 * [config.model.image_size])


def score(predictions: Predictions, num_old: int, num_classes: int) -> dict[str, Any]:
    """All/Old/New per instance, the same balanced over classes, how many images, and the classes they are in.

    Images whose class nobody knows have no part in an accuracy; where all are such there is none. `effective_classes`
    is exp of the entropy of the cluster sizes: as many as equally large ones would be.
    """
    _, targets, predicted, confidence = predictions
    known = targets >= 0
    sizes = np.bincount(predicted, minlength=num_classes)
    shares = sizes[sizes > 0] / len(predicted)
    told: dict[str, Any] = {"all": None, "old": None, "new": None}
    if known.any():
        told = clustering_accuracy(targets[known], predicted[known], num_old)._asdict()
        told["balanced"] = clustering_accuracy(targets[known], predicted[known], num_old, balanced=True)._asdict()
    if not known.all():
        told |= {"unknown": int((~known).sum()), "sizes": sizes.tolist()}
    if confidence is not None:
        told["confidence"] = round(float(confidence.mean()), 4)
    return told | {
        "samples": len(targets),
        "classes": num_classes,
        "classes_used": len(shares),
        "effective_classes": round(float(np.exp(-(shares * np.log(shares)).sum())), 2),
    }


def evaluate(
    strategy: Strategy,
    prompt: Prompt | None,
    config: Config,
    store: Store,
    each_round: Callable[[Kind, int], None] = lambda kind, images: None,
    tokens: Tokens | None = None,
) -> tuple[dict[str, Any], dict[str, Predictions]] | None:
    """Evaluate under both protocols; all ranks call it, rank 0 gets (results, predictions), the others None.

    Args:
        each_round: as for `predict`, with the protocol.
        tokens: as for `predict`.

    Raises:
        EvaluationError: a sample was lost or counted twice.
    """
    results: dict[str, Any] = {}
    kept: dict[str, Predictions] = {}
    manifest = store.manifest
    strategy.module.eval()
    with torch.no_grad():
        image = None if prompt is None else prompt()
    for protocol in PROTOCOLS:
        if manifest.samples(protocol) == 0:
            continue
        mine = predict(strategy, image, config, store, protocol, partial(each_round, protocol), tokens)
        gathered = gather_rows(mine)
        if gathered is not None:
            kept[protocol] = exactly_once(gathered.cpu().numpy(), expected_uids(store, protocol))
            results[protocol] = score(kept[protocol], manifest.num_old, strategy.module.head.num_classes)
    strategy.module.train()
    return (results, kept) if rank() == 0 else None


def save_evaluation(folder: Path, method: str, results: dict[str, Any], predictions: dict[str, Predictions]) -> None:
    """Write metrics.json and predictions.npz, each whole or not at all. Raises RunError."""
    # not the confidences: they differ in their last digits between strategies, and these files are the same under all
    kept = ("uid", "target", "prediction")
    arrays = {f"{protocol}_{name}": getattr(p, name) for protocol, p in predictions.items() for name in kept}
    compressed = io.BytesIO()
    np.savez_compressed(compressed, allow_pickle=False, **arrays)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PREDICTIONS, compressed.getvalue())
        write_whole(folder / METRICS, (json.dumps({"method": method, **results}, indent=1) + "\n").encode())


def evaluate_run(folder: Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, Any], dict[str, Any]] | None:
    """Evaluate a trained run again, on as many processes as this is called by, in the precision it was trained in.

    Args:
        overrides: `section.key=value` of what decides no number, e.g. `data.root`.

    Returns:
        (configuration, results, predictions) on rank 0, to be shown and saved; None on the others.

    Raises:
        RunError, DatasetError, EvaluationError: nothing to evaluate, or damage.
    """
    config = read_config(folder, overrides)
    accelerator, launch = connect(config.collective_timeout_s, config.device)
    store = build_store(config)
    model, prompt = build_untrained(config, store.manifest.num_old, num_new_classes(config, store.manifest))
    facts = load_model(folder, model, prompt)
    if facts.classes is not None and facts.classes != tuple(store.manifest.classes):
        raise RunError(f"{config.data.root} has other classes than {folder} was trained with: give its own data.root")
    if facts.precision is not None:
        launch = launch._replace(precision=facts.precision)
    strategy = create_strategy(accelerator, launch, model, lambda m: torch.optim.SGD(parameter_groups(m, 0.0)), 1)
    if prompt is not None:
        prompt.to(accelerator.device)
    with Progress(f"evaluate {folder}", active=rank() == 0) as progress:
        evaluated = evaluate(strategy, prompt, config, store, progress.of(store.manifest.samples))
    if dist.is_initialized():
        dist.barrier()
    return None if evaluated is None else (config, *evaluated)
