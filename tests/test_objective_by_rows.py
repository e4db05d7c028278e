"""The objective by rows is the textbook one of the whole batch, value and gradient, on any number of ranks."""

import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from sptnet import objective
from sptnet.method.losses import GCDLoss
from sptnet.method.schedule import Schedule
from sptnet.objective import RankStatus, share_of
from sptnet.steps import ViewsAt

BATCH, CLASSES, WIDTH, TEACHER = 6, 20, 4, 0.05
LOSS = GCDLoss(0.35, 2.0, 0.1, 1.0, 0.07)


def textbook(projections, logits, targets, labelled):
    """SimGCD's objective as it is written down, of all images at once: total, cls, distill, me_max, nce, sup_con."""
    unit, count = F.normalize(projections, dim=1), len(projections)
    both = labelled.repeat(2)
    cls = F.cross_entropy(logits[both] / 0.1, targets[labelled].repeat(2))
    student = F.log_softmax(logits / 0.1, dim=1).chunk(2)
    teacher = F.softmax(logits.detach() / TEACHER, dim=1).chunk(2)
    distill = sum(-(teacher[1 - v] * student[v]).sum(1).mean() for v in (0, 1)) / 2
    mean = F.softmax(logits / 0.1, dim=1).mean(0)
    me_max = (mean * mean.log()).sum() + math.log(CLASSES)
    itself = torch.eye(count, dtype=torch.bool)
    similarity = (unit @ unit.T).masked_fill(itself, -torch.inf)
    nce = F.cross_entropy(similarity, torch.arange(count).roll(count // 2))
    known, mine = targets[labelled].repeat(2), unit[both]
    itself = torch.eye(len(mine), dtype=torch.bool)
    similarity = mine @ mine.T / 0.07
    log_probability = similarity - torch.logsumexp(similarity.masked_fill(itself, -torch.inf), dim=1, keepdim=True)
    positive = (known[:, None] == known[None, :]) & ~itself
    sup = -((log_probability * positive).sum(1) / positive.sum(1)).mean()
    return torch.stack([0.65 * (distill + 2 * me_max) + 0.35 * cls + 0.65 * nce + 0.35 * sup, cls, distill, me_max,
                        nce, sup])  # fmt: skip


def batch():
    draws = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2 * BATCH, n, dtype=torch.float64, generator=draws) for n in (WIDTH, CLASSES)]
    return outputs[0], 0.3 * outputs[1], torch.randint(0, 3, (BATCH,), generator=draws)


def labels(kind):
    """[B] bool: in turn, as the data order deals them, or any."""
    return torch.arange(BATCH) % 2 == 0 if kind == "in turn" else torch.arange(BATCH) % 5 < 2


def shares(rank, size, cases, folder):
    """Write what this rank's share is, in every case (kind, largest block, whole)."""
    for number, (kind, block, whole) in enumerate(cases):
        objective.LARGEST_BLOCK = block
        projections, logits, targets = batch()
        share = BATCH // size
        mine = torch.cat([torch.arange(rank * share, (rank + 1) * share) + v * BATCH for v in (0, 1)])
        images = mine[:share]
        labelled = None if kind == "in turn" else labels(kind)[images]
        said = RankStatus(rank == 0, rank)
        told = share_of(LOSS, projections[mine], logits[mine], targets[images], labelled, TEACHER, said, whole)
        torch.save((mine, tuple(told.terms), told.gradients, told.asked, told.used), folder / f"{number}-{rank}.pt")


def rank_of_a_world(rank, size, cases, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    shares(rank, size, cases, folder)
    dist.barrier()
    dist.destroy_process_group()


def assert_the_whole_batchs(folder, number, size, kind):
    projections, logits, targets = (t.requires_grad_(t.is_floating_point()) for t in batch())
    wanted = textbook(projections, logits, targets, labels(kind))
    gradients = torch.autograd.grad(wanted[0], [projections, logits])
    for rank in range(size):
        mine, terms, found, asked, used = torch.load(folder / f"{number}-{rank}.pt")
        torch.testing.assert_close(torch.stack(terms), wanted, rtol=1e-12, atol=1e-12)
        for gradient, whole in zip(found, gradients, strict=True):
            torch.testing.assert_close(gradient, whole[mine], rtol=1e-12, atol=1e-12)
        assert asked.tolist() == [1, sum(range(size))]
        assert used.nonzero().flatten().tolist() == logits.argmax(1).unique().tolist()


def assert_the_mean_of_every_ranks_own(folder, number, size):
    projections, logits, targets = batch()
    own = []
    for rank in range(size):
        mine, terms, gradients, _, _ = torch.load(folder / f"{number}-{rank}.pt")
        leaves = [t[mine].requires_grad_() for t in (projections, logits)]
        images = mine[: BATCH // size]
        own.append(textbook(*leaves, targets[images], labels("in turn")[images]))
        for found, wanted in zip(gradients, torch.autograd.grad(own[-1][0] / size, leaves), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.stack(terms), torch.stack(own).mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["in turn", "any"])
@pytest.mark.parametrize("block", [2**24, 50])
def test_on_one_rank_it_is_that_of_the_whole_batch(tmp_path, monkeypatch, kind, block):
    monkeypatch.setattr(objective, "LARGEST_BLOCK", block)
    shares(0, 1, [(kind, block, True)], tmp_path)
    assert_the_whole_batchs(tmp_path, 0, 1, kind)


def test_on_two_ranks_it_is_that_of_the_whole_batch_or_the_mean_of_their_own(tmp_path):
    """Three images a rank: every other slice begins with an unlabelled slot."""
    cases = [("in turn", 2**24, True), ("in turn", 50, True), ("any", 50, True), ("in turn", 2**24, False)]
    torch.multiprocessing.spawn(rank_of_a_world, (2, cases, tmp_path), 2)
    for number, (kind, _, _) in enumerate(cases[:3]):
        assert_the_whole_batchs(tmp_path, number, 2, kind)
    assert_the_mean_of_every_ranks_own(tmp_path, 3, 2)


def test_what_loader_workers_are_sent_is_small():
    views = pickle.loads(pickle.dumps(ViewsAt(Schedule(2, 10, k=3), copies=True)))
    assert [views(step) for step in range(8)] == [2, 2, 2, 1, 1, 1, 2, 2]
    assert len(pickle.dumps(views)) < 1000
