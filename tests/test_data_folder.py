"""Image folders of real PNG and JPEG files."""

import numpy as np
import pictures
import pytest
from pictures import write_classes
from PIL import ExifTags, Image

from greedy.base.errors import UserError
from greedy.data import load_dataset


def write_image(path, width=12, height=10, mode="RGB", **options):
    return pictures.write_image(path, width, height, mode, **options)


@pytest.fixture
def folder(tmp_path):
    """Writes two classes of three training images and one test image each, 12 wide and 10 high."""
    for split, count in (("train", 3), ("test", 1)):
        write_classes(tmp_path / split, count, width=12, height=10)
    return tmp_path


def test_rows_in_the_order_of_classes_and_names(folder):
    pixels = write_image(folder / "train/bird/0.png")
    grey = write_image(folder / "train/ant/1.png", mode="L")
    (folder / "train/ant/notes.txt").write_text("not an image")
    (folder / "train/ant/.hidden.png").write_text("not an image")
    (folder / "train/.cache").mkdir()
    data = load_dataset(f"folder:{folder}")
    assert data.class_names == ["ant", "bird"]
    assert (len(data.train), len(data.test)) == (6, 2)
    assert data.train.shape == data.test.shape == (3, 10, 12)
    assert data.train.dtype == np.uint8
    images, labels = data.train.read(np.array([3, 1, 0, 5]))
    assert labels.tolist() == [1, 0, 0, 1]
    assert labels.dtype == np.int64
    assert np.array_equal(images[0], pixels)
    assert np.array_equal(images[1], grey)
    assert data.test.read(np.arange(2))[1].tolist() == [0, 1]


def test_many_jpegs_are_decoded_each_into_its_row(tmp_path):
    for split in ("train", "test"):
        for i in range(40):
            path = tmp_path / split / "class" / f"{i:02}.JPG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (6 * i, 255 - 6 * i, 128)).save(path, "jpeg", quality=95)
    train = load_dataset(f"folder:{tmp_path}").train
    rows = np.random.default_rng(0).permutation(40)
    images, _ = train.read(rows)
    expected = np.stack((6 * rows, 255 - 6 * rows, np.full(40, 128)), axis=1)
    assert np.abs(images.mean((2, 3)) - expected).max() < 3


@pytest.mark.parametrize(("width", "height"), [(41, 20), (20, 33), (12, 12), (7, 9)])
def test_image_size_is_torchvisions_resize_and_centre_crop(folder, width, height):
    from torchvision.transforms.v2 import CenterCrop, Compose, Resize

    pixels = write_image(folder / "train/ant/0.png", width, height)
    write_image(folder / "test/bird/0.png", 50, 30)
    data = load_dataset(f"folder:{folder}", image_size=12)
    assert data.train.shape == data.test.shape == (3, 12, 12)
    images, _ = data.train.read(np.arange(6))
    original = Image.fromarray(pixels.transpose(1, 2, 0))
    expected = np.asarray(Compose([Resize(12), CenterCrop(12)])(original)).transpose(2, 0, 1)
    assert np.array_equal(images[0], expected)
    assert data.test.read(np.arange(2))[0].shape == (2, 3, 12, 12)


@pytest.mark.parametrize("odd", ["train/bird/2.png", "test/ant/0.png"])
def test_images_of_several_sizes_need_image_size(folder, odd):
    write_image(folder / odd, width=11)
    data = load_dataset(f"folder:{folder}")
    split = getattr(data, odd.split("/", maxsplit=1)[0])
    with pytest.raises(UserError, match=r"data\.image_size") as error:
        split.read(np.arange(len(split)))
    for part in ("train/ant/0.png", "12x10", odd, "11x10"):
        assert part in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_damaged_image_is_named(folder, damage, suffix):
    file = folder / "train/bird" / f"1.{suffix}"
    write_image(file, 12, 10)
    raw = file.read_bytes()
    file.write_bytes({"truncated": raw[: len(raw) // 2], "text": b"hello", "empty": b""}[damage])
    data = load_dataset(f"folder:{folder}")
    with pytest.raises(UserError, match=rf"cannot read the image .*bird/1\.{suffix}"):
        data.train.read(np.arange(len(data.train)))


def test_missing_folders_and_classes(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere is missing"):
        load_dataset(f"folder:{tmp_path}/nowhere")
    write_image(folder / "test/wasp/0.png")
    with pytest.raises(UserError, match="test has classes that .*train lacks: 'wasp'"):
        load_dataset(f"folder:{folder}")
    (folder / "train/wasp").mkdir()
    with pytest.raises(UserError, match="wasp holds no image"):
        load_dataset(f"folder:{folder}")


def test_folders_of_classes_alone_hold_one_image_in_five_out(tmp_path):
    pixels = [write_image(tmp_path / "bird" / f"{i:02}.png") for i in range(12)]
    pixels += [write_image(tmp_path / "wasp" / f"{i}.png") for i in range(2)]
    data = load_dataset(f"folder:{tmp_path}")
    assert data.class_names == ["bird", "wasp"]
    images, labels = data.test.read(np.arange(len(data.test)))
    assert np.array_equal(images, np.stack([pixels[i] for i in (0, 5, 10, 12)]))
    assert labels.tolist() == [0, 0, 0, 1]
    images, labels = data.train.read(np.arange(len(data.train)))
    assert np.array_equal(images, np.stack([pixels[i] for i in (1, 2, 3, 4, 6, 7, 8, 9, 11, 13)]))
    assert labels.tolist() == [0] * 9 + [1]
    write_image(tmp_path / "ant/0.png")
    with pytest.raises(UserError, match=r"ant holds one image.*: add some"):
        load_dataset(f"folder:{tmp_path}")
    (tmp_path / "train").mkdir()  # from here on the user sorts
    with pytest.raises(UserError, match="test is missing"):
        load_dataset(f"folder:{tmp_path}")


def test_a_class_may_be_called_train(tmp_path):
    write_classes(tmp_path, 5, ("bus", "train"))
    assert load_dataset(f"folder:{tmp_path}").class_names == ["bus", "train"]


@pytest.mark.parametrize("strays", [["train"], ["train", "test"]])
def test_images_beside_class_folders_are_left_out_and_named(folder, strays):
    for split in strays:
        write_image(folder / split / "overview.png")
    data = load_dataset(f"folder:{folder}")
    assert data.class_names == ["ant", "bird"]
    assert (len(data.train), len(data.test)) == (6, 2)
    assert f"{len(strays)} ({strays[-1]}/overview.png" in data.notes[0]


def test_splits_without_class_folders_are_no_classes(tmp_path):
    write_classes(tmp_path, 5, ("test", "train"))
    with pytest.raises(UserError, match=r"images in .*train are of no class: .*train/CLASS/IMAGE"):
        load_dataset(f"folder:{tmp_path}")


def test_what_cannot_be_read_of_a_header_says_nothing(folder):
    pixels = write_image(
        folder / "train/ant/0.png", 10, 12, exif=b"Exif\0\0nothing that Exif knows"
    )
    images, _ = load_dataset(f"folder:{folder}").train.read(np.array([0]))
    assert np.array_equal(images[0], pixels)


def test_a_photo_is_turned_upright_as_its_camera_says(folder):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # its top is at the right
    pixels = write_image(folder / "train/ant/0.png", 10, 12, exif=exif)
    images, _ = load_dataset(f"folder:{folder}").train.read(np.array([0]))
    assert np.array_equal(images[0], np.rot90(pixels, -1, (1, 2)))


def test_a_mac_s_leftovers_are_no_class(folder):
    write_image(folder / "train/__MACOSX/0.png")
    assert load_dataset(f"folder:{folder}").class_names == ["ant", "bird"]


def test_what_names_no_folder_is_told(folder):
    with pytest.raises(UserError, match=r"0.png is a file: name a folder"):
        load_dataset(f"folder:{folder / 'train/ant/0.png'}")
    with pytest.raises(UserError, match="say folder:PATH"):
        load_dataset("folder:")
    with pytest.raises(UserError, match="unknown data set|no data set"):
        load_dataset("fashionmnist", image_size=32)


def test_folder_without_classes(tmp_path):
    with pytest.raises(UserError, match="holds no class"):
        load_dataset(f"folder:{tmp_path}")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(UserError, match="holds no class"):
        load_dataset(f"folder:{tmp_path}")
