"""What is told of predictions: the names of classes, and the columns of a table."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sptnet.data.table import Table
from sptnet.run.folder import RunError


@dataclass(frozen=True)
class Classes:
    """What a run's outputs mean: the first `num_old` of `names` are old classes, the others `new-000`, ..."""

    names: list[str]
    num_old: int


def named(names: Sequence[str], num_old: int, number: int) -> Classes:
    """`number` classes, the first of them by their names; a new one never has the name of an old one."""
    old = list(names[:num_old])
    taken = set(old)
    new = (name for count in itertools.count() if (name := f"new-{count:03d}") not in taken)
    return Classes([*old, *itertools.islice(new, max(0, number - num_old))], num_old)


def prediction_columns(logits: NDArray[np.float32], classes: Classes, temperature: float, top: int) -> Table:
    """What is told of predictions, by columns of [n].

    class_id, class_name    the class of the largest logit, the first of equal ones, as an evaluation takes it
    is_new                  whether it is a new one
    confidence, margin      softmax of logits / temperature: the largest, and its distance to the second; not calibrated
                            on new classes
    nearest_old_class, nearest_old_similarity   the old class with the largest logit, and that logit, which is a cosine
    top1_class, top1_confidence, ...            the `top` most confident classes, by name

    Args:
        logits: [n, K] cosines between class token and class.

    Raises:
        RunError: they are not finite.
    """
    if bad := int((~np.isfinite(logits).all(1)).sum()):
        raise RunError(
            f"the model's outputs of {bad} of {len(logits)} images are not finite: its training diverged, or its "
            "weights are damaged"
        )
    rows = np.arange(len(logits))
    scaled = logits.astype(np.float64) / temperature
    shares = np.exp(scaled - scaled.max(1, keepdims=True, initial=-np.inf))
    shares /= shares.sum(1, keepdims=True)
    count = min(max(top, 2), logits.shape[1])
    # [n, count]: the largest first, of equal ones the first, as argmax has it
    best = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    old = logits[:, : classes.num_old]
    nearest = old.argmax(1) if len(old) else np.zeros(0, np.int64)
    columns: Table = {
        "class_id": best[:, 0].astype(np.int64),
        "class_name": [classes.names[c] for c in best[:, 0]],
        "is_new": best[:, 0] >= classes.num_old,
        "confidence": shares[rows, best[:, 0]].astype(np.float32),
        "margin": (shares[rows, best[:, 0]] - shares[rows, best[:, 1]]).astype(np.float32),
        "nearest_old_class": [classes.names[c] for c in nearest],
        "nearest_old_similarity": old[rows, nearest].astype(np.float32),
    }
    for place in range(min(top, count)):
        columns[f"top{place + 1}_class"] = [classes.names[c] for c in best[:, place]]
        columns[f"top{place + 1}_confidence"] = shares[rows, best[:, place]].astype(np.float32)
    return columns
