"""Counting the bytes of live tensors."""

from contextlib import nullcontext

import pytest
import torch
from allocator import Allocator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from greedy.losses import Sim
from greedy.memory.counting import Counter
from greedy.models import cut, vgg8b
from greedy.steps.guard import Guard
from greedy.steps.step import Learner, gradients, step
from greedy.stores.source import Batch

FLOAT = 4


@pytest.fixture(params=["real", "fake"], autouse=True)
def tensors(request: pytest.FixtureRequest):
    with FakeTensorMode() if request.param == "fake" else nullcontext():
        yield


def test_tensors_count_until_they_are_released() -> None:
    with Counter() as counter:
        a = torch.zeros(100)
        b = a + 1
        assert (counter.live, counter.peak) == (800, 800)
        del a
        assert (counter.live, counter.peak) == (400, 800)
        counter.reset_peak()
        c = b * 2
        del b, c
    assert (counter.live, counter.peak) == (0, 800)


def test_views_and_work_in_place_take_nothing_more() -> None:
    with Counter() as counter:
        a = torch.zeros(10, 10)
        rows, flat = a[2:5], a.view(-1)
        rows.add_(1).mul_(2)
        torch.add(rows, 1, out=rows)
        assert counter.peak == 400
        del a, rows
        assert counter.live == 400  # held by the last view
        del flat
        assert counter.live == 0


def test_tensors_made_before_count_once_they_are_added() -> None:
    weight = torch.zeros(10, 10)
    with Counter() as counter:
        half = weight[:5]
        assert counter.live == 0
        counter.add([weight, half, weight.T])
        assert (counter.live, counter.peak) == (400, 400)
        _ = half + 1
    assert counter.peak == 600


def test_a_result_that_grows_counts_in_full() -> None:
    with Counter() as counter:
        out = torch.empty(0)
        torch.arange(100.0, out=out)
        assert counter.live == 400


def test_several_counters_see_the_same() -> None:
    with Counter() as outer:
        first = torch.zeros(10)
        with Counter() as inner:
            second = torch.zeros(20)
        assert (outer.live, inner.live) == (120, 80)
        del first, second
    assert (outer.live, inner.live) == (0, 0)


@pytest.mark.parametrize("tensors", ["fake"], indirect=True)
def test_only_the_device_counts() -> None:
    """Host memory is called meta; copies in both directions count on one side alone."""
    with Counter() as device, Counter("meta") as host:
        x = torch.zeros(8, 100, device="meta")
        assert (device.live, host.live) == (0, 3200)
        rows = x[2:4].to("cpu", copy=True)
        assert (device.live, host.live) == (800, 3200)
        rows.copy_(x[4:6])
        x[4:6].copy_(rows)
        assert (device.live, host.live) == (800, 3200)
        saved = rows.to("meta")
        assert (device.live, host.live) == (800, 4000)
        del rows, saved
        assert (device.live, host.live) == (0, 3200)


def test_the_peak_of_a_backward_pass() -> None:
    """A product of a leaf and a constant, squared and summed."""
    n = 1000
    with Counter() as counter:
        w = torch.ones(n, requires_grad=True)
        x = torch.ones(n)
        y = (w * x).pow(2).sum()
        held = 3 * n * FLOAT + FLOAT  # w, x, their product, the sum
        assert counter.live == held
        counter.reset_peak()
        y.backward()
        assert counter.live == 3 * n * FLOAT + FLOAT  # w, x, the gradient, the sum
        assert counter.peak > held
        w.grad = None
        assert counter.live == 2 * n * FLOAT + FLOAT


def test_autocast_copies_of_weights_count() -> None:
    with Counter() as counter:
        layer, x = nn.Linear(64, 64, bias=False), torch.zeros(2, 64)
        before = counter.live
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert counter.live - before == (64 * 64 + 2 * 64 + 2 * 64) * 2
        assert counter.live - before == (2 * 64 + 2 * 64) * 2  # x and y, for the backward pass
        del y
        assert counter.live == before


def test_adam_has_two_moments_and_takes_no_more() -> None:
    with Counter() as counter:
        weight = nn.Parameter(torch.zeros(1000))
        optimizer = torch.optim.Adam([weight], fused=True)
        for _ in range(3):
            weight.grad = torch.ones(1000)
            optimizer.step()
        assert counter.peak == 4 * 4000 + FLOAT + 4000  # a gradient beside the one it replaces


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tensors", ["real"], indirect=True)
def test_a_step_that_fails_for_memory_leaves_none_behind(precision: str) -> None:
    # One head: of a backward pass that fails on a CPU, torch keeps the branches still waiting.
    with Allocator() as counter:
        trained, batch = stage_step(precision)
        step(trained, batch, Guard(), 0)  # Adam has its moments from here on
        trained.optimizer.zero_grad()
        held, failures = counter.live, 0
        counter.limit = held
        while step_fails(trained, batch):
            trained.optimizer.zero_grad()
            assert counter.live == held
            failures += 1
            counter.limit += 16384
    assert 5 < failures < 100


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tensors", ["real"], indirect=True)
def test_fake_tensors_of_a_step_count_as_real_ones_do(precision: str) -> None:
    """The B x B and smaller tensors of the loss differ: torch computes some of them in fewer
    operations on real tensors."""

    def peak() -> int:
        trained, batch = stage_step(precision)
        with Counter() as counter:
            counter.add([*trained.parameters(), *trained.stage.buffers(), batch.labels])
            counter.add([batch.inputs()])
            for _ in range(2):
                step(trained, batch, Guard(), 0)
        return counter.peak

    real = peak()
    with FakeTensorMode():
        fake = peak()
    assert real > 500_000
    assert abs(fake - real) <= 2 * 16 * 16 * FLOAT


def stage_step(precision: str) -> tuple[Learner, Batch]:
    """Returns a stage of 8 channels with its heads, and a batch of 16 rows for it."""
    torch.manual_seed(0)
    stage, loss = cut(vgg8b(3, 16, 10, feature_multiplier=1 / 16))[0], Sim()
    heads = loss.heads((8, 16, 16), 10)
    learner = Learner(stage, heads, loss, 10, precision)
    learner.optimizer = torch.optim.Adam(learner.parameters(), fused=True)
    return learner, Batch(torch.arange(16) % 10, torch.ones(16, 3, 16, 16).__getitem__)


def step_fails(trained: Learner, batch: Batch) -> bool:
    """Returns whether a step needs more than the limit. Outside, no traceback holds its tensors."""
    try:
        gradients(trained, batch)
    except torch.OutOfMemoryError:
        return True
    return False
