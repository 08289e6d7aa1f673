"""Data sets whose own transforms draw at random."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import CLASSES, SIDE, files, learned, new_trainer, same, weights
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from greedy import Reporter, RunDirectory, UserError
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
    trainer = new_trainer(run, **({"epochs": 3} | settings))
    trainer.fit(train, test)
    return trainer


def stored(run: Path, stage: int, split: str = "train") -> np.ndarray:
    return Store(run / f"stage{stage}/activations.zarr" / split).load()


def content(run: Path) -> dict[str, bytes]:
    """Returns the files of a run that follow from its seed."""
    return {
        name: data
        for name, data in files(run).items()
        if "activations.zarr" in name or name.endswith(".safetensors")
    }


def percent_waited(run: Path, stage: int) -> list[float]:
    lines = (run / f"stage{stage}/history.jsonl").read_text().splitlines()
    return [json.loads(line)["waiting_percent"] for line in lines]


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
    assert run.record(0).data_choices.fresh
    assert run.record(1).store.view_numbers == [2, 3]
    images = np.concatenate([stored(finished, 1), stored(finished, 2)], axis=2)
    assert len({view.tobytes() for view in images}) == 2


def test_every_epoch_says_how_long_it_waited(finished: Path) -> None:
    for stage in (1, 2, 3):
        waited = percent_waited(finished, stage)
        assert len(waited) == 5
        assert all(0 < share < 100 for share in waited)


def test_the_global_generators_are_left_alone(tmp_path: Path) -> None:
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    trainer, data = new_trainer(tmp_path / "run", num_workers=0), dataset_from_torch(TRAIN, TEST)
    before = states()
    trainer.prepare(data)
    assert states() == before


def test_a_set_without_randomness_is_stored_as_before(tmp_path: Path) -> None:
    fit(tmp_path / "plain", TRAIN.samples, epochs=1)
    fit(tmp_path / "fixed", Drawn(TRAIN.samples, v2.Identity()), epochs=1, num_workers=2)
    assert content(tmp_path / "plain") == content(tmp_path / "fixed")
    for name in ("plain", "fixed"):
        run = RunDirectory.open(tmp_path / name)
        assert not run.record(0).data_choices.fresh
        assert run.record(1).store.views == 1


def test_frozen_transforms_are_drawn_once(tmp_path: Path) -> None:
    frozen = {"transforms": "frozen", "epochs": 1}
    fit(tmp_path / "run", **frozen)
    run = RunDirectory.open(tmp_path / "run")
    assert not run.record(0).data_choices.fresh
    assert run.record(1).store.views == 1
    before = content(run.path)
    recipe = run.path / "run.toml"
    older = recipe.read_text().replace('transforms = "frozen"', "frozen_transforms = true")
    recipe.write_text(older)  # as older versions wrote it
    new_trainer(run.path, **frozen).train(retrain_from=1)  # without the data set
    assert content(run.path) == before
    with pytest.raises(UserError, match=r"data.transforms is 'frozen' there, 'fresh' here"):
        new_trainer(run.path, epochs=1)


@pytest.mark.parametrize("transforms", ["fresh", "frozen"])
def test_a_random_test_set_is_refused(tmp_path: Path, transforms: str) -> None:
    problem = r"sample 0 of python test changes .*RandomCrop, RandomHorizontalFlip"
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
    trainer = new_trainer(tmp_path / "run", num_workers=2)
    broken = Failing(TRAIN.samples, noisy)
    trainer.prepare(dataset_from_torch(broken, TEST))
    broken.reads = 5
    with pytest.raises(UserError, match=sentence) as raised:
        trainer.train()
    assert "\n" not in str(raised.value)


def test_a_process_that_dies_is_named(tmp_path: Path) -> None:
    parent = os.getpid()

    def dying(image: torch.Tensor) -> torch.Tensor:
        if os.getpid() != parent:
            os._exit(1)
        return noisy(image)

    with pytest.raises(UserError, match=r"process that reads the data set ended .*num_workers"):
        fit(tmp_path / "run", Drawn(TRAIN.samples, dying), num_workers=1)


def elsewhere(code: str, run: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Runs lines of this module in another process."""
    code = f"from test_random_transforms import *\nrun = Path(sys.argv[1])\n{code}"
    command = [sys.executable, "-c", code, run, *map(str, arguments)]
    settings = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | settings,
        start_new_session=True,
    )


class Notes(Reporter):
    """Prints notes."""

    def noted(self, note: str) -> None:
        print(note)


class StopAt(Reporter):
    """Stops the process after a number of batches: kills it, or sends another signal to it and to
    the processes that read, as a terminal or a scheduler does."""

    def __init__(self, batches: int, number: int) -> None:
        self.left, self.number = batches, number

    def batch_finished(self, rows: int) -> None:
        self.left -= 1
        if self.left:
            return
        if self.number == signal.SIGKILL:
            os.kill(os.getpid(), self.number)
        else:
            os.killpg(0, self.number)


def fit_until_stopped(run: Path, batches: int, number: int) -> None:
    stop = StopAt(batches, number)
    fit(run, **RING, num_workers=2, checkpoint_minutes=0, reporter=stop)


@pytest.mark.parametrize(
    ("batches", "number"),
    [
        pytest.param(5, signal.SIGKILL, marks=pytest.mark.slow),
        (32, signal.SIGKILL),
        (5, signal.SIGINT),
        pytest.param(32, signal.SIGINT, marks=pytest.mark.slow),
        (5, signal.SIGTERM),
    ],
)
def test_a_stopped_run_resumes_at_once_to_the_same_bytes(
    finished: Path, tmp_path: Path, batches: int, number: int
) -> None:
    """Stops in an epoch of the first stage, and of the second, for which a view is drawn. The
    processes that read outlive one that was killed by some seconds."""
    run = tmp_path / "run"
    code = "fit_until_stopped(run, *map(int, sys.argv[2:]))"
    stopped = elsewhere(code, run, batches, int(number))
    if number == signal.SIGKILL:
        assert stopped.returncode == -number, stopped.stderr
    else:
        assert stopped.returncode != 0
        assert "Interrupted: interrupted in stage" in stopped.stderr
        assert "DataLoader" not in stopped.stderr
    fit(run, **RING, num_workers=1)
    assert content(run) == content(finished)


@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_view_is_computed_again(finished: Path, place: int) -> None:
    (shard,) = (finished / "stage1/activations.zarr/train/activations").glob(f"c.{place}.*")
    before = shard.read_bytes()
    shard.write_bytes(before[:100] + b"\0" + before[101:])
    trainer = new_trainer(finished, **RING, num_workers=2)
    with pytest.raises(UserError, match="reads its data set again in every pass.*fit"):
        trainer.repair([1])
    trainer.prepare(dataset_from_torch(TRAIN, TEST))
    (repair,), damages = trainer.repair([1])
    assert (repair.identical, damages) == (True, [])
    assert shard.read_bytes() == before


def test_a_stage_is_trained_again_to_the_same_weights(finished: Path) -> None:
    before = weights(finished, 2)
    trainer = new_trainer(finished, **RING)
    with pytest.raises(UserError, match="reads its data set again in every pass"):
        trainer.train_stage(2, again=True)
    trainer.prepare(dataset_from_torch(TRAIN, TEST))
    trainer.train_stage(2, again=True)
    trainer.train_stage(3, again=True)
    assert same(before, weights(finished, 2))


def test_a_stage_that_trains_from_a_store_alone_needs_no_data_set(tmp_path: Path) -> None:
    fit(tmp_path / "run", epochs=1)
    before = weights(tmp_path / "run", 3)
    new_trainer(tmp_path / "run", epochs=1).train_stage(3, again=True)
    assert same(before, weights(tmp_path / "run", 3))


@pytest.mark.parametrize(
    "settings",
    [{"views": "live"}, {"strategy": "joint"}, {"patience": 1}, {"augmentation": "crop4"}],
    ids=lambda settings: str(*settings.values()),
)
def test_every_way_of_training_repeats(tmp_path: Path, settings: dict) -> None:
    for workers in (0, 2):
        fit(tmp_path / str(workers), epochs=2, num_workers=workers, **settings)
    assert content(tmp_path / "0") == content(tmp_path / "2")
    assert learned(tmp_path / "0", 1)


def test_another_data_set_is_refused(finished: Path) -> None:
    other = Drawn(TRAIN.samples, CROPPED)
    with pytest.raises(UserError, match="other data than .* images of the train split"):
        fit(finished, other, **RING)


def test_a_set_that_cannot_be_sent_is_read_by_the_process_that_trains(tmp_path: Path) -> None:
    """Where processes are not forked, as on macOS and since Python 3.14."""
    done = elsewhere(
        "import multiprocessing\n"
        "multiprocessing.set_start_method('spawn')\n"
        "own = Drawn(TRAIN.samples, lambda image: ALL(image))\n"
        "fit(run, own, epochs=1, views=1, reporter=Notes())",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be sent to others") == 1
    fit(tmp_path / "other", epochs=1, views=1)
    assert content(tmp_path / "run") == content(tmp_path / "other")
