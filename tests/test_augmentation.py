"""Crop, flip and cutout compared with plain loops, and their draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greedy.base.errors import UserError
from greedy.data import Augmentation, Draws, normalise, prepare

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_loops(image, shift, flip, centre, hole):
    """Returns one float image (C, H, W) shifted, flipped, normalised and with its hole, pixel by
    pixel."""
    channels, height, width = image.shape
    out, half = torch.zeros_like(image), hole // 2
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                from_y = y + shift[0]
                from_x = (width - 1 - x if flip else x) + shift[1]
                inside = 0 <= from_y < height and 0 <= from_x < width
                value = image[c, from_y, from_x] if inside else 0.0
                out[c, y, x] = (value - MEAN[c]) / STD[c]
                if -half <= y - centre[0] < half and -half <= x - centre[1] < half:
                    out[c, y, x] = 0.0
    return out


@settings(deadline=None, max_examples=40)
@given(
    padding=st.integers(0, 3),
    flip=st.booleans(),
    hole=st.integers(0, 9),
    size=st.tuples(st.integers(4, 8), st.integers(4, 8)),
    seed=st.integers(0, 1000),
)
def test_prepare_is_the_loops(padding, flip, hole, size, seed):
    height, width = size
    images = torch.rand(4, 3, height, width, generator=generator(seed))
    augmentation = Augmentation(padding, flip, hole)
    draws = augmentation.draw(4, height, width, generator(seed))
    prepared = prepare(images, MEAN, STD, augmentation, draws)
    for i, image in enumerate(images):
        shift, centre = draws.shifts[i].tolist(), draws.centres[i].tolist()
        expected = by_loops(image, shift, bool(draws.flips[i]), centre, hole)
        torch.testing.assert_close(prepared[i], expected)


def test_hole_of_odd_length_covers_whole_halves():
    images = torch.ones(1, 1, 9, 9)
    draws = Draws(torch.zeros(1, 2), torch.zeros(1, dtype=torch.bool), torch.tensor([[4, 0]]))
    cut = Augmentation(hole=5).cutout(images, draws)
    expected = torch.ones(9, 9)
    expected[2:6, 0:2] = 0
    assert torch.equal(cut[0, 0], expected)


def test_crop_is_before_flip_and_shifts_name_the_source():
    images = torch.arange(1.0, 10).view(1, 1, 3, 3)
    draws = Draws(torch.tensor([[1, -1]]), torch.tensor([True]), torch.zeros(1, 2))
    out = Augmentation(padding=1, flip=True).apply(images, draws)
    # Cropped: [0 4 5], [0 7 8], [0 0 0].
    assert out[0, 0].tolist() == [[5, 4, 0], [8, 7, 0], [0, 0, 0]]


def test_bytes_and_floats_are_prepared_alike():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=generator())
    augmentation = Augmentation.parse("jitter2+hflip", cutout_length=4)
    draws = augmentation.draw(6, 8, 8, generator())
    prepared = prepare(images, MEAN, STD, augmentation, draws)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(
        prepared, prepare(images.float() / 255, MEAN, STD, augmentation, draws)
    )


def test_without_augmentation_prepare_normalises():
    images = torch.rand(2, 3, 4, 4, generator=generator())
    plain = prepare(images, MEAN, torch.tensor(STD))
    assert torch.equal(plain, normalise(images, MEAN, STD))
    torch.testing.assert_close(plain[1, 2], (images[1, 2] - 0.6) / 0.3)
    none = Augmentation.parse("none")
    assert torch.equal(plain, prepare(images, MEAN, STD, none, none.draw(2, 4, 4, generator())))
    with pytest.raises(ValueError, match="belong together"):
        prepare(images, MEAN, STD, Augmentation(2))


def test_draws_belong_to_rows_not_to_batches():
    images = torch.rand(30, 3, 8, 8, generator=generator())
    augmentation = Augmentation(2, True, 4)
    draws = augmentation.draw(30, 8, 8, generator())
    whole = prepare(images, MEAN, STD, augmentation, draws)
    for rows in torch.randperm(30, generator=generator(1)).split(7):
        batch = prepare(images[rows], MEAN, STD, augmentation, draws[rows])
        assert torch.equal(batch, whole[rows])
        again = prepare(images[rows], MEAN, STD, augmentation, draws[rows.numpy()])
        assert torch.equal(batch, again)


def test_draws_cover_their_range_evenly():
    rows = 50_000
    draws = Augmentation(2, True, 4).draw(rows, 6, 9, generator())
    for axis, side in ((0, 6), (1, 9)):
        shares = torch.bincount(draws.shifts[:, axis] + 2) / rows
        torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.01, rtol=0)
        shares = torch.bincount(draws.centres[:, axis]) / rows
        torch.testing.assert_close(shares, torch.full((side,), 1 / side), atol=0.01, rtol=0)
    assert draws.flips.float().mean().item() == pytest.approx(0.5, abs=0.01)
    together = torch.stack((*draws.shifts.T, draws.flips, *draws.centres.T)).float().corrcoef()
    assert (together - torch.eye(5)).abs().max() < 0.03


def test_draws_follow_from_the_generator_alone():
    augmentation = Augmentation(4, True, 16)
    first, same, other = (augmentation.draw(50, 32, 32, generator(seed)) for seed in (1, 1, 2))
    for name in ("shifts", "flips", "centres"):
        assert torch.equal(getattr(first, name), getattr(same, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_nothing_is_drawn_for_what_is_not_asked():
    draws = Augmentation().draw(100, 8, 8, generator())
    assert not draws.shifts.any()
    assert not draws.flips.any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Augmentation(0, False, 5)),
        ("jitter2", Augmentation(2, False, 5)),
        ("crop4+hflip", Augmentation(4, True, 5)),
        ("hflip + jitter2", Augmentation(2, True, 5)),
    ],
)
def test_parse(text, expected):
    assert Augmentation.parse(text, cutout_length=5) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hflop", "did you mean hflip"),
        ("", "unknown augmentation"),
        ("jitter2+crop4", "contradicts"),
        ("none+hflip", "contradicts"),
        ("hflip+hflip", "repeats"),
    ],
)
def test_parse_refuses(text, problem):
    with pytest.raises(UserError, match=problem):
        Augmentation.parse(text)


def test_sizes_that_cannot_be():
    with pytest.raises(UserError, match="cutout_length"):
        Augmentation.parse("none", cutout_length=-1)
    with pytest.raises(UserError, match="too small to be shifted"):
        Augmentation(2).draw(10, 1, 1, generator())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives():
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator())
    augmentation = Augmentation(4, True, 16)
    draws = augmentation.draw(16, 32, 32, generator())
    prepared = prepare(images.cuda(), MEAN, STD, augmentation, draws)
    assert prepared.is_cuda
    torch.testing.assert_close(prepared.cpu(), prepare(images, MEAN, STD, augmentation, draws))
