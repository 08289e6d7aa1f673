"""Samples of Python data sets: image and label, the axis of channels, random transforms."""

import io
import random
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import greedy
from PIL import Image
from small_training import network, new_trainer
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)
from torchvision import transforms

from greedy.base.errors import UserError
from greedy.data import dataset_from_torch

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8)
Pair = namedtuple("Pair", ["label", "weight", "img"])


@dataclass
class Record:
    pixel_values: np.ndarray
    labels: int


def read(image) -> np.ndarray:
    rows = [(image, 0), (image, 1)]
    return dataset_from_torch(rows, rows).train.read(np.array([0]))[0][0]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.uint16])
def test_an_array_is_read_with_its_channels_where_its_shape_says(channels, dtype):
    last = RNG.integers(0, 256, (5, 6, channels)).astype(dtype)
    expected = last.transpose(2, 0, 1)
    assert np.array_equal(read(last), expected)
    assert np.array_equal(read(np.ascontiguousarray(expected)), expected)
    assert np.array_equal(read(torch.from_numpy(np.ascontiguousarray(expected))), expected)


def test_tensors_of_features_may_have_few_rows_and_columns():
    for shape in ((64, 1, 1), (64, 4, 4), (3, 5, 3), (2, 5, 7)):
        assert read(torch.rand(shape)).shape == shape


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (np.zeros((3, 32, 3), np.uint8), "leaves open where its channels are"),
        (np.zeros((5, 32, 32), np.uint8), "leaves open where its channels are"),
        (np.zeros((64, 4, 4), np.float32), "leaves open where its channels are"),
        (torch.zeros(32, 32, 3, dtype=torch.uint8), r"permute\(2, 0, 1\)"),
        (np.zeros(8, np.uint8), "vector of floats"),
        (np.zeros((0, 8), np.uint8), "is empty"),
        (np.zeros((8, 8), np.int32), "int32, which leaves open what black and white are"),
        (np.zeros((8, 8), complex), "complex128"),
        (None, "is of type NoneType: give a PIL image"),
        ("a.png", "is of type str: give a PIL image"),
        ([[0.0, 1.0], [2.0]], "is of type list: give a PIL image"),
    ],
)
def test_what_is_no_image_or_may_be_read_in_two_ways_is_refused(image, problem):
    with pytest.raises(UserError, match=f"sample 0 of python train .*{problem}"):
        read(image)


def test_values_of_every_type_are_taken_as_meant():
    mask = np.array([[True, False], [False, True]])
    assert read(mask).tolist() == [[[255, 0], [0, 255]]]
    assert read(np.full((2, 2), 4095, np.uint16)).tolist() == [[[4095, 4095]] * 2]
    assert read(np.full((2, 2), -1000, np.int16)).tolist() == [[[-1000, -1000]] * 2]
    assert read(np.full((2, 2), 0.5, np.float16)).dtype == np.float32


def test_values_that_are_not_finite_are_named_with_their_samples():
    images = [np.full((2, 2), value, np.float64) for value in (0, np.nan, 1, 1e300)]
    data = dataset_from_torch([(image, i % 2) for i, image in enumerate(images)], [(images[0], 0)])
    with pytest.raises(UserError, match=r"python train .* 2 of 4 samples looked at \(1, 3\)"):
        data.train.read(np.array([3, 0, 1, 2]))


@pytest.mark.parametrize(
    "sample",
    [
        {"image": IMAGE, "label": 1, "file": "a.png"},
        {"img": IMAGE, "fine_label": 1, "coarse_label": 7},
        {"pixel_values": IMAGE, "labels": 1},
        [IMAGE, 1],
        Pair(1, 0.5, IMAGE),
        Record(IMAGE, 1),
    ],
    ids=["image", "img", "pixel_values", "list", "named tuple", "dataclass"],
)
def test_image_and_label_are_found_by_name(sample):
    images, labels = dataset_from_torch([sample], [sample]).train.read(np.array([0]))
    assert np.array_equal(images[0], IMAGE.transpose(2, 0, 1))
    assert labels.tolist() == [1]


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        ((IMAGE, 1, 0), r"3 items \(ndarray, int, int\)"),
        ({"image": IMAGE, "target": 1}, "keys 'image', 'target'"),
        ({"image": IMAGE, "img": IMAGE, "label": 1}, "keys 'image', 'img', 'label'"),
        (IMAGE, "of type ndarray and no pair"),
    ],
)
def test_other_samples_are_answered_with_what_they_hold(sample, problem):
    with pytest.raises(UserError, match=f"sample 0 of python train .*{problem}"):
        dataset_from_torch([sample], [sample])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(IMAGE, 0)])

    def __len__(self):
        return 1


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        (Stream(), "no map-style data set but a Stream"),
        ((pair for pair in [(IMAGE, 0)]), "no map-style data set but a generator"),
        (DataLoader([(IMAGE, 0)]), "is a DataLoader: give the data set"),
        ({"train": [], "test": []}, "dictionary of 'train', 'test'"),
        (np.zeros((9, 8, 8)), r"TensorDataset\(images, labels\)"),
        ((np.zeros((9, 8, 8)), np.zeros(9)), r"TensorDataset\(images, labels\)"),
        ("photos/train", "is a text"),
        (Stream, "is the class Stream"),
        ([], "is empty"),
    ],
)
def test_what_is_no_map_style_set_is_told_so(tmp_path, samples, problem):
    with pytest.raises(UserError, match=f"python train .*{problem}"):
        new_trainer(tmp_path / "run").fit(samples, [(IMAGE, 0)])
    assert not (tmp_path / "run").exists()


class Photos(Dataset):
    """Images of noise under a transform."""

    def __init__(self, transform, rows: int = 40) -> None:
        pixels = np.random.default_rng(1).integers(0, 256, (rows, 8, 8), dtype=np.uint8)
        self.images = [Image.fromarray(each) for each in pixels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), index % 3


FLIP = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
PLAIN = transforms.Compose([transforms.PILToTensor()])


@pytest.mark.parametrize(
    "train",
    [
        Photos(FLIP),
        Subset(Photos(FLIP), range(0, 40, 2)),
        ConcatDataset([Photos(FLIP), Photos(FLIP)]),
    ],
    ids=["own", "subset", "joined"],
)
def test_random_transforms_are_found(tmp_path, train):
    data = new_trainer(tmp_path / "run").prepare(dataset_from_torch(train, Photos(PLAIN)))
    assert data.data_choices.fresh


def test_a_random_test_set_is_refused_by_name_before_anything_is_written(tmp_path):
    problem = r"python test changes .*once.*RandomHorizontalFlip, PILToTensor"
    with pytest.raises(UserError, match=problem):
        new_trainer(tmp_path / "run").fit(Photos(PLAIN), Photos(FLIP, 2))
    assert not (tmp_path / "run").exists()


def test_looking_for_random_transforms_draws_nothing_from_the_global_generators(tmp_path):
    data = dataset_from_torch(Photos(FLIP), Photos(PLAIN))

    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    asked = new_trainer(tmp_path / "run", network(), num_workers=0)
    before = states()
    asked.prepare(data)
    assert states() == before


PHOTOS = """
import sys
sys.path.insert(0, {folder!r})
from {module} import Photos, FLIP, PLAIN

def sets():
    return Photos(FLIP), Photos(PLAIN)

def needs(root):
    return root
"""


def test_the_command_line_reads_a_named_set_in_every_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PHOTOS.format(folder=str(Path(__file__).parent), module=Path(__file__).stem)
    (tmp_path / "random_photos.py").write_text(text)
    base = ("train", "--recipe", "mnist/mlp-predsim", "--run", tmp_path / "run", "--set")
    short = ("training.epochs=1", "--set", "model.hidden_layers=1", "--set", "model.hidden_width=8")
    asked = (*base, *short, "--views", 2, "--data", "random_photos:sets")
    assert greedy(*asked).exit_code == 0
    first = (tmp_path / "run/stage1/encoder.safetensors").read_bytes()
    assert greedy("train", "--run", tmp_path / "run").exit_code == 0  # nothing is left to do
    again = ("train", "--run", tmp_path / "run", "--retrain")
    assert "add --data random_photos:sets" in greedy(*again).output
    one = ("train-stage", "--stage", 1, "--from-cache", tmp_path / "run/stage0", "--retrain")
    assert "add --data with the module:function" in greedy(*one).output
    for command in (again, one):
        done = greedy(*command, "--data", "random_photos:sets")
        assert done.exit_code == 0, done.output
        assert (tmp_path / "run/stage1/encoder.safetensors").read_bytes() == first
    view = tmp_path / "run/stage1/activations.zarr/train/activations/c.1.0.0"
    view.write_bytes(view.read_bytes()[:-1])
    repair = ("cache", "repair", tmp_path / "run")
    assert "add --data with the module:function" in greedy(*repair).output
    assert "as before" in greedy(*repair, "--data", "random_photos:sets").output
    elsewhere = ("--data", "random_photos:needs", "--run", tmp_path / "other")
    needing = greedy(*base, *short, *elsewhere)
    assert "random_photos:needs needs arguments" in needing.output


@pytest.fixture(scope="module")
def hugging_face():
    """Returns a Hugging Face data set in memory: images (8, 8, 3) and two classes."""
    datasets = pytest.importorskip("datasets", reason="the extra `test` holds datasets")
    pixels = np.random.default_rng(2).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    columns = {"image": [Image.fromarray(each) for each in pixels], "label": [0, 1] * 6}
    return datasets.Dataset.from_dict(columns, features=features), pixels.transpose(0, 3, 1, 2)


def test_generators_that_a_transform_reaches_by_name_are_seeded(hugging_face):
    own = np.random.default_rng()

    def noisy(rows):
        noise = [own.integers(0, 9, (8, 8, 3), np.uint8) for _ in rows["image"]]
        images = [
            np.asarray(image) // 2 + part for image, part in zip(rows["image"], noise, strict=True)
        ]
        return {"image": images, "label": rows["label"]}

    rows, _ = hugging_face
    train = dataset_from_torch(rows.with_transform(noisy), rows.select([3, 2])).train
    again, other = (train.view(0, n).read(np.arange(5))[0] for n in (1, 2))
    assert np.array_equal(train.view(0, 1).read(np.arange(5))[0], again)
    assert not np.array_equal(again, other)


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_a_data_set_of_hugging_face_in_every_format(hugging_face, kind):
    rows, pixels = hugging_face
    data = dataset_from_torch(rows.with_format(kind), rows.select([3, 2]).with_format(kind))
    assert data.class_names == ["cat", "dog"]
    images, labels = data.train.read(np.arange(12))
    assert np.array_equal(images, pixels)
    assert labels.tolist() == [0, 1] * 6
    assert data.test.read(np.arange(2))[1].tolist() == [1, 0]


def test_a_data_set_of_hugging_face_trains_and_keeps_its_names(hugging_face, tmp_path):
    rows, _ = hugging_face
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2))
    records = new_trainer(tmp_path / "run", model, epochs=1).fit(rows, rows.select(range(4)))
    assert records[-1].class_names == ["cat", "dog"]


def test_other_things_of_hugging_face_are_told_what_to_do(hugging_face):
    import datasets

    rows, _ = hugging_face
    both = datasets.DatasetDict({"train": rows, "test": rows})
    with pytest.raises(UserError, match="python train is a dictionary of 'train', 'test'"):
        dataset_from_torch(both, rows)
    with pytest.raises(UserError, match="no map-style data set but an IterableDataset"):
        dataset_from_torch(rows.to_iterable_dataset(), rows)
    renamed = rows.rename_column("label", "animal")
    with pytest.raises(UserError, match="keys 'image', 'animal'"):
        dataset_from_torch(renamed, renamed)
    unlabelled = rows.map(lambda row: {"label": -1})
    with pytest.raises(UserError, match="12 labels of python train .*leave out images without"):
        dataset_from_torch(unlabelled, rows)


def test_a_sample_that_cannot_be_read_is_named(tmp_path):
    class Files(TensorDataset):
        def __getitem__(self, index):
            if index == 9:
                raise OSError("image file is truncated")
            return super().__getitem__(index)

    samples = Files(torch.zeros(12, 1, 8, 8), torch.arange(12) % 3)
    with pytest.raises(UserError, match="sample 9 of .*train cannot be read .*file is truncated"):
        new_trainer(tmp_path / "run").fit(samples, samples)


def test_a_picture_that_is_decoded_late_and_damaged_is_named():
    whole, cut = io.BytesIO(), io.BytesIO()
    Image.effect_noise((32, 32), 80).save(whole, "PNG")
    cut.write(whole.getvalue()[:500])
    rows = [(Image.open(file), label) for label, file in enumerate((whole, cut))]
    data = dataset_from_torch(rows, rows[:1])
    with pytest.raises(UserError, match="image of sample 1 of python train cannot be read .*OSErr"):
        data.train.read(np.arange(2))
