"""Class names and labels of Python data sets: matched by name where both sets have names, checked
as numbers otherwise."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import answer
from PIL import Image
from small_training import network, new_trainer
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split
from torchvision import transforms
from torchvision.datasets import ImageFolder

from greedy.base.errors import UserError
from greedy.data import dataset_from_torch

SHADES = {"a": 10, "b": 120, "c": 240}


def folder(root: Path, classes: str, each: int = 2) -> Path:
    for name in classes:
        for i in range(each):
            file = root / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), SHADES[name]).save(file)
    return root


def images(root: Path, classes: str, **options) -> ImageFolder:
    return ImageFolder(folder(root, classes), **options)


def read(split) -> list[tuple[int, int]]:
    """Returns the shade and the label of every sample."""
    pixels, labels = split.read(np.arange(len(split)))
    return [(int(p[0, 0, 0]), int(label)) for p, label in zip(pixels, labels, strict=True)]


class Wrapper(Dataset):
    """Wraps another set's samples."""

    def __init__(self, dataset, label=lambda label: label, classes=None) -> None:
        self.dataset, self.label = dataset, label
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        image, label = self.dataset[index]
        return image, self.label(label)


class Renamed(Wrapper):
    """Holds a set under another attribute than ``dataset``, as many tutorials do."""

    def __init__(self, subset) -> None:
        self.subset = subset

    def __getitem__(self, index: int):
        return self.subset[index]

    def __len__(self) -> int:
        return len(self.subset)


def halves(samples):
    return random_split(samples, [0.5, 0.5], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "reached",
    [
        lambda s: s,
        lambda s: Subset(s, range(len(s) - 1, -1, -1)),
        lambda s: ConcatDataset(halves(s)),
        lambda s: Wrapper(Subset(s, range(len(s)))),
        lambda s: Renamed(Subset(s, range(len(s)))),
    ],
    ids=["itself", "subset", "random_split and joined", "wrapper", "wrapper of another name"],
)
def test_labels_of_a_test_set_that_lacks_a_class_are_mapped_by_name(tmp_path, reached):
    train, test = images(tmp_path / "train", "abc"), images(tmp_path / "test", "bc")
    data = dataset_from_torch(reached(train), reached(test))
    assert data.class_names == ["a", "b", "c"]
    assert sorted(set(read(data.train))) == [(10, 0), (120, 1), (240, 2)]
    assert sorted(set(read(data.test))) == [(120, 1), (240, 2)]


def test_parts_that_number_their_classes_differently_are_mapped_each(tmp_path):
    parts = [images(tmp_path / str(i), names) for i, names in enumerate(("ab", "bc", "ac"))]
    rows = [0, 5, 8, 11, 3]
    data = dataset_from_torch(ConcatDataset(parts), Subset(ConcatDataset(parts), rows))
    assert data.class_names == ["a", "b", "c"]
    expected = {(10, 0), (120, 1), (240, 2)}
    assert set(read(data.train)) == set(read(data.test)) == expected


def test_parts_are_mapped_each_in_a_wrapper_too(tmp_path):
    ab, bc = (images(tmp_path / names, names) for names in ("ab", "bc"))
    data = dataset_from_torch(Wrapper(ConcatDataset([ab, Wrapper(bc)])), Wrapper(bc))
    assert data.class_names == ["a", "b", "c"]
    assert set(read(data.train)) == {(10, 0), (120, 1), (240, 2)}


class Kept(Wrapper):
    """The samples with some of the labels, renumbered."""

    def __init__(self, dataset, *labels: int) -> None:
        super().__init__(dataset, labels.index)
        self.rows = [row for row, (_, label) in enumerate(dataset) if label in labels]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return super().__getitem__(self.rows[index])


def test_names_do_not_apply_to_labels_that_a_wrapper_renumbers(tmp_path):
    train, test = images(tmp_path / "train", "abc"), images(tmp_path / "test", "bc")
    wrapped = Kept(train, 1, 2)
    assert dataset_from_torch(wrapped, wrapped).class_names is None
    for reached in (wrapped, ConcatDataset([wrapped]), Subset(wrapped, range(len(wrapped)))):
        with pytest.raises(UserError, match="number their classes differently.*give both an"):
            dataset_from_torch(reached, test)
    wrapped.classes = ["b", "c"]
    data = dataset_from_torch(wrapped, test)
    assert data.class_names == ["b", "c"]
    assert set(read(data.train)) == set(read(data.test)) == {(120, 0), (240, 1)}
    turned = Wrapper(train, lambda label: 2 - label)
    turned.targets = [2 - label for label in train.targets]
    assert dataset_from_torch(turned, turned).class_names is None


def test_a_class_that_training_lacks_is_refused_by_name(tmp_path):
    train, test = images(tmp_path / "train", "ab"), images(tmp_path / "test", "bc")
    with pytest.raises(UserError, match="python test has classes that python train lacks: 'c'"):
        dataset_from_torch(train, test)


class Named(list):
    def __init__(self, labels, **attributes) -> None:
        super().__init__((np.full((4, 4), 10 * label, np.uint8), label) for label in labels)
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("train", "test", "names", "labels"),
    [
        ({"classes": ["cat", "dog"]}, {"classes": ("dog", "cat")}, ["cat", "dog"], [1, 0]),
        ({"classes": ["cat", "dog"]}, {}, ["cat", "dog"], [0, 1]),
        ({}, {"classes": ["cat", "dog"]}, ["cat", "dog"], [0, 1]),
        ({"class_to_idx": {"dog": 1, "cat": 0}}, {}, ["cat", "dog"], [0, 1]),
        ({"classes": [("cat", "tom"), "dog"]}, {}, ["cat, tom", "dog"], [0, 1]),
        ({}, {}, None, [0, 1]),
    ],
)
def test_names_of_either_set(train, test, names, labels):
    data = dataset_from_torch(Named([0, 1], **train), Named([0, 1], **test))
    assert data.class_names == names
    assert data.test.read(np.arange(2))[1].tolist() == labels


def test_labels_may_have_gaps_where_class_to_idx_says_so():
    data = dataset_from_torch(Named([7, 3], class_to_idx={"dog": 7, "cat": 3}), Named([3, 7]))
    assert data.class_names == ["cat", "dog"]
    assert data.train.read(np.arange(2))[1].tolist() == [1, 0]
    assert data.test.read(np.arange(2))[1].tolist() == [0, 1]


def test_names_that_differ_in_unicode_normalisation_are_one_class():
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    data = dataset_from_torch(
        Named([0, 1, 2], classes=[composed, "tea", decomposed]),
        Named([0, 1], classes=["tea", decomposed]),
    )
    assert data.class_names == [composed, "tea"]
    assert data.train.read(np.arange(3))[1].tolist() == [0, 1, 0]
    assert data.test.read(np.arange(2))[1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        (["crane", "crane"], "both class 0 and class 1 'crane'"),
        (2, "no list of names"),
        ({"cat", "dog"}, "no list of names"),  # whose order is another in each process
        ({1: "dog", 0: "cat"}, "no list of names"),
        ((each for each in ("cat", "dog")), "no list of names"),
    ],
)
def test_names_that_name_nothing_are_refused(classes, problem):
    with pytest.raises(UserError, match=f"python train .*{problem}"):
        dataset_from_torch(Named([0, 1], classes=classes), Named([0, 1]))


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ([], None),
        ([b"cat", b"dog"], ["cat", "dog"]),
        ([["cat", "tom"], ("dog",)], ["cat, tom", "dog"]),
        (np.array(["cat", "dog"]), ["cat", "dog"]),
        ({"cat": 0, "dog": 1}.keys(), ["cat", "dog"]),
    ],
)
def test_names_in_lists_of_every_kind(classes, names):
    named = Named([0, 1], classes=classes)
    assert dataset_from_torch(named, named).class_names == names


@pytest.mark.parametrize("numbers", [{0: "cat", 1: "dog"}, {"cat": None}])
def test_invalid_numbers_of_classes_are_refused(numbers):
    with pytest.raises(UserError, match="`class_to_idx` that does not lead from names to numbers"):
        dataset_from_torch(Named([0, 1], class_to_idx=numbers), Named([0, 1]))


def test_an_error_while_classes_are_read_is_reported():
    class Lazy(Named):
        @property
        def classes(self):
            raise OSError("no index")

    class Endless(Named):
        def __len__(self):
            raise OSError("no list")

    with pytest.raises(UserError, match="classes and labels of python train .*no index"):
        dataset_from_torch(Lazy([0, 1]), Named([0, 1]))
    with pytest.raises(UserError, match="the length of python train .*no list"):
        dataset_from_torch(Endless([0, 1]), Named([0, 1]))


def test_a_part_without_names_beside_parts_that_differ_is_refused(tmp_path):
    train = ConcatDataset([images(tmp_path / "ab", "ab"), images(tmp_path / "bc", "bc")])
    with pytest.raises(UserError, match="python test, or a part of it, names no classes"):
        dataset_from_torch(train, [(np.zeros((3, 8, 8), np.uint8), 0)])


def test_labels_that_a_transform_changes_do_not_take_the_names_of_others(tmp_path):
    turned = {"target_transform": lambda label: 2 - label}
    train = images(tmp_path / "train", "abc", **turned)
    data = dataset_from_torch(train, train)
    assert data.class_names is None
    assert set(read(data.train)) == {(10, 2), (120, 1), (240, 0)}
    named = dataset_from_torch(*[Wrapper(train, classes=["z", "y", "x"])] * 2)
    assert named.class_names == ["z", "y", "x"]
    with pytest.raises(UserError, match="leave out what changes labels"):
        dataset_from_torch(train, images(tmp_path / "test", "bc"))


def test_names_reach_the_run_and_what_is_shown_of_it(tmp_path):
    grey = transforms.Compose([transforms.Grayscale(), transforms.PILToTensor()])
    train = images(tmp_path / "train", "abc", transform=grey)
    test = images(tmp_path / "test", "cb", transform=grey)
    new_trainer(tmp_path / "run", network(), epochs=1).fit(train, Subset(test, range(4)))
    answered = answer(
        "predict", "--run", tmp_path / "run", tmp_path / "test/b/0.png", "--top", 3,
        "--model", "small_training:network",
    )  # fmt: skip
    assert sorted(each["class"] for each in answered["predictions"][0]["classes"]) == [
        "a",
        "b",
        "c",
    ]


class Unread(TensorDataset):
    """Counts reads and fails after a few."""

    def __getitem__(self, index: int):
        self.read = getattr(self, "read", 0) + 1
        assert self.read < 30, "images are decoded before labels are checked"
        return super().__getitem__(index)


def labelled(labels) -> Unread:
    labels = torch.as_tensor(labels)
    return Unread(torch.zeros(len(labels), 4, 4, dtype=torch.uint8), labels)


GOOD = [0, 1, 2] * 40


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([0, 1, 900] * 40, "is 900 and there are 120 training images"),
        ([0, 1] * 60, "no training label of python is 2, and test labels are"),
        ([1, 2, 3] * 40, "no training label of python is 0, and test labels are"),
        ([0] * 120, "all 120 training images .* of class '0'"),
        ([-1, 1, 2] * 40, r"40 labels .*sample 0 has -1, sample 3 has -1, .*, …; .*from 0"),
        ([0.0, 1.0, 2.0] * 40, "120 labels .*sample 0 has 0.0.* integer 0, as int"),
        ([0.5, 1.0, 2.0] * 40, "120 labels .*sample 0 has 0.5.*not a measurement"),
        (np.eye(3)[GOOD], r"120 labels .* has 3 values.*label\.argmax\(\)"),
        (np.ones((120, 3)), "120 labels .*an image has one class"),
    ],
)
def test_wrong_labels_are_all_found_before_images_are_read(tmp_path, labels, problem):
    train, test = labelled(labels), labelled(GOOD)
    with pytest.raises(UserError, match=problem):
        new_trainer(tmp_path / "run").fit(train, test)
    assert not (tmp_path / "run").exists()


def test_labels_that_both_sets_count_from_1(tmp_path):
    train, test = labelled([1, 2, 3] * 40), labelled([2, 3])
    with pytest.raises(UserError, match="labels of python run from 1 to 3: .*label - 1"):
        new_trainer(tmp_path / "run").fit(train, test)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ("cat", "'cat', .*; number the classes"),
        (None, "None, .*; give each image"),
        (np.float64(2), "2.0, .*; give the integer 2"),
        ([0, 1, 0], "3 values, .*position of the 1"),
        (10**12, "1000000000000, .*; number the classes from 0, one after the other"),
    ],
)
def test_labels_that_are_known_only_when_read_are_named(label, problem):
    rows = [(np.zeros((4, 4), np.uint8), each) for each in (0, 1, label, label)]
    data = dataset_from_torch(rows, rows)
    with pytest.raises(UserError, match=f"2 labels of python train .*sample 2 has {problem}"):
        data.train.read(np.arange(4))


@pytest.mark.parametrize(
    "one", [True, np.bool_(True), np.array(1), np.array([1]), torch.tensor(1), torch.tensor([1])]
)
def test_labels_with_one_meaning_are_taken(one):
    rows = [(np.zeros((4, 4), np.uint8), one)]
    assert dataset_from_torch(rows, rows).train.read(np.array([0]))[1].tolist() == [1]


def test_labels_beyond_the_names_are_refused_with_the_names():
    with pytest.raises(UserError, match=r"sample 2 has 2; the classes are 0 to 1 \(cat, dog\)"):
        dataset_from_torch(Named([0, 1, 2], classes=["cat", "dog"]), Named([0])).train.read(
            np.arange(3)
        )
    with pytest.raises(UserError, match="run from 1 to 2 and classes from 0: subtract 1"):
        dataset_from_torch(Named([1, 2], classes=["cat", "dog"], targets=[1, 2]), Named([0]))


def test_stored_labels_that_samples_contradict_are_ignored():
    train = Named([0, 1, 2], targets=[1, 2, 3])
    assert dataset_from_torch(train, train).train.read(np.arange(3))[1].tolist() == [0, 1, 2]
    never_filled = Named([0, 1, 2], targets=[0, 0, 0])
    assert dataset_from_torch(never_filled, train).train.read(np.arange(3))[1].tolist() == [0, 1, 2]


def test_classes_without_training_images_are_kept_where_they_are_named():
    train = Named([0, 2], classes=["a", "b", "c"], targets=[0, 2])
    assert dataset_from_torch(train, train).class_names == ["a", "b", "c"]


def test_stage_0_refuses_labels_that_only_reading_shows(tmp_path):
    images = [np.full((8, 8), shade, np.uint8) for shade in range(6)]
    train = list(zip(images, [1, 2, 3] * 2, strict=True))
    with pytest.raises(UserError, match="labels of python run from 1 to 3: number the classes"):
        new_trainer(tmp_path / "run").fit(train, train)
