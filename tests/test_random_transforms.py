"""Data sets whose own transforms draw at random."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import CLASSES, SIDE, files, trainer
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from greedy import RunDirectory, UserError
from greedy.cache import Store
from greedy.data import dataset_from_torch

ROWS = 96


def grey(rows: int, seed: int) -> TensorDataset:
    """Returns images whose class is the brighter third."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, rows)
    images = draw.integers(0, 150, (rows, 1, SIDE, SIDE))
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 2] += 80
    return TensorDataset(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


class Drawn(Dataset):
    """The images of a set, each given to a transform."""

    def __init__(self, samples: TensorDataset, transform) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        image, label = self.samples[index]
        return self.transform(image), label


def shifted(image: torch.Tensor) -> torch.Tensor:
    """Draws from Python's generator."""
    return image.roll(random.randrange(SIDE), 2)


def noisy(image: torch.Tensor) -> torch.Tensor:
    """Draws from NumPy's."""
    return image + torch.from_numpy(np.random.randint(0, 20, image.shape, np.uint8))  # noqa: NPY002


def dimmed(image: torch.Tensor) -> torch.Tensor:
    """Draws from torch's."""
    return (image * torch.rand(())).to(torch.uint8)


class Speckled:
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.random = np.random.default_rng()

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image + torch.from_numpy(self.random.integers(0, 20, image.shape, np.uint8))


CROPPED = v2.Compose([v2.RandomCrop(SIDE, padding=1), v2.RandomHorizontalFlip()])
ALL = v2.Compose([CROPPED, shifted, noisy, dimmed, Speckled()])
TRAIN, TEST = Drawn(grey(ROWS, 0), ALL), grey(30, 1)
RING = {"views": 2, "reuse": 2, "epochs": 5}


def fit(run: Path, train=TRAIN, test=TEST, **settings):
    mine = trainer(run, **({"epochs": 3} | settings))
    mine.fit(train, test)
    return mine


def stored(run: Path, stage: int, split: str = "train") -> np.ndarray:
    return Store(run / f"stage{stage}/activations.zarr" / split).load()


def content(run: Path) -> dict[str, bytes]:
    """Returns the files of a run that follow from its seed."""
    return {
        name: data
        for name, data in files(run).items()
        if "activations.zarr" in name or name.endswith(".safetensors")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("fresh") / "run"
    fit(run, **RING, num_workers=0)
    return run


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_processes_gives_the_same_bytes(
    finished: Path, tmp_path: Path, workers: int
) -> None:
    fit(tmp_path / "run", **RING, num_workers=workers)
    assert content(tmp_path / "run") == content(finished)


@pytest.mark.parametrize(
    "transform", [CROPPED, shifted, noisy, dimmed, Speckled()], ids=lambda t: str(t)[:12]
)
def test_a_view_follows_from_seed_and_number(transform) -> None:
    train = dataset_from_torch(Drawn(TRAIN.samples, transform), TEST).train
    rows = np.arange(20)

    def drawn(seed: int, number: int) -> bytes:
        return train.view(seed, number).read(rows)[0].tobytes()

    assert len({drawn(seed, number) for seed in (0, 1) for number in (0, 1)}) == 4
    assert drawn(1, 1) == drawn(1, 1)
    alone = np.concatenate([train.view(1, 1).read(rows[i : i + 1])[0] for i in reversed(rows)])
    assert alone[::-1].tobytes() == drawn(1, 1)


def test_every_view_and_epoch_is_a_pass_of_its_own(finished: Path) -> None:
    run = RunDirectory.open(finished)
    assert run.complete_record(0).data_choices == run.complete_record(0).data_choices
    assert run.complete_record(0).data_choices.fresh
    assert run.complete_record(1).store.view_numbers == [2, 3]
    images = np.concatenate([stored(finished, 1), stored(finished, 2)], axis=2)
    assert len({view.tobytes() for view in images}) == 2


def test_the_global_generators_are_left_alone(tmp_path: Path) -> None:
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    mine, data = trainer(tmp_path / "run", num_workers=0), dataset_from_torch(TRAIN, TEST)
    before = states()
    mine.prepare(data)
    assert states() == before


def test_a_set_without_randomness_is_stored_as_before(tmp_path: Path) -> None:
    fit(tmp_path / "plain", TRAIN.samples, epochs=1)
    fit(tmp_path / "fixed", Drawn(TRAIN.samples, v2.Identity()), epochs=1, num_workers=2)
    assert content(tmp_path / "plain") == content(tmp_path / "fixed")
    for name in ("plain", "fixed"):
        run = RunDirectory.open(tmp_path / name)
        assert not run.complete_record(0).data_choices.fresh
        assert run.complete_record(1).store.views == 1


def test_frozen_transforms_are_drawn_once(tmp_path: Path) -> None:
    fit(tmp_path / "run", transforms="frozen", epochs=1)
    fit(tmp_path / "former", frozen_transforms=True, epochs=1)
    run = RunDirectory.open(tmp_path / "run")
    assert not run.complete_record(0).data_choices.fresh
    assert run.complete_record(1).store.views == 1
    trainer(tmp_path / "run", transforms="frozen", epochs=1).train(retrain_from=1)  # without data
    assert content(tmp_path / "run") == content(tmp_path / "former")


@pytest.mark.parametrize("transforms", ["fresh", "frozen"])
def test_a_random_test_set_is_refused(tmp_path: Path, transforms: str) -> None:
    problem = r"sample 0 of python test changes .* RandomCrop, RandomHorizontalFlip"
    with pytest.raises(UserError, match=problem):
        fit(tmp_path / "run", TRAIN, Drawn(TEST, CROPPED), transforms=transforms)
    assert not (tmp_path / "run").exists()


def test_draws_that_no_seed_reaches_are_refused(tmp_path: Path) -> None:
    def from_the_system(image: torch.Tensor) -> torch.Tensor:
        return image + torch.frombuffer(bytearray(os.urandom(1)), dtype=torch.uint8)

    with pytest.raises(UserError, match="although the generators are seeded"):
        fit(tmp_path / "run", Drawn(TRAIN.samples, from_the_system))


def test_labels_drawn_at_random_are_refused(tmp_path: Path) -> None:
    class Relabelled(Drawn):
        def __getitem__(self, index: int):
            image, _ = super().__getitem__(index)
            return image, random.randrange(CLASSES)

    with pytest.raises(UserError, match="labels of python train .* must not change labels"):
        fit(tmp_path / "run", Relabelled(TRAIN.samples, noisy))


class Failing(Drawn):
    """Fails at a sample once it has been read a few times."""

    reads = 0

    def __getitem__(self, index: int):
        self.reads += index == 7
        if self.reads > 5:
            raise ValueError("no such file")
        return super().__getitem__(index)


def test_an_error_in_another_process_names_the_sample(tmp_path: Path) -> None:
    sentence = r"^sample 7 of python train cannot be read \(ValueError: no such file, .*line \d+\)"
    mine = trainer(tmp_path / "run", num_workers=2)
    broken = Failing(TRAIN.samples, noisy)
    mine.prepare(dataset_from_torch(broken, TEST))
    broken.reads = 5
    with pytest.raises(UserError, match=sentence) as raised:
        mine.train()
    assert "\n" not in str(raised.value)


def test_a_process_that_dies_is_named(tmp_path: Path) -> None:
    parent = os.getpid()

    def dying(image: torch.Tensor) -> torch.Tensor:
        if os.getpid() != parent:
            os._exit(1)
        return noisy(image)

    with pytest.raises(UserError, match=r"process that reads the data set ended .*num_workers"):
        fit(tmp_path / "run", Drawn(TRAIN.samples, dying), num_workers=1)
