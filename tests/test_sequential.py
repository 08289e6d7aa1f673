"""Any model as a ``Sequential`` of its own parts, which computes the same."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.errors import UserError
from greedy.models import cut, library_network, sequential, shapes

SMALL = (3, 32, 32)

# Parts of these networks: the first few, the last few, and the number of stages.
LIBRARY = {
    "torchvision:resnet18": ("conv1 bn1 relu maxpool layer1.0", "avgpool  fc", 10),
    "torchvision:resnet50": ("conv1 bn1 relu maxpool layer1.0", "avgpool  fc", 18),
    "torchvision:vgg16_bn": ("features.0 features.1 features.2", "classifier.5 classifier.6", 16),
    "torchvision:mobilenet_v2": (
        "features.0 features.1 features.2",
        "features.18   classifier",
        20,
    ),
    "torchvision:efficientnet_b0": ("features.0 features.1.0", "avgpool  classifier", 19),
    "torchvision:convnext_tiny": ("features.0 features.1.0", "avgpool classifier", 23),
    "torchvision:vit_b_16": ("conv_proj   ", "encoder.ln  heads.head", 14),
    "torchvision:swin_t": ("features.0 features.1.0", "norm permute avgpool flatten head", 17),
    "timm:resnet18": ("conv1 bn1 act1 maxpool layer1.0", "global_pool fc", 10),
    "timm:vit_tiny_patch16_224": ("patch_embed   pos_drop blocks.0", "norm  head_drop head", 14),
    "timm:convnext_atto": ("stem stages.0.blocks.0", "stages.3.blocks.1 head", 17),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_networks_of_torchvision_and_timm_compute_the_same_as_their_parts(name: str) -> None:
    first, last, stages = LIBRARY[name]
    model = library_network(name, SMALL, 5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, training = torch.get_rng_state(), model.training

    network = sequential(model, SMALL)  # which compares the outputs

    assert " ".join(network.paths).startswith(first)
    assert " ".join(network.paths).endswith(last)
    assert len(cut(network)) == stages
    assert {id(p) for p in network.parameters()} == {id(p) for p in model.parameters()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:vit_b_16"])
def test_a_network_on_the_meta_device_has_the_same_parts(name: str) -> None:
    with torch.device("meta"):
        empty = sequential(library_network(name, SMALL, 5), SMALL)
    network = sequential(library_network(name, SMALL, 5), SMALL)
    assert empty.paths == network.paths
    assert shapes(cut(empty), SMALL) == shapes(cut(network), SMALL)
    assert [s.kinds for s in cut(empty)] == [s.kinds for s in cut(network)]


class Plain(nn.Module):
    """A network as tutorials write it, with functions between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.hidden = nn.Linear(4 * 4 * 4, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        rows = x.size(0)
        x = F.max_pool2d(F.relu(self.first(x), inplace=True), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.second(x)), (4, 4))
        if scale is not None:
            x = x * scale
        x = F.dropout(self.hidden(x.view(rows, -1)), 0.5, self.training)
        return self.last(x)


def test_functions_become_modules_that_stages_know() -> None:
    network = sequential(Plain(), SMALL)
    kinds = "Conv2d ReLU MaxPool2d Conv2d ReLU AdaptiveAvgPool2d Flatten Linear Dropout Linear"
    assert [type(module).__name__ for module in network] == kinds.split()
    first, _, hidden, last = cut(network)
    assert [type(m) for m in first.pool] == [nn.MaxPool2d]
    assert hidden.flatten
    assert last.dropout.rate == 0.5


class Checked(Plain):
    """A network whose forward pass looks at the images."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        assert x.shape[-1] == 32, "wrong size"
        x = self.second(self.first(x))
        return self.last(self.hidden(F.avg_pool2d(x, 8).flatten(1)))


class Chained(Checked):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(8)
        self.many = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        assert x.shape[-1] == 32, "wrong size"
        x = self.second(self.first(x))
        for each in self.many:
            x = each(x)
        return self.last(self.hidden(self.pool(x).flatten(1)))


def test_a_network_that_cannot_be_traced_is_composed_of_the_children_that_it_calls() -> None:
    network = sequential(Chained(), SMALL)
    assert network.paths == ["first", "second", "many.0", "many.1", "pool", "", "hidden", "last"]


class Noisy(Plain):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        return x + 1 if self.training else x


class Shortcut(Plain):
    """A network in which all depends on its images."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.second(self.first(x)).mean((2, 3)) + x.mean()
        return self.last(self.hidden(y.repeat(1, 16))) + x.mean()


class Named(Plain):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore
        return {"logits": super().forward(x)}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Checked, r"hidden takes something else than what second gives"),
        (Noisy, "in evaluation mode its parts compute something else"),
        (Shortcut, "all its layers depend on more than the one before"),
        (Named, "gives a dict where a tensor is needed"),
    ],
)
def test_a_model_that_is_no_chain_is_refused_in_a_sentence(
    model: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        sequential(model(), SMALL)
    assert "write it as an nn.Sequential, whose children may be whole blocks" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("torchvision:resnet18", (1, 32, 32), "3 channels and the data have 1: choose .*timm"),
        ("torchvision:resnet81", SMALL, "no network 'resnet81': did you mean resnet18"),
        ("timm:resnet_18", SMALL, "no network 'resnet_18': did you mean"),
        ("torchvision:vit_b_16", (3, 32, 48), "cannot be built for .* 3x32x48.*square images"),
        ("torchvision:vit_b_16", (3, 30, 30), "cannot be built for .* 3x30x30"),
    ],
)
def test_networks_that_libraries_cannot_build_are_refused(
    name: str, image: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        library_network(name, image, 5)


def test_maps_with_features_last_come_first_between_stages() -> None:
    with torch.device("meta"):
        network = sequential(library_network("torchvision:swin_t", (3, 64, 64), 5), (3, 64, 64))
    outputs = [s.output for s in shapes(cut(network), (3, 64, 64))]
    assert outputs[:3] == [(96, 16, 16)] * 3
    assert outputs[3] == (192, 8, 8)
    assert outputs[-2:] == [(768, 1, 1), (5,)]


class FeaturesLast(nn.Module):
    """A network whose maps are as wide as they have features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.first(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("side", [8, 16])
def test_features_come_first_where_maps_have_as_many_rows(side: int) -> None:
    model, images = FeaturesLast(), torch.rand(2, 3, side, side)
    first, hidden, *_ = cut(sequential(model, (3, side, side)))
    maps = first(images)
    torch.testing.assert_close(maps, model.first(images), rtol=0, atol=0)
    torch.testing.assert_close(
        hidden(maps), model.block[:2](maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    )


class Dense(nn.Module):
    """Adds the outputs of a layer to its input's channels."""

    def __init__(self, channels: int, more: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, more, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(x)], dim=1)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_width_like_the_last_layer_s_channels_is_no_channel(pooled: bool) -> None:
    """Without pooling the model takes images of one size alone, but its blocks take others."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Dense(3, 8), Dense(11, 8))
            self.pool = nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity()
            self.head = nn.Linear(19 if pooled else 19 * 8 * 8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.flatten(self.pool(self.blocks(x)), 1))

    stages = cut(sequential(Model(), (3, 8, 8)))
    assert [shape.hidden for shape in shapes(stages, (3, 8, 8))] == [(11, 8, 8), (19, 8, 8), (4,)]


class Windows(nn.Module):
    """Puts quarters of maps below each other, as rows, and maps together again."""

    def __init__(self, *, known: bool) -> None:
        super().__init__()
        self.known = known
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        x = self.first(x).reshape(-1, 4, 4, 4)
        x = self.second(x)
        return self.last(x.reshape(rows if self.known else -1, 4 * 8 * 8))


def test_parts_that_fail_are_told_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"Windows is no chain of modules \(in training mode its "):
        sequential(Windows(known=True), (3, 8, 8))


class Skipping(nn.Module):
    """Leaves blocks out at random as it trains, or where there are more than two images."""

    def __init__(self, draw: Callable[[], float] | None) -> None:
        super().__init__()
        self.draw = draw
        self.first = nn.Linear(3 * 8 * 8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for block in self.blocks:
            if self.draw is None or not self.training or self.draw() > 0.01:
                x = block(x)
        return self.last(x if self.draw or len(x) <= 2 else 2 * x)


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (lambda: float(torch.rand(())), "in training mode its own forward pass draws random"),
        (random.random, "in training mode its own forward pass draws random"),
        (lambda: np.random.rand(1)[0], "in training mode its own forward pass draws"),  # noqa: NPY002
        (None, "in evaluation mode its parts compute something else"),
    ],
    ids=["torch", "python", "numpy", "rows"],
)
def test_what_a_forward_pass_decides_itself_is_no_chain(draw, reason: str) -> None:
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(UserError, match=reason):
        sequential(Skipping(draw), (3, 8, 8))
    assert random.getstate() == before[0]


def test_a_model_for_other_images_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"Plain cannot take images of 1x8x8 \(.*: change its"):
        sequential(Plain(), (1, 8, 8))


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 16, "wrong size"
        return self.first(x)


def test_a_layer_that_fails_is_named_whatever_it_raises() -> None:
    stages = cut(nn.Sequential(Sized(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2)))
    with pytest.raises(UserError, match=r"stage 1 \(.*\) cannot take .* wrong size"):
        shapes(stages, (3, 8, 8))


def test_hooks_of_an_inner_sequential_are_called() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    inner.register_forward_hook(lambda module, inputs, output: 0 * output)
    stage, _ = cut(nn.Sequential(inner, nn.Linear(4, 2)))
    assert not stage(torch.randn(2, 4)).any()


def test_a_stage_that_changes_the_number_of_rows_is_told() -> None:
    stages = cut(sequential(Windows(known=False), (3, 8, 8)))
    with pytest.raises(UserError, match=r"gives 8 rows for 2 samples: put what changes"):
        shapes(stages, (3, 8, 8))
