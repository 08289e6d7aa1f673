"""Named data sets: the sample that ships, and small files in torchvision's formats."""

import gzip
import hashlib
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from greedy.base.errors import UserError
from greedy.data import DATASETS, Dataset, is_available, load_dataset, vision

RNG = np.random.default_rng(0)


def random_bytes(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def read_all(split):
    """Reads all rows in reverse and returns them in order."""
    images, labels = split.read(np.arange(len(split))[::-1])
    assert images.flags.c_contiguous
    assert labels.dtype == np.int64
    return images[::-1], labels[::-1]


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_mnist(folder: Path, suffix: str = ""):
    arrays = {
        "train-images-idx3-ubyte": random_bytes(7, 28, 28),
        "train-labels-idx1-ubyte": np.arange(7, dtype=np.uint8),
        "t10k-images-idx3-ubyte": random_bytes(3, 28, 28),
        "t10k-labels-idx1-ubyte": np.array([9, 0, 4], dtype=np.uint8),
    }
    for name, array in arrays.items():
        write_idx(folder / f"{name}{suffix}", array)
    return list(arrays.values())


@pytest.fixture
def no_debian_package(monkeypatch, tmp_path):
    monkeypatch.setattr(vision, "DEBIAN_FASHION_MNIST", tmp_path / "debian")


def test_sample_is_stratified_and_whole():
    data = load_dataset("fashion-mnist-sample")
    assert data.class_names[0] == "T-shirt/top"
    for split, per_class in ((data.train, 500), (data.test, 100)):
        assert split.shape == (1, 28, 28)
        assert split.dtype == np.uint8
        images, labels = read_all(split)
        assert images.shape == (10 * per_class, 1, 28, 28)
        assert np.bincount(labels).tolist() == [per_class] * 10
        # Drawn without replacement; the original itself repeats few images.
        assert len({image.tobytes() for image in images}) > 0.99 * len(images)
    mean = read_all(data.train)[0].mean() / 255
    assert mean == pytest.approx(0.286, abs=0.005)  # the whole training split's


def test_sample_rows_come_in_the_order_asked_for():
    train = load_dataset("fashion-mnist-sample").train
    images, labels = train.read(np.arange(100))
    order = RNG.permutation(100)
    permuted_images, permuted_labels = train.read(order)
    assert np.array_equal(permuted_images, images[order])
    assert np.array_equal(permuted_labels, labels[order])


@pytest.mark.parametrize(
    ("name", "folder", "first_class"),
    [
        ("mnist", "MNIST/raw", "0 - zero"),
        ("kmnist", "KMNIST/raw", "o"),
        ("fashion-mnist", "FashionMNIST/raw", "T-shirt/top"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.usefixtures("no_debian_package")
def test_mnist_and_its_successors(tmp_path, name, folder, first_class, suffix):
    assert not is_available(name, tmp_path)
    train, labels, test, test_labels = write_mnist(tmp_path / folder, suffix)
    assert is_available(name, tmp_path)
    data = load_dataset(name, data_dir=tmp_path)
    assert np.array_equal(read_all(data.train)[0], train[:, None])
    assert np.array_equal(read_all(data.train)[1], labels)
    assert np.array_equal(read_all(data.test)[0], test[:, None])
    assert np.array_equal(read_all(data.test)[1], test_labels)
    assert data.class_names[0] == first_class


@pytest.mark.usefixtures("no_debian_package")
def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path):
    train, *_ = write_mnist(tmp_path / "debian", ".gz")
    data = load_dataset("fashion-mnist", data_dir=tmp_path / "empty")
    assert np.array_equal(read_all(data.train)[0], train[:, None])


@pytest.mark.parametrize("damage", ["cut short", "pixels missing", "not gzip", "not IDX"])
def test_damaged_idx_file_is_named(tmp_path, damage):
    write_mnist(tmp_path / "MNIST/raw", ".gz")
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz"
    raw = file.read_bytes()
    damaged = {
        "cut short": raw[:-100],
        "pixels missing": gzip.compress(gzip.decompress(raw)[:-100]),
        "not gzip": raw[10:],
        "not IDX": gzip.compress(b"nothing"),
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        load_dataset("mnist", data_dir=tmp_path)


def write_pickle(path: Path, content) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return md5(path)


def write_cifar(root: Path, monkeypatch, name: str, key: str):
    """Writes archives of 4 rows each and gives torchvision their checksums."""
    import torchvision.datasets as tv

    kind = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
    folder, rows = root / kind.base_folder, {}
    for table in ("train_list", "test_list"):
        batches = []
        for file, _ in getattr(kind, table):
            content = {"data": random_bytes(4, 3072), key: RNG.integers(0, 10, 4).tolist()}
            batches.append([file, write_pickle(folder / file, content)])
            rows.setdefault(table, []).append(content)
        monkeypatch.setattr(kind, table, batches)
    classes = [f"class {i}" for i in range(10)]
    checksum = write_pickle(folder / kind.meta["filename"], {kind.meta["key"]: classes})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum})
    return rows


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar(tmp_path, monkeypatch, name, key):
    rows = write_cifar(tmp_path, monkeypatch, name, key)
    assert is_available(name, tmp_path)
    data = load_dataset(name, data_dir=tmp_path)
    assert data.class_names == [f"class {i}" for i in range(10)]
    for split, table in ((data.train, "train_list"), (data.test, "test_list")):
        images, labels = read_all(split)
        expected = np.concatenate([batch["data"] for batch in rows[table]])
        assert np.array_equal(images, expected.reshape(-1, 3, 32, 32))
        assert labels.tolist() == [label for batch in rows[table] for label in batch[key]]


def test_a_damaged_archive_is_refused_before_it_is_unpickled(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10", "labels")
    file = tmp_path / "cifar-10-batches-py/data_batch_3"
    file.write_bytes(file.read_bytes() + b".")
    with pytest.raises(UserError, match=r"files of cifar10 in .* damaged"):
        load_dataset("cifar10", data_dir=tmp_path)


def test_svhn_joins_train_and_extra(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    import torchvision.datasets as tv

    table, images = {}, {}
    for split, labels in {"train": [1, 10, 3], "extra": [10, 9], "test": [5, 6]}.items():
        images[split] = random_bytes(len(labels), 3, 32, 32)
        url, name, _ = tv.SVHN.split_list[split]
        content = {"X": images[split].transpose(2, 3, 1, 0), "y": np.array(labels)[:, None]}
        scipy_io.savemat(tmp_path / name, content)
        table[split] = [url, name, md5(tmp_path / name)]
    monkeypatch.setattr(tv.SVHN, "split_list", table)

    data = load_dataset("svhn", data_dir=tmp_path)
    joined = np.concatenate((images["train"], images["extra"]))
    assert len(data.train) == 5
    assert np.array_equal(read_all(data.train)[0], joined)
    assert read_all(data.train)[1].tolist() == [1, 0, 3, 0, 9]
    assert np.array_equal(read_all(data.test)[0], images["test"])
    assert data.class_names == list("0123456789")
    some, labels = data.train.read(np.array([4, 0, 3]))
    assert np.array_equal(some, joined[[4, 0, 3]])
    assert labels.tolist() == [9, 1, 0]


def test_svhn_without_scipy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=r"svhn needs scipy: .*pip install '\.\[svhn\]'"):
        load_dataset("svhn", data_dir=tmp_path, download=True)


def test_stl10_needs_no_unlabelled_images(tmp_path, monkeypatch):
    import torchvision.datasets as tv

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = {"train": random_bytes(5, 3, 96, 96), "test": random_bytes(2, 3, 96, 96)}
    labels = {"train": [1, 10, 3, 4, 5], "test": [2, 7]}
    for split in ("train", "test"):
        # The files hold columns, and count classes from 1.
        (folder / f"{split}_X.bin").write_bytes(images[split].transpose(0, 1, 3, 2).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(labels[split]))
        table = [[f"{split}_{kind}.bin", md5(folder / f"{split}_{kind}.bin")] for kind in "Xy"]
        unlabelled = getattr(tv.STL10, f"{split}_list")[2:]
        monkeypatch.setattr(tv.STL10, f"{split}_list", table + unlabelled)
    assert not is_available("stl10", tmp_path)
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")

    data = load_dataset("stl10", data_dir=tmp_path)
    assert data.class_names == ["airplane", "bird", "car"]
    for split in ("train", "test"):
        read, classes = read_all(getattr(data, split))
        assert np.array_equal(read, images[split])
        assert classes.tolist() == [label - 1 for label in labels[split]]


@pytest.mark.parametrize("entry", DATASETS, ids=lambda entry: entry.name)
@pytest.mark.usefixtures("no_debian_package")
def test_missing_files_are_not_fetched_unasked(tmp_path, entry):
    if entry.name == "fashion-mnist-sample":
        assert is_available(entry.name, tmp_path)
        return
    assert not is_available(entry.name, tmp_path)
    with pytest.raises(UserError, match="--download") as error:
        load_dataset(entry.name, data_dir=tmp_path / "here")
    assert str(tmp_path / "here") in str(error.value)
    assert f"greedy data prepare {entry.name} --download" in str(error.value)
    assert not (tmp_path / "here").exists()


def test_catalogue_describes_the_sample_as_it_is():
    entry = next(entry for entry in DATASETS if entry.name == "fashion-mnist-sample")
    data = load_dataset(entry.name)
    assert entry.shape == data.train.shape == data.test.shape
    assert (entry.train, entry.test) == (len(data.train), len(data.test))
    assert entry.classes == len(data.class_names)


def test_download_that_fails_is_one_line(tmp_path, monkeypatch):
    import torchvision.datasets as tv

    monkeypatch.setattr(tv.CIFAR10, "url", (tmp_path / "nowhere").as_uri())
    with pytest.raises(UserError, match=r"^cannot download cifar10 to [^\n]*$"):
        load_dataset("cifar10", data_dir=tmp_path, download=True)


def test_unknown_names_get_near_ones():
    with pytest.raises(UserError, match=r"'cifar-10': did you mean .*cifar10.*stl10.*folder:"):
        load_dataset("cifar-10")
    with pytest.raises(UserError, match="unknown data set"):
        is_available("cifar-10")


def test_image_size_is_for_folders():
    with pytest.raises(UserError, match="image_size"):
        load_dataset("fashion-mnist-sample", image_size=14)


def test_splits_must_agree(tmp_path):
    write_mnist(tmp_path / "MNIST/raw")
    sample, mnist = load_dataset("fashion-mnist-sample"), load_dataset("mnist", tmp_path)
    Dataset("mixed", sample.train, mnist.test, None)
    write_idx(tmp_path / "MNIST/raw/t10k-images-idx3-ubyte", random_bytes(3, 20, 28))
    with pytest.raises(UserError, match=r"\(1, 28, 28\).*\(1, 20, 28\)"):
        load_dataset("mnist", tmp_path)
