"""What ``greedy.exact`` cannot do is refused in a sentence and leaves no trace."""

from copy import deepcopy

import pytest
import torch
from block_kinds import (
    CLASSES,
    SIDE,
    C,
    data,
    similar,
    with_head,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

import greedy
from greedy import UserError


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Summing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)


class Shifting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([torch.zeros_like(x[:1]), x[:-1]])


class Counting(nn.Module):
    """Computes something else in every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Tiring(nn.Module):
    """Repeats itself for the first micro-batch of a pass alone."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 if self.calls <= 1 + 5 + 1 else 2)  # learning, outputs, and one again


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean((0, 2, 3)).to(self.mean), 0.1)
        return x


class Scalar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.block, self.reentrant = BasicBlock(C, C), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


class Direct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


def compiled() -> nn.Module:
    return torch.compile(BasicBlock(C, C))


REFUSED = {
    "meet elsewhere": Mixing,
    "samples meet elsewhere": Summing,
    "module's samples meet elsewhere": Shifting,
    "gives other outputs": Counting,
    "gives other outputs when": Tiring,
    "the buffer mean of Averaged learns": Averaged,
    "leave out checkpointing": Checkpointed,
    "for every micro-batch and in every pass": lambda: Checkpointed(reentrant=True),
    "calls torch.batch_norm itself": Direct,
    "what a OptimizedModule computes": compiled,
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_done_is_refused_and_leaves_no_trace(sentence: str) -> None:
    block = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(), REFUSED[sentence]())
    module = nn.Sequential(block, nn.Flatten(), nn.Linear(C * SIDE * SIDE, CLASSES)).double()
    x, y = data()
    before = deepcopy(module.state_dict())
    with pytest.raises(UserError, match=sentence):
        greedy.exact.step(module, similar, x, y, 5)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in [*module.parameters(), x])


@pytest.mark.parametrize("earlier", [False, True])
def test_a_failure_in_the_last_pass_leaves_no_trace(earlier: bool) -> None:
    module, (x, y) = with_head(BasicBlock(C, C)), data()
    if earlier:
        greedy.exact.step(module, similar, x, y, 5)
    before = deepcopy(module.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in [*module.parameters(), x]]
    calls = []

    def fail(g: Tensor) -> None:
        calls.append(g)
        if len(calls) == 3:
            raise torch.OutOfMemoryError

    module[0].conv1.weight.register_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        greedy.exact.step(module, similar, x, y, 5)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for p, gradient in zip([*module.parameters(), x], gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert p.grad is None or torch.equal(p.grad, gradient)


def test_one_value_a_channel_and_uneven_rows_are_refused() -> None:
    module, (x, y) = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)).double(), data((C,))
    with pytest.raises(UserError, match="give more samples"):
        greedy.exact.step(module, similar, x[:1], y[:1], 1)
    with pytest.raises(UserError, match="the inputs have 3 and 24 rows"):
        greedy.exact.step(module, similar, (x, x[:3]), y, 5)
    with pytest.raises(UserError, match="micro_batch is 0"):
        greedy.exact.step(module, similar, x, y, 0)
    with pytest.raises(UserError, match="returns no single number"):
        greedy.exact.step(module, lambda out, y: out, x, y, 5)
    with pytest.raises(UserError, match="the outputs have 0 rows"):
        greedy.exact.step(Scalar(), similar, x, y, 5)
    flat = nn.Sequential(module, nn.Flatten(0))
    with pytest.raises(UserError, match="one for each"):
        greedy.exact.step(flat, similar, x, y, 5)
    module[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(UserError, match="remove the hook"):
        greedy.exact.step(module, similar, x, y, 5)
