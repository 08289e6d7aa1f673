"""Losses and gradients compared with values from the authors' published implementation."""

import numpy as np
import pytest
import torch
from published import CLASSES, GOLDEN, OURS, Block, assert_golden
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from greedy.losses import Pred, PredSim, Sim, feature_deviation, similarity_loss
from greedy.memory.counting import Counter

LOSSES = {
    "pred": (Pred(pool_target=64), nn.ReLU),
    "sim": (Sim(), nn.LeakyReLU),
    "predsim": (PredSim(beta=0.99, pool_target=64), nn.LeakyReLU),
}
ACCURACY = 1e-5


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_the_published_ones(kind: str, name: str) -> None:
    loss, activation = LOSSES[name]
    block = Block(kind, loss, activation)

    def golden(key: str) -> np.ndarray:
        return GOLDEN[f"{kind}/{name}/{key}"]

    prefix = f"{kind}/{name}/param/"
    published = [k.removeprefix(prefix) for k in GOLDEN.files if k.startswith(prefix)]
    block.load_state_dict(
        {OURS[k]: torch.from_numpy(golden(f"param/{k}")) for k in published}, strict=False
    )
    parameters = dict(block.named_parameters())
    assert {OURS[k] for k in published} == set(parameters)

    x = torch.from_numpy(golden("x")).requires_grad_()
    y = nn.functional.one_hot(torch.from_numpy(golden("y")), CLASSES).float()
    h = block.layer(x)
    value = loss(block.heads(h), y)
    value.backward()

    assert_golden(h, golden("output"), ACCURACY)
    assert_golden(value, golden("loss"), ACCURACY)
    assert_golden(x.grad, golden("grad/x"), ACCURACY)
    for key in published:
        gradient = parameters[OURS[key]].grad
        if key == "encoder.bias":  # batch norm cancels it: rounding is all there is
            assert gradient.abs().max() < 1e-5
        else:
            assert_golden(gradient, golden(f"grad/{key}"), ACCURACY)


def test_dead_feature_maps_have_a_gradient_of_exactly_zero() -> None:
    h = torch.randn(6, 8, 5, 5)
    h[:, 2] = 0
    h[:, 5] = 0.1
    h.requires_grad_()
    y = nn.functional.one_hot(torch.arange(6) % 3, 3).float()
    similarity_loss(feature_deviation(h), y).backward()
    assert torch.all(h.grad[:, [2, 5]] == 0)
    assert torch.all(torch.isfinite(h.grad))
    assert torch.any(h.grad != 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "accuracy"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
def test_deviation_is_torch_s(dtype: torch.dtype, accuracy: float, layout) -> None:
    torch.manual_seed(0)
    rows, channels = 160, 16  # more than one slice
    maps = (torch.randn(rows, channels, 32, 32) + 3).to(dtype).contiguous(memory_format=layout)
    h, wide = maps.requires_grad_(), maps.detach().double().requires_grad_()
    deviation, expected = feature_deviation(h), wide.flatten(2).std(dim=2)
    assert deviation.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(deviation.double(), expected, rtol=1e-5)
    slopes = torch.randn(rows, channels)
    deviation.backward(slopes.to(deviation.dtype))
    expected.backward(slopes.double())
    worst = (h.grad - wide.grad).abs().max()
    assert h.grad.dtype == dtype
    assert worst <= accuracy * wide.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deviation_takes_no_second_copy_of_the_maps(dtype: torch.dtype) -> None:
    with FakeTensorMode(), Counter() as counter:
        h = torch.empty(1024, 64, 32, 32, dtype=dtype).requires_grad_()
        size = counter.live
        value = feature_deviation(h).sum()
        assert counter.peak < 1.25 * size
        value.backward()
        assert counter.peak < 2.25 * size  # the gradient is as large


def test_features_are_float32_under_autocast() -> None:
    heads = PredSim().heads((8, 4, 4), num_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        features = heads(torch.randn(5, 8, 4, 4))
    assert features.z.dtype == features.p.dtype == torch.float32
