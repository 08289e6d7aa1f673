"""Comparisons of a step that one process takes with the same step divided over several."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from test_exact_step import LOSSES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from greedy.base.ranks import Ranks, Shares
from greedy.losses import Output
from greedy.models import cut, shapes
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.guard import Guard
from greedy.steps.step import Learner, gradients
from greedy.steps.strategies import Backprop, Joint
from greedy.stores.source import Batch

CLASSES, IMAGE = 4, (3, 8, 8)
SPLITS = {  # of a batch, the first row of each process's share; None: any rows, in no order
    "two": (13, [6]),
    "uneven": (13, [2]),
    "mixed": (13, None),
    "three": (13, [4, 5]),
    "one-without": (5, [0, 3]),
}


class Residual(nn.Module):
    """Two convolutions beside a shortcut with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1)
        )
        self.norm = nn.BatchNorm2d(8, momentum=0.3)
        self.short = nn.Sequential(nn.Conv2d(6, 8, 1, 2), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.main(x)) + self.short(x))


def make_network(loss) -> tuple[list[Learner], list[tuple[int, ...]]]:
    """Returns the learners of a network's stages, and the shapes of their inputs."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(0.01)),
        *(nn.Dropout2d(0.3), Residual(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2)),
        *(nn.Linear(32, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, CLASSES)),
    )
    stages = cut(network)
    learners, known = [], shapes(stages, IMAGE)
    for stage, shape in zip(stages, known, strict=True):
        own = Output(loss.output_scale) if stage is stages[-1] else loss
        heads = own.heads(shape.hidden, CLASSES)
        learner = Learner(stage.double(), heads.double(), own, CLASSES, "float32")
        learner.shape = shape.hidden
        learner.train()
        learners.append(learner)
    return learners, [shape.input for shape in known]


def make_shares(ranks: Ranks, split: str) -> tuple[int, Shares]:
    rows, edges = SPLITS[split]
    order = torch.arange(rows)
    if edges is None:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
        edges = [5, 9][: ranks.size - 1]
    return rows, Shares(ranks, [part.sort().values for part in order.tensor_split(edges)])


def make_batches(shape: tuple[int, ...], rows: int, shares: Shares) -> tuple[Batch, Batch]:
    """Returns a batch, and the part of it of a process."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((rows, *shape), generator=generator, dtype=torch.float64)
    labels = torch.arange(rows) % CLASSES
    own = x[shares.computed]
    return Batch(labels, x.__getitem__), Batch(labels, own.__getitem__, shares=shares)


def make_masks(learners: list[Learner], inputs: list, rows: int) -> list[Tensor | None]:
    return [
        learner.mask(0, rows, shape, 0, 0) for learner, shape in zip(learners, inputs, strict=True)
    ]


def assert_alike(one: list[Learner], other: list[Learner]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        pairs = list(zip(mine.parameters(), theirs.parameters(), strict=True))
        largest = max(float(p.grad.abs().max()) for p, _ in pairs if p.grad is not None)
        for p, q in pairs:  # one that the loss leaves unused has none, or zeros
            grads = (torch.zeros_like(p) if each.grad is None else each.grad for each in (p, q))
            error = float(torch.sub(*grads).abs().max())
            assert error <= 1e-10 * largest, (p.shape, error, largest)
        for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def compare_stages(ranks: Ranks, split: str) -> None:
    """Compares every mode of every stage: by every loss for two and for three processes, by two
    losses for other splits."""
    rows, shares = make_shares(ranks, split)
    for name, loss in LOSSES.items():
        if split not in ("uneven", "three") and name not in ("predsim", "pred-bio"):
            continue
        stages, inputs = make_network(loss)
        masks = make_masks(stages, inputs, rows)
        for learner, shape, mask in zip(stages, inputs, masks, strict=True):
            whole, part = make_batches(shape, rows, shares)
            whole = replace(whole, mask=mask)
            part = replace(part, mask=None if mask is None else mask[shares.computed])
            reference = deepcopy(learner)
            value, logits = gradients(reference, whole)
            for mode in Mode:
                if learner.parts is None and mode is Mode.HEADS:
                    continue
                other = deepcopy(learner)
                other.memory = StepMemory(mode, 2)
                found, scores = gradients(other, part)
                torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(scores, logits, rtol=1e-8, atol=1e-10)
                assert_alike([reference], [other])


def compare_strategies(ranks: Ranks, split: str) -> None:
    """Compares a step of all strategies that train a network as a whole."""
    rows, shares = make_shares(ranks, split)
    whole, part = make_batches(IMAGE, rows, shares)
    for name in ("joint", "backprop", "accumulate", "exact"):
        results = []
        for batch in (whole, part):
            learners, inputs = make_network(LOSSES["predsim"])
            masks = make_masks(learners, inputs, rows)
            if batch is part:
                masks = [None if mask is None else mask[shares.computed] for mask in masks]
            if name == "joint":
                for learner in learners:
                    learner.optimizer = torch.optim.SGD(learner.parameters(), 0.1)
                strategy = Joint(learners)
            else:
                parameters = [p for learner in learners for p in learner.parameters()]
                optimizer = torch.optim.SGD(parameters, 0.1)
                parts = 1 if name == "backprop" else 3
                strategy = Backprop(learners, optimizer, parts, exact=name == "exact")
            outcomes = strategy.step(batch, masks, Guard(), 0)
            results.append((learners, outcomes))
        (mine, expected), (theirs, found) = results
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one.loss, other.loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(one.logits, other.logits, rtol=1e-8, atol=1e-10)
        for one, other in zip(mine, theirs, strict=True):
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


class Watching(Ranks):
    """Notes, whenever a gradient sets out, how many parameters have none yet."""

    def watch(self, parameters: list[nn.Parameter]) -> list[int]:
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "shapes", {p.shape for p in parameters})
        object.__setattr__(self, "missing", [])
        return self.missing

    def begin_adding(self, tensor: Tensor) -> Callable[[], None]:
        if tensor.shape in self.shapes:
            self.missing.append(sum(p.grad is None for p in self.parameters))
        return super().begin_adding(tensor)


class AtOnce(Ranks):
    """Has added a gradient before the backward pass goes on, as a fast network may."""

    def begin_adding(self, tensor: Tensor) -> Callable[[], None]:
        super().begin_adding(tensor)()
        return lambda: None


class Positions(nn.Module):
    """Adds weights to a single row as they are: autograd takes the sum's gradient for theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 6)
        self.place = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.after(h + torch.tanh(h) + self.place[None])


class Tied(nn.Module):
    """Uses a layer in two segments, each of which is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.layer, x.requires_grad_(), use_reentrant=True)
        return x


def compare_unusual(ranks: Ranks, rows: int) -> None:
    """Compares stages whose gradients autograd keeps in unusual ways."""
    shares = AtOnce(ranks.rank, ranks.size).divided(rows)
    for module in (Positions, Tied):
        torch.manual_seed(0)
        stage = cut(nn.Sequential(module(), nn.ReLU(), nn.Linear(6, CLASSES)))[0].double()
        loss = LOSSES["predsim"]
        learner = Learner(stage, loss.heads((6,), CLASSES).double(), loss, CLASSES, "float32")
        learner.train()
        whole, part = make_batches((6,), rows, shares)
        reference = deepcopy(learner)
        gradients(reference, whole)
        gradients(learner, part)
        assert_alike([reference], [learner])


def watch_gradients(ranks: Ranks) -> None:
    """Checks that gradients set out while the backward pass computes others, each once."""
    ranks = Watching(ranks.rank, ranks.size)
    rows, shares = make_shares(ranks, "two")
    _, part = make_batches(IMAGE, rows, shares)
    learners, inputs = make_network(LOSSES["predsim"])
    parameters = [p for learner in learners for p in learner.parameters()]
    missing = ranks.watch(parameters)
    strategy = Backprop(learners, torch.optim.SGD(parameters, 0.1))
    strategy.step(part, [None] * len(inputs), Guard(), 0)
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > missing[-1] == 0
    assert len(missing) == len(parameters)
