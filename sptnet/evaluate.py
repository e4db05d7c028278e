"""Exact distributed evaluation: every sample predicted once, and matched once on the counts of all.

Two protocols: `unlabelled`, the unlabelled training images (transductive, the papers' numbers), and `test`.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sptnet.build import build_store, build_untrained, num_new_classes
from sptnet.config import Config
from sptnet.data.augment import normalise
from sptnet.data.format.files import write_whole
from sptnet.data.format.manifest import Kind, Manifest
from sptnet.data.loader import eval_batches
from sptnet.data.storage.store import Store
from sptnet.data.tokens import Tokens
from sptnet.exact_counts import MILLION, NOT_FINITE, Counts, count_once, rows_of, windows_of
from sptnet.method.metrics import Accuracy, accuracy_of_counts
from sptnet.method.prompts import Prompt
from sptnet.run.folder import METRICS, RunError, read_config, writing
from sptnet.run.model_file import load_model, read_facts
from sptnet.run.predictions import PredictionParts, save_predictions
from sptnet.run.progress import Progress
from sptnet.strategy.base import Strategy
from sptnet.strategy.collectives import on_any_rank, rank, world_size
from sptnet.strategy.connect import connect
from sptnet.strategy.create import create_evaluator
from sptnet.strategy.kernels import choose_kernels

PROTOCOLS: tuple[Kind, Kind] = ("unlabelled", "test")


def predict(
    strategy: Strategy,
    prompt: Tensor | None,
    config: Config,
    store: Store,
    kind: Kind,
    each_round: Callable[[int], None] = lambda images: None,
    tokens: Tokens | None = None,
) -> Iterator[Tensor]:
    """This rank's share of a split's predictions, on the device, a batch at a time.

    int64 [n, 4] of (uid, target, prediction, confidence in millionths): the softmax of the predicted class at the
    student's temperature.

    Args:
        each_round: called on every rank equally often, with the images that all ranks together have taken; it may
            raise, if it does so on all ranks at once.
        tokens: of the evaluated views, to be read in place of the images.
    """
    device = strategy.device
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
            shares = torch.where(outputs.logits.isfinite().all(1, keepdim=True), shares, NOT_FINITE)
            yield torch.cat([told, best, (shares * MILLION).round().long()], dim=1)
        each_round(min((number + 1) * size * world_size(), samples))


def _blank(config: Config, tokens: Tokens | None) -> Tensor:
    """For a rank with fewer batches: where weights are sharded a forward pass is a collective, of the same blocks."""
    if tokens is not None:
        return torch.from_numpy(tokens.empty(1)).zero_()
    return torch.zeros(1, 3, *2 * [config.model.image_size])


def score(counts: Counts, num_old: int, num_classes: int) -> dict[str, Any]:
    """All/Old/New per instance, the same balanced over classes, how many images, and the classes they are in.

    Images whose class nobody knows have no part in an accuracy, which is None where there is no image. `known` counts
    the others, and `known_classes` the classes that they are of.
    `effective_classes` is exp of the entropy of the cluster sizes: as many as equally large ones would be.
    """
    sizes, of_class = counts.sizes[:num_classes], counts.confusion.sum(0)
    known = int(of_class.sum())
    samples = int(sizes.sum())
    shares = sizes[sizes > 0] / samples
    told: dict[str, Any] = {"all": None, "old": None, "new": None}
    if known:
        told |= _shares(accuracy_of_counts(counts.confusion, num_old))
        told["balanced"] = _shares(accuracy_of_counts(counts.confusion, num_old, balanced=True))
    told["known"] = {"all": known, "old": (old := int(of_class[:num_old].sum())), "new": known - old}
    told["known_classes"] = int((of_class > 0).sum())
    if known < samples:
        told |= {"unknown": samples - known, "sizes": sizes.tolist()}
    if counts.confidence is not None:
        told["confidence"] = round(counts.confidence / MILLION / samples, 4)
    return told | {
        "samples": samples,
        "classes": num_classes,
        "classes_used": len(shares),
        "effective_classes": round(float(np.exp(-(shares * np.log(shares)).sum())), 2),
    }


def _shares(accuracy: Accuracy) -> dict[str, float | None]:
    """By name; None instead of nan, which is no JSON."""
    return {name: None if math.isnan(share) else share for name, share in accuracy._asdict().items()}


def evaluate(
    strategy: Strategy,
    prompt: Prompt | None,
    config: Config,
    store: Store,
    each_round: Callable[[Kind, int], None] = lambda kind, images: None,
    tokens: Tokens | None = None,
) -> tuple[dict[str, Any], PredictionParts]:
    """Evaluate under both protocols; all ranks call it.

    Args:
        each_round: as for `predict`, with the protocol.
        tokens: as for `predict`.

    Returns:
        The results, and this rank's part of the predictions, put aside until they are saved.

    Raises:
        EvaluationError: a sample was lost or counted twice.
    """
    results: dict[str, Any] = {}
    parts = PredictionParts()
    manifest, classes = store.manifest, strategy.module.head.num_classes
    strategy.module.eval()
    with torch.no_grad():
        image = None if prompt is None else prompt()
    try:
        for protocol in PROTOCOLS:
            if manifest.samples(protocol) == 0:
                continue
            mine = predict(strategy, image, config, store, protocol, partial(each_round, protocol), tokens)
            counts = count_once(store, protocol, rows_of(mine), classes, strategy.device, partial(parts.add, protocol))
            results[protocol] = score(counts, manifest.num_old, classes)
    finally:
        strategy.module.train()
    return results, parts


def save_evaluation(
    folder: Path, method: str, manifest: Manifest, results: dict[str, Any], parts: PredictionParts
) -> None:
    """Write predictions and metrics.json, each whole or not at all; all ranks call it. Raises RunError.

    Args:
        manifest: of the dataset: predictions name images by what may be another image's in shards that are made anew.
    """
    if rank() == 0:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    numbers = {kind: windows_of(results[kind]["samples"]) for kind in PROTOCOLS if kind in results}
    save_predictions(folder, parts, results, numbers)
    if rank() == 0:
        with writing(folder):
            of = {"method": method, "dataset": manifest.digest()}
            told = json.dumps(of | results, indent=1, allow_nan=False)
            write_whole(folder / METRICS, f"{told}\n".encode())


def evaluate_run(
    folder: Path, overrides: Sequence[str] = ()
) -> tuple[Config, Manifest, dict[str, Any], PredictionParts]:
    """Evaluate a trained run again, on as many processes as this is called by, in the precision it was trained in.

    Args:
        overrides: `section.key=value` of what decides no number, e.g. `data.root`.

    Returns:
        (configuration, dataset, results, this rank's predictions), to be shown by rank 0 and saved by all.

    Raises:
        RunError, DatasetError, EvaluationError: nothing to evaluate, damage, or a model that training has replaced
            meanwhile: what was found is not of the run any more.
    """
    config = read_config(folder, overrides)
    accelerator, launch = connect(config.collective_timeout_s, config.device)
    choose_kernels(accelerator.device, config.matmul_precision, config.deterministic)
    store = build_store(config)
    model, prompt = build_untrained(config, store.manifest.num_old, num_new_classes(config, store.manifest))
    facts = load_model(folder, model, prompt)
    if facts.classes is not None and facts.classes != tuple(store.manifest.classes):
        raise RunError(f"{config.data.root} has other classes than {folder} was trained with: give its own data.root")
    if facts.precision is not None:
        launch = launch._replace(precision=facts.precision)
    strategy = create_evaluator(accelerator, launch, model, config.memory.frozen_blocks)
    if prompt is not None:
        prompt.to(accelerator.device)
    with Progress(f"evaluate {folder}", active=rank() == 0) as progress:
        progress.say(strategy.world)
        evaluated = evaluate(strategy, prompt, config, store, progress.of(store.manifest.samples))
    if on_any_rank(rank() == 0 and read_facts(folder) != facts, strategy.device):
        told = RunError(f"the model in {folder} was replaced while it was evaluated: evaluate it again")
        raise told.with_outcome("retry")
    return config, store.manifest, *evaluated
