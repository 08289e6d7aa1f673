"""Random operations on images compared with torchvision's."""

from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as F
from small_training import TEST, TRAIN, new_trainer, same, weights
from torch.utils.data import TensorDataset
from torchvision.transforms import RandAugment as TorchRandAugment
from torchvision.transforms import RandomErasing, RandomResizedCrop
from torchvision.transforms.autoaugment import _apply_op

from greedy import UserError
from greedy.data import Augmentation, prepare
from greedy.data.augmentation import OPERATIONS
from greedy.recipes import load

ROWS, HEIGHT, WIDTH = 24, 20, 28
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(rows: int = ROWS, channels: int = 3) -> torch.Tensor:
    """Returns smooth images of bytes with some noise."""
    shape = (rows, channels, HEIGHT, WIDTH)
    coarse = torch.rand(rows, channels, 4, 4, generator=generator())
    smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")
    noise = torch.rand(shape, generator=generator(1))
    return (200 * smooth + 50 * noise).to(torch.uint8)


def drawn(name: str, rows: int = ROWS) -> torch.Tensor:
    return OPERATIONS[name].draw(rows, HEIGHT, WIDTH, generator())


def test_a_part_is_resized_as_torchvision_does() -> None:
    given, table = images(), drawn("random-resized-crop")
    ours = OPERATIONS["random-resized-crop"].apply(given, table)
    assert ours.dtype == torch.uint8
    for image, box, mine in zip(given, table.tolist(), ours, strict=True):
        theirs = F.resized_crop(image, *box, [HEIGHT, WIDTH], antialias=True)
        apart = (mine.int() - theirs.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01  # rounding of halves
        floats = OPERATIONS["random-resized-crop"].apply(image[None] / 255, torch.tensor([box]))
        theirs = F.resized_crop(image / 255, *box, [HEIGHT, WIDTH], antialias=True)
        torch.testing.assert_close(floats[0], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_blended_as_torchvision_does(channels: int) -> None:
    given, table = images(channels=channels), drawn("color-jitter")
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for scale in (1, 255):
        raw = given if scale == 1 else given / scale
        ours = OPERATIONS["color-jitter"].apply(raw, table)
        for image, row, mine in zip(raw, table.tolist(), ours, strict=True):
            theirs = image
            for which in map(int, row[:3]):
                theirs = changes[which](theirs, row[3 + which])
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if scale == 1 else 1e-6)


def test_each_operation_of_randaugment_is_torchvisions() -> None:
    given, ours = images(28), OPERATIONS["randaugment"]
    space = TorchRandAugment()._augmentation_space(31, (HEIGHT, WIDTH))
    for number, (name, (magnitudes, signed)) in enumerate(space.items()):
        for sign in (-1, 1):
            table = torch.tensor([[number, 0, sign, 1]]).expand(len(given), 4)
            magnitude = float(magnitudes[9]) if magnitudes.ndim else 0.0
            magnitude *= sign if signed else 1
            nearest = F.InterpolationMode.NEAREST
            theirs = torch.stack([_apply_op(i, name, magnitude, nearest, None) for i in given])
            assert torch.equal(ours.apply(given, table), theirs), (name, sign)


def test_two_operations_of_randaugment_follow_each_other() -> None:
    given, ours = images(2), OPERATIONS["randaugment"]
    both = ours.apply(given, torch.tensor([[5, 13, 1, -1], [2, 0, -1, 1]]))
    assert torch.equal(both[0], F.equalize(F.rotate(given[0], 9.0)))
    assert not torch.equal(both[1], given[1])


def test_boxes_are_zero_after_normalisation() -> None:
    table = drawn("random-erasing")
    augmentation = Augmentation.parse("random-erasing")
    draws = augmentation.draw(ROWS, HEIGHT, WIDTH, generator())
    plain = prepare(images(), MEAN, STD)
    erased = prepare(images(), MEAN, STD, augmentation, draws)
    for before, after, (top, left, h, w) in zip(plain, erased, draws.tables[0], strict=True):
        assert torch.equal(after, F.erase(before, top, left, h, w, torch.zeros(1)))
    assert table.shape == (ROWS, 4)


@pytest.mark.parametrize("name", ["random-resized-crop", "random-erasing"])
def test_boxes_have_torchvisions_distribution(name: str) -> None:
    """Compares area, shape and place: an eighth of ours lies below each octile of theirs."""
    rows = 4000
    ours = drawn(name, rows)
    torch.manual_seed(0)
    image = torch.zeros(3, HEIGHT, WIDTH)
    if name == "random-erasing":
        ours = ours[ours[:, 2] > 0]
        assert len(ours) / rows == pytest.approx(0.5, abs=0.03)
        get, settings = RandomErasing.get_params, ((0.02, 0.33), (0.3, 3.3), [0.0])
        theirs = torch.tensor([get(image, *settings)[:4] for _ in range(rows)])
    else:
        get, settings = RandomResizedCrop.get_params, ([0.08, 1.0], [3 / 4, 4 / 3])
        theirs = torch.tensor([get(image, *settings) for _ in range(rows)])

    def figures(boxes: torch.Tensor) -> list[torch.Tensor]:
        top, left, h, w = boxes.double().T
        return [h * w, (h / w).log(), top / (HEIGHT - h + 1), left / (WIDTH - w + 1)]

    for mine, other in zip(figures(ours), figures(theirs), strict=True):
        steps = torch.linspace(0.125, 0.875, 7, dtype=torch.float64)
        for octile in other.quantile(steps):
            shares = [(each <= octile + 1e-9).double().mean() for each in (mine, other)]
            assert abs(float(shares[0] - shares[1])) < 0.045
    assert (ours[:, 0] + ours[:, 2]).max() <= HEIGHT and (ours[:, 1] + ours[:, 3]).max() <= WIDTH


def test_factors_orders_and_operations_are_uniform() -> None:
    rows = 20_000
    jitter = drawn("color-jitter", rows)
    assert float(jitter[:, 3:].min()) >= 0.6 and float(jitter[:, 3:].max()) <= 1.4
    torch.testing.assert_close(jitter[:, 3:].mean(0), torch.ones(3).double(), atol=0.01, rtol=0)
    orders = torch.bincount((jitter[:, 0] * 3 + jitter[:, 1]).long())
    assert sorted((orders[orders > 0] / rows * 6).round(decimals=1).tolist()) == [1.0] * 6
    chosen = drawn("randaugment", rows)
    for column in (0, 1):
        shares = torch.bincount(chosen[:, column], minlength=14) / rows * 14
        torch.testing.assert_close(shares, torch.ones(14), atol=0.1, rtol=0)
    assert abs(float(chosen[:, 2:].double().mean())) < 0.02


def test_a_row_does_not_depend_on_its_batch() -> None:
    text = "random-resized-crop+hflip+randaugment+color-jitter+random-erasing"
    augmentation, given = Augmentation.parse(text, cutout_length=4), images()
    draws = augmentation.draw(ROWS, HEIGHT, WIDTH, generator())
    whole = prepare(given, MEAN, STD, augmentation, draws)
    for rows in (*torch.randperm(ROWS, generator=generator(1)).split(7), torch.tensor([3])):
        assert torch.equal(prepare(given[rows], MEAN, STD, augmentation, draws[rows]), whole[rows])


def test_other_draws_stay_as_they_are() -> None:
    plain = Augmentation.parse("hflip", 4).draw(50, 8, 8, generator())
    more = Augmentation.parse("hflip+color-jitter+random-erasing", 4).draw(50, 8, 8, generator())
    assert torch.equal(plain.flips, more.flips) and torch.equal(plain.centres, more.centres)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "crop4+random-resized-crop",
            "contradicts itself: give none, or one of jitter2, crop4 and",
        ),
        ("color-jiter", "did you mean color-jitter"),
    ],
)
def test_parse_refuses(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Augmentation.parse(text)
    with pytest.raises(UserError, match="data.augmentation is .* but must be none, or one of"):
        load("demo", [f"data.augmentation={text}"])


def test_images_whose_colours_are_unknown_are_refused() -> None:
    with pytest.raises(UserError, match="images of 4 channels have none that it knows"):
        Augmentation.parse("hflip+color-jitter").require_channels(4)
    Augmentation.parse("random-resized-crop+random-erasing").require_channels(4)


@pytest.mark.parametrize(
    ("name", "largest", "message"),
    [
        ("randaugment", 1, "randaugment takes images of bytes"),
        (
            "color-jitter",
            40000,
            "takes bytes, or floats from 0 to 1, and .* values from 0 to 40000",
        ),
        ("color-jitter", 1, None),
        ("hflip", 40000, None),
    ],
)
def test_floats_that_an_operation_does_not_know_are_refused(
    tmp_path: Path, name: str, largest: float, message: str | None
) -> None:
    images, labels = torch.linspace(0, largest, 40 * 64).reshape(40, 1, 8, 8), torch.arange(40) % 3
    data = TensorDataset(images, labels)
    trainer = new_trainer(tmp_path / "run", augmentation=name, epochs=1)
    if message is None:
        trainer.fit(data, data)
        return
    with pytest.raises(UserError, match=message):
        trainer.fit(data, data)
    assert not (tmp_path / "run/stage0/stage.json").exists()


def test_stages_train_on_images_changed_at_random(tmp_path: Path) -> None:
    names = "random-resized-crop+hflip+randaugment+color-jitter+random-erasing"
    for name in ("first", "second"):
        new_trainer(tmp_path / name, augmentation=names).fit(TRAIN, TEST)
    new_trainer(tmp_path / "plain", augmentation="hflip").fit(TRAIN, TEST)
    for stage in (1, 2):
        first, plain = weights(tmp_path / "first", stage), weights(tmp_path / "plain", stage)
        assert same(first, weights(tmp_path / "second", stage)) and not same(first, plain)


def test_what_resizing_overshoots_is_jittered_and_other_floats_are_not() -> None:
    table = drawn("color-jitter")
    OPERATIONS["color-jitter"].apply(images() / 160 - 0.3, table)
    for half in (images() / 256 - 0.5, images() / 128 - 1):  # as many scale them
        with pytest.raises(UserError, match="values from -"):
            OPERATIONS["color-jitter"].apply(half, table)
    with pytest.raises(UserError, match="values from -0.99"):
        OPERATIONS["color-jitter"].apply(images() / 128 - 1, table)
