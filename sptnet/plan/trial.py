"""Takes steps of both phases and counts what each holds and does; with real tensors, or with fake ones."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sptnet.method.schedule import Schedule
from sptnet.plan.live import Held, LiveBytes
from sptnet.plan.work import Work
from sptnet.steps import Learner

Phase = Literal["prompt", "model", "evaluation"]
Kind = Literal["weights", "gradients", "optimizer", "gathered", "activations", "batches", "temporaries"]
KINDS: tuple[Kind, ...] = (
    "weights", "gradients", "optimizer", "gathered", "activations", "batches", "temporaries"
)  # fmt: skip


@dataclass
class Counted:
    """What a step, or a forward pass of an evaluation, holds and does on one rank.

    Attributes:
        bytes: at the peak, by kind. `gathered`: weights that FSDP2 has put together; `batches`: this step's views, and
            the next one's, which are on the device already; `gradients`: DDP's buckets too.
        work: None where it was not counted.
    """

    bytes: dict[Kind, int]
    work: Work | None = None

    @property
    def peak(self) -> int:
        return sum(self.bytes.values())


@dataclass
class Trial:
    """Steps on a learner.

    Args:
        learner: as training has it.
        views: shape of an image's view, (3, H, W), or of its tokens, (T, D).
        images: of this rank's slice of the batch.
        evaluated: images of a forward pass of the evaluation.
        live: was there when everything was built.
        before: steps of the model and of the prompt phase before the one that is counted: torch's DDP makes its buckets
            anew in the second.
    """

    learner: Learner
    views: tuple[int, ...]
    images: int
    evaluated: int
    live: LiveBytes
    before: tuple[int, int] = (2, 2)
    _forwards: list[tuple[int, int]] = field(default_factory=list)

    def run(self) -> dict[Phase, Counted]:
        """Steps of the model phase, of the prompt phase if there is one, and a forward pass of an evaluation."""
        self._note_forwards()
        for parameter in () if self.learner.prompt is None else self.learner.prompt.parameters():
            parameter.grad = torch.zeros_like(parameter)  # what a prompt step leaves is there in model steps too
        counted = self.steps(self.images, self.before)
        counted["evaluation"] = self._count(self._evaluate, ())
        return counted

    def steps(self, images: int, before: tuple[int, int] = (0, 0)) -> dict[Phase, Counted]:
        """Steps of each phase with so many images of this rank's slice; after `run`, of other batches too."""
        counted: dict[Phase, Counted] = {}
        phases: tuple[Literal["model", "prompt"], ...] = ("model", "prompt")
        for phase, many in zip(phases, before, strict=True):
            first = first_step(self.learner.schedule, phase)
            if first is None:
                continue
            current, following = (self._batch(first, images) for _ in range(2))
            for _ in range(many):  # the same one again: the next may be of the other phase
                self._step(first, *current)
            counted[phase] = self._count(partial(self._step, first, *current), (*current, *following))
            del current, following
        return counted

    def seconds(self, phase: str, images: int) -> float:
        """How long a step of a phase takes behind another one; real tensors only."""
        first = first_step(self.learner.schedule, phase)
        assert first is not None
        batch = self._batch(first, images)
        self._step(first, *batch)
        self._wait()
        begin = time.perf_counter()
        self._step(first, *batch)
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        """For what was launched on a GPU."""
        if self.learner.strategy.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def _device(self) -> torch.device:
        return next(self.learner.strategy.module.parameters()).device

    def _batch(self, step: int, images: int) -> tuple[Tensor, Tensor]:
        views = torch.zeros(self.learner.views_at(step), images, *self.views, device=self._device)
        return views, torch.zeros(images, dtype=torch.long, device=self._device)

    def _step(self, step: int, views: Tensor, targets: Tensor) -> None:
        self.learner.step(step, views, targets, None)

    def _evaluate(self) -> None:
        prompt = None if self.learner.prompt is None else self.learner.prompt()
        size = self.learner.strategy.module.image_size
        images = torch.zeros(self.evaluated, 3, size, size, device=self._device)
        self.learner.strategy.forward_evaluation(images, prompt)

    def _count(self, does: Callable[[], None], batches: tuple[Tensor, ...]) -> Counted:
        self._forwards.clear()
        before, work = self.live.time, Work()
        self.live.restart()
        self.live.work = work
        does()
        self.live.work = None
        kinds: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        owners = self._owners(batches)
        for held in self.live.at_peak():
            kinds[owners.get(id(held)) or self._kind(held, before)] += held.bytes
        return Counted(kinds, work)

    def _owners(self, batches: tuple[Tensor, ...]) -> dict[int, Kind]:
        """Which of what is held is whose."""
        learner, strategy = self.learner, self.learner.strategy
        owners: dict[int, Kind] = {}

        def own(kind: Kind, tensors: Iterator[Tensor]) -> None:
            owners.update({id(held): kind for tensor in tensors if (held := self.live.of(tensor)) is not None})

        prompts = [] if learner.prompt is None else list(learner.prompt.parameters())
        # under DeepSpeed it is inside of the engine's
        inner = getattr(strategy, "_torch_optimizer", strategy._optimizer)
        optimizers = [o for o in (inner, learner.prompt_optimizer) if o is not None]
        own("batches", iter(batches))
        own("optimizer", (t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)))
        parameters = [*strategy.module.parameters(), *prompts, *self._optimized(optimizers)]
        own("gradients", (p.grad for p in parameters if p.grad is not None))
        own("weights", iter([*parameters, *strategy.module.buffers()]))
        return owners

    @staticmethod
    def _optimized(optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
        """FSDP2's optimizer holds this rank's shards as tensors of their own."""
        return [p for o in optimizers for group in o.param_groups for p in group["params"]]

    def _kind(self, held: Held, before: int) -> Kind:
        if held.refilled:
            return "gathered"
        if held.born <= before:
            return "gradients"  # made by the strategy, there before and after: buckets
        for begin, end in self._forwards:
            if begin < held.born <= end and (held.died is None or held.died > end):
                return "activations"
        return "temporaries"

    def _note_forwards(self) -> None:
        """Let the strategy's forward passes say when they are: what they leave behind is kept for the backward pass."""
        strategy: Any = self.learner.strategy
        for name in ("forward_model_phase", "forward_prompt_phase", "forward_trunk"):
            setattr(strategy, name, self._noted(getattr(strategy, name)))

    def _noted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            begin = self.live.time
            out = forward(*args, **kwargs)
            self._forwards.append((begin, self.live.time))
            return out

        return noted


def first_step(schedule: Schedule, phase: str) -> int | None:
    """The first step of a phase, None where there is none."""
    return next((step for step in range(2 * schedule.k + 1) if schedule.phase(step) == phase), None)
