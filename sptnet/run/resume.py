"""Continue a run: from which checkpoint, whether its numbers are this run's, and what is put back."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sptnet.config import Config, flat
from sptnet.config_file import keys_of
from sptnet.data.format.manifest import Manifest
from sptnet.method.families import IMAGENET, Statistics
from sptnet.method.model import PromptedViT
from sptnet.run.checkpoint import (
    CheckpointError,
    Facts,
    check_folder,
    check_parts,
    checkpoints,
    digest,
    is_of_run,
    left_behind,
    read_facts,
    read_tensors,
)
from sptnet.run.folder import OccupiedError, RunError
from sptnet.run.lock import RunLock
from sptnet.steps import Learner
from sptnet.strategy.collectives import rank, world_size

# sections and keys of the configuration that decide the numbers; the others decide speed, place and what is told
DECIDING = ("method", "seed", "data.batch_size", "data.streams", "data.window", "data.augment",
            "data.views", "data.tokens",
            "data.tolerate_bad_samples", "model", "prompts", "optimizer", "loss", "schedule",
            "matmul_precision", "deterministic", "compile")  # fmt: skip
IRRELEVANT = ("model.weights",)  # a moved file is the same backbone: its digest is compared


def decides(key: str) -> bool:
    """Whether a dotted key of the configuration decides a run's numbers."""
    return _below(key, DECIDING) and not _below(key, IRRELEVANT)


def numbers_of(config: Config, manifest: Manifest, statistics: Statistics) -> dict[str, Any]:
    """Everything that decides the numbers of a run, by dotted key; another strategy or world size does not,
    but for `loss.scope: local`, see `facts_to_continue`.

    Args:
        statistics: by which its model's images are normalised; what is not said is ImageNet's.
    """
    keys = {key: list(value) if isinstance(value, tuple) else value for key, value in flat(config.model_dump())}
    chosen = {k: v for k, v in keys.items() if decides(k)}
    if statistics != IMAGENET:
        chosen |= {"model.mean": list(statistics[0]), "model.std": list(statistics[1])}
    return chosen | {"data.digest": manifest.digest()}


def backbone_of(config: Config, model: PromptedViT) -> dict[str, str]:
    """Source and digest of what a run does not train, before the model is spread over ranks."""
    frozen = ((name, p.cpu()) for name, p in model.named_parameters() if not p.requires_grad)
    return {"source": config.init or config.model.weights, "sha256": digest(frozen)}


def where_to_continue(config: Config) -> Path | None:
    """The checkpoint that `resume` asks for; None to start anew.

    Another run's checkpoint is where a run starts: once it has checkpoints of its own it continues from those.

    Raises:
        CheckpointError: a path that is no checkpoint.
    """
    check_folder(Path(config.run))
    asked, own = config.resume.source, checkpoints(Path(config.run))
    if asked == "none":
        return None
    if asked == "auto":
        return own[-1] if own else None
    path = Path(asked)
    if own and not is_of_run(path, Path(config.run)):
        return own[-1]
    if there := checkpoints(path):
        return there[-1]
    read_facts(path)
    return path


def agree_where_to_continue(config: Config) -> tuple[Path | None, RunLock | None]:
    """Rank 0 locks the run's folder and looks, all ranks get its answer; the lock is rank 0's to release.

    A folder on a shared disk may look different from another node for a while.

    Raises:
        CheckpointError, RunError: on all ranks.
    """
    lock: RunLock | None = None
    told: list[Any] = ["", "", "final"]
    if rank() == 0:
        try:
            lock = RunLock(Path(config.run))
            left_behind(Path(config.run), found := where_to_continue(config))
            told = ["path", str(found or ""), "final"]
        except (CheckpointError, RunError) as error:
            if lock is not None:
                lock.release()
            told = [type(error).__name__, str(error), error.outcome]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    kind, text, outcome = told
    for error_class in (CheckpointError, OccupiedError, RunError):
        if kind == error_class.__name__:
            raise error_class(text).with_outcome(outcome)
    return (Path(text) if text else None), lock


def facts_to_continue(
    path: Path, config: Config, numbers: dict[str, Any], backbone: dict[str, str], precision: str, total_steps: int,
    look: bool = True,
) -> Facts:  # fmt: skip
    """What a checkpoint says of itself, on all ranks, where a run may go on from it.

    Args:
        config: `resume.allow` has dotted keys, or sections, that may differ.
        numbers, backbone, precision: of this run, compared with the checkpoint's.
        total_steps: of its schedule.
        look: whether all its files are whole; `restore`, which reads them, looks itself.

    Raises:
        CheckpointError: a damaged checkpoint, one whose run had other numbers (the message lists the differences), or
            one beyond the schedule.
    """

    def read() -> tuple[Facts, dict[str, torch.Tensor]]:
        facts = read_facts(path)
        if look:
            check_parts(path, facts)
        return facts, {}

    allow = config.resume.allow
    facts, _ = _on_all_ranks(read, torch.device("cpu"))
    told = [f"{key} was {old!r}, is {new!r}" for key, old, new in _differences(facts.numbers, numbers, allow)]
    if facts.backbone["sha256"] != backbone["sha256"] and "backbone" not in allow:
        told.append(f"backbone was {facts.backbone['source']}, is {backbone['source']}, and their weights differ")
    before = facts.written_by.get("precision", "no")
    if before != precision and "precision" not in allow:
        told.append(f"precision was {before}, is {precision} (--mixed_precision of accelerate launch)")
    wrote, ranks = facts.written_by.get("world_size", world_size()), world_size()
    if numbers["loss.scope"] == "local" and wrote != ranks and "world_size" not in allow:
        told.append(f"world_size was {wrote}, is {ranks}, by which loss.scope=local compares other images")
    if told:
        raise CheckpointError(
            f"{path} is of a run with different settings: {'; '.join(told)}. Name in resume.allow what may differ, or "
            "start anew with resume=none"
        )
    if facts.step > total_steps:
        raise CheckpointError(
            f"{path} is of step {facts.step}, beyond the {total_steps} of this schedule: raise schedule.epochs, or "
            "start anew with resume=none"
        )
    return facts


def restore(path: Path, facts: Facts, learner: Learner) -> None:
    """Put a checkpoint's state into a learner; rank 0 reads it and sends it to the others.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    _, tensors = _on_all_ranks(lambda: (facts, read_tensors(path, facts)), learner.strategy.device)
    _check_shapes(path, learner, tensors)
    try:
        learner.strategy.load_trained_state(tensors)
        if learner.prompt is not None:
            _restore_prompt(learner, tensors)
        if (scaler := learner.strategy.scaler) is not None and "loss_scale" in facts.counters:
            scaling = {
                "scale": facts.counters["loss_scale"],
                "_growth_tracker": int(facts.counters.get("steps_at_scale", 0)) * learner.strategy.scaled_per_step,
            }
            scaler.load_state_dict({**scaler.state_dict(), **scaling})
    except KeyError as error:
        raise CheckpointError(f"{path} has no tensor {error}: it is of another model") from None


def _on_all_ranks(
    read: Callable[[], tuple[Facts, dict[str, torch.Tensor]]], device: torch.device
) -> tuple[Facts, dict[str, torch.Tensor]]:
    """What rank 0 reads of a checkpoint, on every rank: a file is opened once, however many ranks there are.

    Raises:
        CheckpointError: rank 0's, on all ranks.
    """
    # facts, names with shapes and types, or what is wrong, and whether trying again may help
    told: list[Any] = [None, None, None, "final"]
    tensors: dict[str, torch.Tensor] = {}
    if rank() == 0:
        try:
            facts, tensors = read()
            told[:2] = facts, [(name, t.shape, t.dtype) for name, t in tensors.items()]
        except CheckpointError as error:
            told[2:] = str(error), error.outcome
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    if told[2] is not None:
        raise CheckpointError(told[2]).with_outcome(told[3])
    if dist.is_initialized():
        for name, shape, dtype in told[1]:
            sent = tensors[name].to(device) if rank() == 0 else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(sent, 0)
            tensors[name] = sent.cpu()
    return told[0], tensors


def _check_shapes(path: Path, learner: Learner, tensors: dict[str, torch.Tensor]) -> None:
    """Before anything is put back: `resume.allow` may let another model through. Raises CheckpointError."""
    shapes: dict[str, tuple[int, ...]] = {}  # of parameters, and of what an optimizer keeps of each, but for counts
    of_prompt = () if learner.prompt is None else learner.prompt.named_parameters()
    for ours, optimizers, named in (
        ("model", "optimizer", learner.strategy.trained()),
        ("prompt", "prompt_optimizer", of_prompt),
    ):
        for name, parameter in named:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor
            shapes |= {f"{ours}.{name}": shape, f"{optimizers}.{name}": shape}
    for key, value in tensors.items():
        of = key if key in shapes or value.ndim == 0 else key.rpartition(".")[0]
        if of in shapes and tuple(value.shape) != shapes[of]:
            raise CheckpointError(
                f"{path} has {key} of shape {list(value.shape)}, and this run's is {list(shapes[of])}: it is of "
                "another model, which resume.allow cannot mend; start anew with resume=none"
            )


def _restore_prompt(learner: Learner, tensors: dict[str, torch.Tensor]) -> None:
    assert learner.prompt is not None
    assert learner.prompt_optimizer is not None
    for name, parameter in learner.prompt.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"prompt.{name}"])
        prefix = f"prompt_optimizer.{name}."
        state = {
            key.removeprefix(prefix): v.to(parameter.device) for key, v in tensors.items() if key.startswith(prefix)
        }
        if state:
            learner.prompt_optimizer.state[parameter] = state


def prompt_state(learner: Learner) -> dict[str, torch.Tensor]:
    """The prompts and their momentum, on the CPU, by the names of a checkpoint."""
    if learner.prompt is None or learner.prompt_optimizer is None:
        return {}
    state = {}
    for name, parameter in learner.prompt.named_parameters():
        state[f"prompt.{name}"] = parameter.detach().to("cpu", copy=True)
        for key, value in learner.prompt_optimizer.state[parameter].items():
            if value is not None:
                state[f"prompt_optimizer.{name}.{key}"] = value.detach().to("cpu", copy=True)
    return state


def _below(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _differences(old: dict[str, Any], new: dict[str, Any], allow: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    usual = {name: field.get_default(call_default_factory=True) for name, field in keys_of()}
    for key in sorted(old.keys() | new.keys()):
        before = old.get(key, usual.get(key))  # a key that is newer than the checkpoint
        if before != new.get(key) and not _below(key, allow):
            yield key, before, new.get(key)
