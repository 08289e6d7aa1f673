"""Exact gradients of any module, a micro-batch at a time."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from block_kinds import (
    BLOCKS,
    CLASSES,
    LOSSES,
    MAPS,
    ROWS,
    TOKENS,
    C,
    assert_same,
    by_autograd,
    data,
    measured,
    similar,
    with_head,
)
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import StochasticDepth

import greedy
from greedy.base.torch_private import TorchDispatchMode
from greedy.memory.counting import Counter


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_gets_what_autograd_gives(block: str, loss: str) -> None:
    shape = TOKENS if block == "transformer" else MAPS
    module, (x, y) = with_head(BLOCKS[block](), shape), data(shape)
    expected = measured(by_autograd, module, LOSSES[loss], x, y)
    for micro_batch in (1, 5, 12, 100):
        actual = measured(greedy.exact.step, module, LOSSES[loss], x, y, micro_batch)
        assert_same(actual, expected)


class NormArguments(TorchDispatchMode):
    """Keeps the arguments of the operator that computes the sums of a batch norm's gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_batch_norm_backward.default:
            self.found.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("block", ["basic", "branches"])
def test_batch_norm_gets_all_that_its_kernel_for_gpus_needs(block: str) -> None:
    """It fails without tensors that the CPU's does not look at."""
    module, (x, y) = with_head(BLOCKS[block]()), data()
    with NormArguments() as arguments:
        greedy.exact.step(module, similar, x, y, 5)
    assert arguments.found
    for _, _, weight, _, _, mean, inverse, *_ in arguments.found:
        assert all(isinstance(given, Tensor) for given in (weight, mean, inverse))


@pytest.mark.parametrize("block", ["bottleneck, downsampling", "partly frozen", "transformer"])
def test_inputs_without_gradient_get_none(block: str) -> None:
    shape = TOKENS if block == "transformer" else MAPS
    module, (x, y) = with_head(BLOCKS[block](), shape), data(shape)
    x.requires_grad_(False)
    expected = measured(by_autograd, module, similar, x, y)
    assert_same(measured(greedy.exact.step, module, similar, x, y, 7), expected)


def test_gradients_are_added_and_handed_on_to_what_made_the_inputs() -> None:
    module, (x, y) = with_head(BasicBlock(C, C)), data()
    other = deepcopy(module)
    before, before_other = (nn.Conv2d(C, C, 1).double() for _ in range(2))
    before_other.load_state_dict(before.state_dict())
    for _ in range(2):
        by_autograd(module, similar, before(x), y)
        greedy.exact.step(other, similar, before_other(x), y, 5)
    for one, two in ((module, other), (before, before_other)):
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


def test_inputs_may_share_a_graph() -> None:
    (x, y), module = data((C,)), nn.Bilinear(C, C, CLASSES).double()

    def both() -> tuple[Tensor, Tensor]:
        h = x.sigmoid()
        return h, h.square()

    similar(module(*both()), y).backward()
    expected, x.grad = x.grad, None
    greedy.exact.step(module, similar, both(), y, 5)
    assert expected is not None and x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-10)


def test_evaluation_mode_is_exact_too() -> None:
    module, (x, y) = with_head(BLOCKS["two blocks"]()).eval(), data()
    expected = measured(by_autograd, module, similar, x, y)
    assert_same(measured(greedy.exact.step, module, similar, x, y, 5), expected)


class Recorded(nn.Module):
    """Records what a random module did to ones, at every call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.masks = module, []

    def forward(self, x: Tensor) -> Tensor:
        mask = self.module(torch.ones_like(x))
        self.masks.append(mask)
        return x * mask


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Dropout2d(0.4), StochasticDepth(0.5, "row")])
def test_random_masks_are_the_same_in_all_passes(drop: nn.Module) -> None:
    def network(drop: nn.Module) -> nn.Module:
        conv = nn.Conv2d(C, C, 3, padding=1)
        return with_head(nn.Sequential(BasicBlock(C, C), drop, conv, nn.BatchNorm2d(C), nn.ReLU()))

    recorded = Recorded(drop)
    module, (x, y) = network(recorded), data()
    recorded.masks.clear()
    torch.manual_seed(3)
    greedy.exact.step(module, similar, x, y, 5)
    micro_batches = -(-ROWS // 5)
    masks = recorded.masks[-micro_batches:]  # those of the last pass
    for number, mask in enumerate(recorded.masks[1:]):  # the first call learned the passes
        assert torch.equal(mask, masks[number % micro_batches])
    assert len({tuple(mask[0].flatten().tolist()) for mask in masks}) > 1
    fixed = network(Masked(torch.cat(masks)[:3].float()))
    assert isinstance(fixed, nn.Sequential)
    fixed[0][1].mask = torch.cat(masks)
    parameters = dict(module.named_parameters())
    fixed.load_state_dict(module.state_dict())
    by_autograd(fixed, similar, x.detach(), y)
    for name, parameter in fixed.named_parameters():
        assert parameter.grad is not None
        actual = parameters[name].grad
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_steps_draw_other_numbers_and_repeat_with_the_seed() -> None:
    module, (x, y) = with_head(nn.Sequential(nn.Conv2d(C, C, 3), nn.Dropout(0.5))), data()

    def losses() -> list[float]:
        torch.manual_seed(3)
        return [float(greedy.exact.step(module, similar, x, y, 5)) for _ in range(2)]

    one, two = losses()
    assert one != two
    assert losses() == [one, two]


class Several(nn.Module):
    """Takes named arguments and gives several outputs, one of them without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, C)
        self.norm, self.out = nn.BatchNorm1d(C), nn.Linear(C, CLASSES)

    def forward(self, x: Tensor, kind: Tensor) -> dict[str, Tensor | None]:
        h = F.relu(self.norm(x + self.table(kind)))
        out = self.out(h)
        return {"out": out, "unused": h, "class": out.argmax(1), "nothing": None}


def test_several_inputs_and_outputs() -> None:
    (x, y), module = data((C,)), Several().double()

    def loss(outputs, labels):
        return similar(outputs["out"], labels)

    other, other_x = deepcopy(module), x.detach().requires_grad_()
    loss(module(x, y), y).backward()
    greedy.exact.step(other, loss, {"x": other_x, "kind": y}, y, 5)
    pairs = [*zip(module.parameters(), other.parameters(), strict=True), (x, other_x)]
    for one, two in pairs:
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-10, atol=1e-10)
    again = deepcopy(module)
    again.zero_grad()
    greedy.exact.step(again, loss, (x.detach(), y), y, 7)
    torch.testing.assert_close(again.out.weight.grad, module.out.weight.grad)


def test_half_precision_errs_no_more_than_the_whole_batch_does() -> None:
    module, (x, y) = with_head(BLOCKS["basic, downsampling"]()), data()
    truth = measured(by_autograd, module, similar, x, y)
    rough = deepcopy(module).float()
    with torch.autocast("cpu", torch.bfloat16):
        whole = measured(by_autograd, rough, similar, x.detach().float(), y)
        micro = measured(greedy.exact.step, rough, similar, x.detach().float(), y, 6)
    for name in (name for name in micro if name.endswith("grad")):
        errors = [float((found[name] - truth[name]).norm()) for found in (micro, whole)]
        assert errors[0] <= 4 * errors[1] + 1e-2 * float(truth[name].norm()), name


# Memory


def test_memory_is_that_of_a_micro_batch_beside_inputs_and_outputs() -> None:
    def taken(rows: int, micro_batch: int) -> int:
        module = with_head(BLOCKS["two blocks"]())
        x, y = data(MAPS, rows)
        x.requires_grad_(False)
        with Counter() as counter:
            greedy.exact.step(module, F.cross_entropy, x, y, micro_batch)
        return counter.peak

    outputs = 5 * CLASSES * 8  # of a row: the outputs themselves, their slopes and the loss's
    assert taken(128, 4) - taken(16, 4) <= 112 * outputs
    assert taken(64, 4) < taken(64, 64) / 6


def test_the_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[1] / "docs/exact-step.md").read_text()
    found: dict[str, Tensor] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], found)
    assert found["loss"].shape == () and not found["loss"].requires_grad
