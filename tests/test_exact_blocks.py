"""Exact gradients of any module, a micro-batch at a time."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from warnings import catch_warnings, simplefilter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import CNBlock
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import SqueezeExcitation, StochasticDepth

import greedy
from greedy import UserError
from greedy.memory.counting import Counter

ROWS, CLASSES, C, SIDE = 24, 5, 8, 9
MAPS, TOKENS = (C, SIDE, SIDE), (7, C)


def narrowed(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))


class PreActivation(nn.Module):
    """Batch norm and activation come before the convolution, and both paths start there."""

    def __init__(self, out: int = 12) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(C), nn.Conv2d(C, out, 3, 2, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(C, out, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        return self.conv2(F.relu(self.norm2(self.conv1(h)))) + self.shortcut(h)


class Twice(nn.Module):
    """A batch norm that is called twice, with other statistics each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))


class Hidden(nn.Module):
    """The second batch norm depends on the first by a path that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(self.conv(x))
        return self.two(self.conv(x) * (y > 0)) + y


class Branches(nn.Module):
    """Independent paths of different depth."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Sequential(
            nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1),
            nn.BatchNorm2d(C, affine=False), nn.ReLU(),
        )  # fmt: skip
        self.short = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.long(x), self.short(x)], 1)


class SqueezeExcited(nn.Module):
    """Convolutions stand between batch norms that do not depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(C, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(True), nn.Conv2d(6, 12, 1),
            nn.BatchNorm2d(12), SqueezeExcitation(12, 4),
        )  # fmt: skip
        self.shortcut = narrowed(12)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


class AddedTo(nn.Module):
    """The output of a convolution is overwritten after the last batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.conv = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        shortcut += self.norm(self.conv(x))
        return F.relu(shortcut)


def halved(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * 0.5


with catch_warnings():
    simplefilter("ignore")  # torch would have it compiled
    scripted = torch.jit.script(halved)


class Scripted(nn.Module):
    """A function that torch's modes do not see stands between two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.conv(scripted(self.one(self.conv(x)))))


def basic_with_fixed_norm() -> nn.Module:
    block = BasicBlock(C, C)
    block.bn1.eval()
    block.bn2.momentum = None
    return block


def partly_frozen() -> nn.Module:
    block = Bottleneck(C, 4, 2, narrowed(16))
    for part in (block.conv1, block.bn1, block.bn2, block.downsample):
        part.requires_grad_(False)
    return block


def untracked() -> nn.Module:
    return BasicBlock(C, C, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: BasicBlock(C, C),
    "basic, downsampling": lambda: BasicBlock(C, 12, 2, narrowed(12)),
    "bottleneck": lambda: Bottleneck(C, 2),
    "bottleneck, downsampling": lambda: Bottleneck(C, 4, 2, narrowed(16)),
    "two blocks": lambda: nn.Sequential(BasicBlock(C, C), BasicBlock(C, 12, 2, narrowed(12))),
    "pre-activation": PreActivation,
    "inverted residual": lambda: InvertedResidual(C, C, 1, 3),
    "convnext": lambda: CNBlock(C, 1.0, 0.0),
    "transformer": lambda: nn.TransformerEncoderLayer(C, 2, 16, 0.0, batch_first=True),
    "nested": lambda: nn.Sequential(nn.Sequential(PreActivation(C)), nn.GroupNorm(2, C)),
    "called twice": Twice,
    "hidden dependence": Hidden,
    "branches": Branches,
    "squeeze and excitation": SqueezeExcited,
    "added to": AddedTo,
    "scripted function": Scripted,
    "a norm in evaluation mode": basic_with_fixed_norm,
    "partly frozen": partly_frozen,
    "untracked": untracked,
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Conv2d(C, C, 3)), nn.BatchNorm2d(C)),
}


def similar(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss that compares all samples of a batch."""
    rows = F.normalize(outputs - outputs.mean(1, keepdim=True))
    same = F.one_hot(labels, CLASSES).to(rows) @ F.one_hot(labels, CLASSES).to(rows).T
    return F.cross_entropy(outputs, labels) + (rows @ rows.T - same).square().mean()


LOSSES = {"separable": F.cross_entropy, "of the whole batch": similar}


def with_head(block: nn.Module, shape: tuple[int, ...] = MAPS) -> nn.Module:
    """Returns a block with a linear classifier, in float64, with unusual weights."""
    torch.manual_seed(0)
    features = block(torch.randn(3, *shape)).flatten(1).shape[1]
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(features, CLASSES)).double()


def data(shape: tuple[int, ...] = MAPS, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.randint(CLASSES, (rows,), generator=generator)


def by_autograd(module: nn.Module, loss, x: Tensor, y: Tensor) -> Tensor:
    value = loss(module(x), y)
    value.backward()
    return value.detach()


def measured(run, module: nn.Module, loss, x: Tensor, y: Tensor, *more) -> dict[str, Tensor]:
    """Returns the loss, all gradients and all buffers after a step of copies."""
    module, x = deepcopy(module), x.detach().requires_grad_(x.requires_grad)
    found = {"loss": run(module, loss, x, y, *more)}
    gradients = {name: p.grad for name, p in module.named_parameters()} | {"input": x.grad}
    found |= {f"{name}.grad": g for name, g in gradients.items() if g is not None}
    return found | dict(module.named_buffers())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        worst = float((actual[name] - value).abs().max())
        assert worst <= 1e-10 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_gets_what_autograd_gives(block: str, loss: str) -> None:
    shape = TOKENS if block == "transformer" else MAPS
    module, (x, y) = with_head(BLOCKS[block](), shape), data(shape)
    expected = measured(by_autograd, module, LOSSES[loss], x, y)
    for micro_batch in (1, 5, 12, 100):
        actual = measured(greedy.exact.step, module, LOSSES[loss], x, y, micro_batch)
        assert_same(actual, expected)


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


# What cannot be done


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


def test_the_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[1] / "docs/exact-step.md").read_text()
    found: dict[str, Tensor] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], found)
    assert found["loss"].shape == () and not found["loss"].requires_grad
