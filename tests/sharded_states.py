"""Optimisers whose state is divided over processes, beside undivided ones."""

import torch
from torch import nn

from greedy.base.ranks import ALONE, Ranks
from greedy.recipes import Training
from greedy.steps.guard import Guard
from greedy.steps.moments import make_moments
from greedy.steps.optimizers import make_optimizer
from greedy.steps.sharded_state import SMALLEST

KINDS = {
    "adam": {},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "nesterov": True},
    "plain-sgd": {"optimizer": "sgd", "momentum": 0.0},
}
SHAPES = ((70, 131), (64, 32, 3, 3), (SMALLEST,), (10,), ())


def new_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    tensors[1] = tensors[1].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in tensors]


def new_optimizer(
    kind: str, parameters: list[nn.Parameter], sharers: Ranks
) -> torch.optim.Optimizer:
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}]
    training = Training(epochs=1, learning_rate=0.01, **KINDS[kind])
    optimizer = make_optimizer(training, groups, 0.01, sharers=sharers)
    make_moments(optimizer, 1)
    return optimizer


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    """Takes steps, of which number 1 has a gradient that is not finite and is skipped."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        if step == 1:
            parameters[0].grad[-1, -1] = torch.inf
        Guard().update(optimizer, torch.tensor(1.0), step, parameters)


def same_states(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    if ours["param_groups"] != theirs["param_groups"]:
        return False
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    return True


def compare_with_undivided(ranks: Ranks, kind: str) -> None:
    whole, divided = new_parameters(), new_parameters()
    undivided = new_optimizer(kind, whole, ALONE)
    optimizer = new_optimizer(kind, divided, ranks)
    train(undivided, whole, range(5))
    train(optimizer, divided, range(5))
    assert all(map(torch.equal, whole, divided))
    assert same_states(optimizer, undivided)

    # On, each from the other's state: as when a run is resumed by another number of processes.
    states = optimizer.state_dict(), undivided.state_dict()
    undivided, optimizer = new_optimizer(kind, whole, ALONE), new_optimizer(kind, divided, ranks)
    undivided.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    train(undivided, whole, range(5, 8))
    train(optimizer, divided, range(5, 8))
    assert all(map(torch.equal, whole, divided))
    assert same_states(optimizer, undivided)


def count_numbers(ranks: Ranks) -> None:
    optimizer = new_optimizer("adam", new_parameters(), ranks)
    moments = [state["exp_avg"].numel() for state in optimizer.state.values()]
    for shape, kept in zip(SHAPES, moments, strict=True):
        numbers = torch.Size(shape).numel()
        assert abs(kept - numbers / ranks.size) < 64 if numbers >= SMALLEST else kept == numbers
