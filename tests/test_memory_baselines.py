"""What a step of the whole network takes by other means."""

from contextlib import nullcontext

import pytest

from greedy.build.cut_network import CutNetwork
from greedy.losses import Glob, Pred, PredSim, Sim
from greedy.memory import baselines as module
from greedy.memory.baselines import baselines
from greedy.models import cut, mlp, shapes, vgg8b

FLOAT = 4
VGG = {"feature_multiplier": 1 / 8, "hidden_width": 16, "dropout": 0.2}


def peaks(network, batch_size: int, side: int = 16, loss=None) -> dict[str, int]:
    stages = cut(network)
    row = shapes(stages, (3, side, side))
    return baselines(CutNetwork(stages, row, loss or PredSim(), 10), batch_size)


def test_where_activations_are_most_each_saves_what_it_says() -> None:
    by_name = peaks(vgg8b(3, 16, 10, **VGG), batch_size=128)
    most = by_name["backprop"]
    assert by_name["backprop_accumulated"] < 0.2 * most
    assert by_name["backprop_checkpointed"] < 0.7 * most
    assert 0.5 * most < by_name["backprop_bfloat16"] < 0.7 * most


def test_activations_grow_with_the_batch_but_not_where_it_is_cut_into_micro_batches() -> None:
    small, large = (peaks(vgg8b(3, 16, 10, **VGG), batch_size=n) for n in (64, 128))
    images = 64 * (3 * 16 * 16 + 10) * FLOAT
    assert large["backprop_accumulated"] - small["backprop_accumulated"] < images
    assert large["backprop"] - small["backprop"] > 10 * images


def test_parameters_count_four_times_where_activations_are_few() -> None:
    """Weights, gradients and two moments; joint training has heads of its own besides, and the
    gradients of one stage alone."""
    network = mlp(3, 4, 10, hidden_width=256, hidden_layers=3)
    parameters = sum(p.numel() for p in network.parameters()) * FLOAT
    by_name = peaks(network, batch_size=2, side=4)
    for name in ("backprop", "backprop_checkpointed"):
        assert 4 * parameters < by_name[name] < 4.2 * parameters
    heads = 3 * (256 * 256 + 257 * 10) * FLOAT
    gradients = 2 * 256 * 256 * FLOAT  # of an encoder and its similarity head
    state = 3 * (parameters + heads) + gradients
    assert state < by_name["joint"] < 1.1 * state


def test_heads_count_by_the_local_loss() -> None:
    network = vgg8b(3, 16, 10, **VGG)
    by_loss = [peaks(network, 16, loss=loss) for loss in (Pred(), Sim(), PredSim())]
    pred, sim, both = (each.pop("joint") for each in by_loss)
    assert pred < sim < both
    assert by_loss[0] == by_loss[1] == by_loss[2]


def test_without_a_local_loss_there_is_no_joint_training() -> None:
    network = vgg8b(3, 16, 10, **VGG)
    local = peaks(network, 16)
    assert local.pop("joint")
    assert peaks(network, 16, loss=Glob()) == local


def test_fake_tensors_count_as_real_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    batch_size = 21  # the last micro-batch is smaller
    network = vgg8b(3, 16, 10, **VGG)
    fake = peaks(network, batch_size)
    monkeypatch.setattr(module, "fake_tensors", nullcontext)
    real = peaks(network, batch_size)
    assert fake.keys() == real.keys()
    for name, size in real.items():  # but for small tensors of the losses
        assert fake[name] == pytest.approx(size, abs=2 * batch_size**2 * FLOAT)
