"""Data sets given in Python: map-style sets and functions that return them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from greedy.base.errors import UserError
from greedy.data import dataset_from_torch, load_dataset

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (10, 12), dtype=np.uint8)
RGB = RNG.integers(0, 256, (3, 10, 12), dtype=np.uint8)
RGB_IMAGE = Image.fromarray(RGB.transpose(1, 2, 0))


def one(image, label=0):
    return dataset_from_torch([(image, label)], [(image, label)])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY), GREY[None]),
        (RGB_IMAGE, RGB),
        (RGB_IMAGE.convert("RGBA"), RGB),
        (GREY, GREY[None]),
        (torch.from_numpy(RGB), RGB),
        (torch.from_numpy(RGB).double() / 255, (RGB / 255).astype(np.float32)),
        (torch.linspace(-3, 3, 5), np.linspace(-3, 3, 5, dtype=np.float32)[:, None, None]),
        (np.full((4, 4), 300, ">u2"), np.full((1, 4, 4), 300, np.float32)),
        (torch.ones(2, 4, 4, dtype=torch.bfloat16), np.ones((2, 4, 4), np.float32)),
    ],
    ids=["grey", "rgb", "rgba", "array", "uint8", "double", "vector", "big-endian", "bfloat16"],
)
def test_images_of_every_kind(image, expected):
    data = one(image)
    images, labels = data.test.read(np.array([0, 0]))
    assert data.train.shape == expected.shape
    assert images.dtype == data.train.dtype == expected.dtype
    np.testing.assert_allclose(images, np.stack((expected, expected)), rtol=1e-6)
    assert labels.tolist() == [0, 0]


def test_tensor_dataset_in_any_order():
    images, labels = torch.rand(20, 3, 4, 4), torch.arange(20) % 7
    data = dataset_from_torch(TensorDataset(images, labels), TensorDataset(images[:5], labels[:5]))
    assert (data.name, len(data.train), len(data.test)) == ("python", 20, 5)
    assert data.class_names is None
    order = RNG.permutation(20)
    read, classes = data.train.read(order)
    assert np.array_equal(read, images.numpy()[order])
    assert np.array_equal(classes, labels.numpy()[order])
    assert classes.dtype == np.int64


def test_class_names_come_from_the_training_set():
    class Named(list):
        classes = ("cat", "dog")

    data = dataset_from_torch(Named([(GREY, 1)]), [(GREY, 0)], name="pets")
    assert data.class_names == ["cat", "dog"]
    assert data.name == "pets"


@pytest.mark.parametrize("label", [np.int32(3), torch.tensor(3), torch.tensor([3])])
def test_labels_of_every_kind(label):
    assert one(GREY, label).train.read(np.array([0]))[1].tolist() == [3]


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        ((GREY, 0.5), "sample . has 0.5; a label is the number"),
        ((GREY, -1), "sample . has -1; number the classes from 0"),
        ((GREY, torch.tensor([0, 1])), "has 2 values; .* position of the 1"),
        ((GREY.astype(np.int64), 0), "int64, .* convert it to uint8"),
        ((torch.zeros(1, 3, 4, 4), 0), r"\(C, H, W\)"),
        ((GREY, 0, 0), "pair"),
        (GREY, "pair"),
        ({"picture": GREY, "label": 0}, "keys 'picture', 'label'"),
    ],
)
def test_other_samples_are_named(sample, problem):
    good = (GREY, 0)
    with pytest.raises(UserError, match=problem):
        dataset_from_torch([sample], [sample])
    if not isinstance(sample, tuple) or sample[0] is GREY:
        data = dataset_from_torch([good, sample], [good])
        with pytest.raises(UserError, match=f"(sample 1 of )?python train.*{problem}"):
            data.train.read(np.array([0, 1]))


def test_shapes_must_agree():
    with pytest.raises(UserError, match="make them alike"):
        dataset_from_torch([(GREY, 0)], [(GREY[1:], 0)])
    data = dataset_from_torch([(GREY, 0), (GREY[1:], 0)], [(GREY, 0)])
    with pytest.raises(UserError, match=r"sample 1 of .*\(1, 9, 12\).*\(1, 10, 12\)"):
        data.train.read(np.array([1]))


def test_only_map_style_sets_with_samples():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(GREY, 0)])

    with pytest.raises(UserError, match="map-style"):
        dataset_from_torch([(GREY, 0)], Stream())
    with pytest.raises(UserError, match="python test is empty"):
        dataset_from_torch([(GREY, 0)], [])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Enters a directory for the test; afterwards it is no longer importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    return tmp_path


def test_function_of_the_current_directory(here):
    (here / "my_sets_a.py").write_text(
        "import numpy as np\n"
        "def sets():\n"
        "    rows = [(np.full((4, 4), i, np.uint8), i % 2) for i in range(6)]\n"
        "    return rows, rows[:2]\n"
    )
    data = load_dataset("my_sets_a:sets", allow_function=True)
    images, labels = data.train.read(np.array([5, 2]))
    assert images[:, 0, 0, 0].tolist() == [5, 2]
    assert labels.tolist() == [1, 0]
    assert data.name == "my_sets_a:sets"


def test_function_is_not_even_imported_unless_allowed(here):
    (here / "my_sets_b.py").write_text("open('imported', 'w').close()\n")
    with pytest.raises(UserError, match="--data my_sets_b:sets"):
        load_dataset("my_sets_b:sets")
    assert not (here / "imported").exists()


def test_functions_that_do_not_serve(here):
    (here / "my_sets_c.py").write_text("number = 3\ndef single():\n    return [1]\n")
    for name, problem in {
        "no_such_module_c:sets": "cannot import",
        "my_sets_c:sets": "define sets",
        "my_sets_c:number": "not a function",
        "my_sets_c:single": "two map-style data sets",
    }.items():
        with pytest.raises(UserError, match=problem):
            load_dataset(name, allow_function=True)
