"""The paper's networks, and cutting networks into stages."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from greedy.base.errors import UserError
from greedy.losses import PredSim
from greedy.models import cut, initialise, mlp, shapes, vgg8b, vgg11b

ARCHITECTURES = json.loads((Path(__file__).parent / "data/architectures.json").read_text())
NETWORKS = {"mlp": mlp, "vgg8b": vgg8b, "vgg11b": vgg11b}


def build(entry: dict) -> nn.Sequential:
    channels, side, _ = entry["input"]
    options = (
        {"hidden_layers": 3, "hidden_width": 1024 if channels == 1 else 3000}
        if entry["model"] == "mlp"
        else {"feature_multiplier": entry["feat_mult"]}
    )
    with torch.device("meta"):
        return NETWORKS[entry["model"]](channels, side, entry["classes"], **options)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "entry",
    ARCHITECTURES,
    ids=lambda e: (
        f"{e['model']}-{e['input'][1]}-{e['classes']}-{e['feat_mult']}-{e['dim_in_decoder']}"
    ),
)
def test_published_architectures(entry: dict) -> None:
    network = build(entry)
    assert count(network) == entry["params_inference"]

    stages = cut(network)
    hidden = shapes(stages, tuple(entry["input"]))[:-1]
    loss = PredSim(pool_target=entry["dim_in_decoder"])
    with torch.device("meta"):
        heads = [loss.heads(s.hidden, entry["classes"]) for s in hidden]
    total = entry["params_inference"] + sum(count(h) for h in heads)
    assert total == entry["params_with_local_heads"]

    convolutions = [(s, h) for s, h in zip(hidden, heads, strict=True) if len(s.hidden) == 3]
    assert len(convolutions) == len(entry["conv_layers"])
    for (shape, head), golden in zip(convolutions, entry["conv_layers"], strict=True):
        assert shape.hidden[0] == golden["channels"]
        assert head.prediction.classifier.in_features == golden["pred_head_in"]
        assert list(head.prediction.pool.kernel_size) == golden["avg_pool"]["kernel"]
        assert list(head.prediction.pool.padding) == golden["avg_pool"]["padding"]


def test_stages_in_a_row_are_the_network() -> None:
    network = vgg8b(3, 32, 10, feature_multiplier=0.1, hidden_width=20, dropout=0.2).eval()
    x = torch.randn(3, 3, 32, 32)
    y = x
    for stage in cut(network):
        y = stage(y)
    torch.testing.assert_close(y, network(x), rtol=0, atol=0)


def test_pooling_is_cached_and_dropout_is_not() -> None:
    network = vgg8b(3, 32, 10, feature_multiplier=0.1, dropout=0.2)
    stages = cut(network)
    assert [s.dropout.rate if s.dropout else None for s in stages] == [None] + [0.2] * 7
    assert [s.dropout.channels for s in stages[1:]] == [True] * 6 + [False]
    assert [s.flatten for s in stages] == [False] * 6 + [True, False]
    stage_shapes = shapes(stages, (3, 32, 32))
    assert stage_shapes[1].hidden == (25, 32, 32)
    assert stage_shapes[1].output == (25, 16, 16)


def test_a_staged_sequential_is_cut_along_its_children() -> None:
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Dropout2d()),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
    )
    first, last = cut(network)
    assert first.name == "conv4+conv4"
    assert [type(m) for m in first.pool] == [nn.MaxPool2d]
    assert last.dropout.channels
    assert last.flatten


def test_channel_dropout_masks_are_whole_channels() -> None:
    stage = cut(vgg8b(3, 32, 10, feature_multiplier=0.5, dropout=0.25))[1]
    generator = torch.Generator().manual_seed(0)
    mask = stage.dropout.mask(128, (64, 32, 32), generator)
    assert mask.shape == (128, 64, 1, 1)
    assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (mask == 0).float().mean() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("is_output", [False, True])
def test_initial_weights_depend_on_seed_and_stage_alone(is_output: bool) -> None:
    def first_weights(seed: int) -> torch.Tensor:
        with torch.device("meta"):
            stages = cut(mlp(hidden_width=8))
        initialise(stages[3], seed, zero=is_output)
        return torch.cat([p.detach().flatten() for p in stages[3].parameters()])

    torch.manual_seed(7)
    before = torch.get_rng_state()
    a, b, c = first_weights(1), first_weights(1), first_weights(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.all(a[:80] == 0) == is_output


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: vgg8b(3, 8, 10), "too small"),
        (lambda: vgg8b(feature_multiplier=0.001), "convolution of 128 channels none"),
        (lambda: nn.Sequential(nn.ReLU()), "no convolution or linear layer"),
        (lambda: nn.Linear(3, 3), "must be an nn.Sequential"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), "followed by Dropout"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2), nn.Linear(9, 2)),
            r"Flatten\(start_dim=2, end_dim=-1\) stands before stage 2.*: use nn.Flatten",
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.Dropout(0.1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)
            ),
            "stage 1 has Dropout.* before its pooling.*: put it after the pooling",
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.Flatten(), nn.MaxPool1d(2), nn.Linear(9, 2)
            ),
            "stage 1 has Flatten.* before its pooling",
        ),
    ],
)
def test_networks_that_cannot_be_staged_are_refused(network, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut(network())


def test_a_stage_that_does_not_fit_is_named() -> None:
    stages = cut(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2)))
    with pytest.raises(UserError, match=r"stage 2 \(linear2\) cannot take an input of shape 4x6x6"):
        shapes(stages, (3, 8, 8))


@pytest.mark.parametrize(
    ("entry", "moved"),
    [
        ([nn.Dropout(0.5), nn.AvgPool2d(2), nn.Flatten()], True),
        ([nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.5)], False),
        ([nn.BatchNorm2d(1), nn.Dropout2d(0.5), nn.Flatten()], False),
    ],
    ids=repr,
)
def test_dropout_goes_to_the_input_only_where_it_is(entry: list[nn.Module], moved: bool) -> None:
    width = nn.Sequential(*entry).eval()(torch.rand(2, 1, 6, 6)).shape[1]
    stage = cut(nn.Sequential(*entry, nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 2)))[0]
    assert (stage.dropout is not None) == moved
    modules = [m for m in stage.layer if not (moved and isinstance(m, nn.Dropout))]
    assert modules[: len(entry) - moved] == entry[moved:]


@pytest.mark.parametrize(
    "entry",
    [
        [nn.AvgPool2d(2), nn.Flatten()],
        [nn.BatchNorm2d(1), nn.AvgPool2d(2), nn.Flatten(1, 3)],
        [nn.Flatten(-3)],
    ],
    ids=repr,
)
def test_what_stands_before_the_first_layer_stays_in_its_order(entry: list[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 1, 6, 6)
    width = nn.Sequential(*entry).eval()(x).shape[1]
    whole = nn.Sequential(*entry, nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    stages = cut(whole)
    assert [stage.name for stage in stages] == ["linear4", "linear2"]
    assert shapes(stages, (1, 6, 6))[-1].output == (2,)
    h = x
    for stage in stages:
        h = stage.eval()(h)
    assert torch.equal(h, whole(x))
