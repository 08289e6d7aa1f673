"""The files of an image folder: those used, those named in notes, and damaged ones."""

import io
import json
import os
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from command_line import answer, greedy, refused, said, small_recipe
from pictures import write_classes, write_image
from PIL import Image
from rich.console import Console

from greedy import RunDirectory
from greedy.base.errors import UserError
from greedy.cache import Store
from greedy.cli.progress import Preparing
from greedy.data import check_files, load_dataset


def sorted_photos(folder, test="test", classes=("ant", "bird")):
    for split, count in (("train", 4), (test, 2)):
        write_classes(folder / split, count, classes)
    return folder


def recipe(tmp_path, photos, **fields):
    path = tmp_path / "tiny.toml"
    sections = {"data": {"name": f"folder:{photos}", **fields}, "model": {"hidden_layers": 1}}
    path.write_text(small_recipe(**sections, training={"batch_size": 4}))
    return path


def prepared(photos):
    return said("data", "prepare", f"folder:{photos}")


def names(split):
    return [str(file.relative_to(split.root)) for file in split.files]


def test_a_test_split_may_lack_a_class_and_labels_go_by_name(tmp_path):
    photos = sorted_photos(tmp_path / "photos", classes=("ant", "bird", "cat"))
    for file in (photos / "test/ant").iterdir():
        file.unlink()
    data = load_dataset(f"folder:{photos}")
    assert data.class_names == ["ant", "bird", "cat"]
    assert data.test.read(np.arange(4))[1].tolist() == [1, 1, 2, 2]
    run = tmp_path / "run"
    said("train", "--recipe", recipe(tmp_path, photos), "--run", run)
    store = Store(run / "stage0/activations.zarr/test")
    assert store.labels[np.argsort(store.index)].tolist() == [1, 1, 2, 2]
    write_image(photos / "test/wasp/0.png")
    with pytest.raises(UserError, match="test has classes that .*train lacks: 'wasp'"):
        load_dataset(f"folder:{photos}")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_to_validate_on_stands_in_for_test(tmp_path, name):
    photos = sorted_photos(tmp_path, name)
    data = load_dataset(f"folder:{photos}")
    assert names(data.test) == [f"{name}/{c}/{n}.png" for c in ("ant", "bird") for n in (0, 1)]
    assert "not used" not in prepared(photos)
    sorted_photos(tmp_path, "test")
    data = load_dataset(f"folder:{photos}")
    assert names(data.test)[0] == "test/ant/0.png"
    assert f"{photos / name} is not used, since {photos / 'test'} is\n" in prepared(photos)


def test_images_below_class_folders_and_of_every_suffix(tmp_path):
    photos = sorted_photos(tmp_path)
    others = {"2020/may/0.jfif": "JPEG", "1.JPE": "JPEG", "2.avif": "AVIF", "A.TIFF": "TIFF"}
    for name, kind in others.items():
        write_image(photos / "train/ant" / name, format=kind)
    (photos / "train/ant/2020/again").symlink_to(photos / "train/ant")
    (photos / "train/ant/up").symlink_to(photos / "train")  # where other classes are
    elsewhere = tmp_path / "elsewhere"
    write_image(elsewhere / "x.webp", format="WEBP")
    (photos / "train/ant/linked").symlink_to(elsewhere)
    files = names(load_dataset(f"folder:{photos}").train)
    expected = {*others, "linked/x.webp", *(f"{number}.png" for number in range(4))}
    assert {name for name in files if "/ant/" in name} == {f"train/ant/{n}" for n in expected}
    assert len(files) == len(expected) + 4


def test_notes_name_the_files_left_out_except_those_of_systems(tmp_path):
    photos = sorted_photos(tmp_path / "photos")
    for name in ("Thumbs.db", ".DS_Store", "._0.png", "desktop.ini"):
        (photos / "train/ant" / name).write_text("left behind")
    assert "left out" not in prepared(photos)
    for name in ("train/bird/b.heic", "train/a.txt", "labels.csv", "test/ant/d.docx"):
        (photos / name).write_text("no image")
    os.mkfifo(photos / "train/bird/pipe.png")
    note = (
        f"left out of {photos}, not being images in class folders: 5 "
        "(labels.csv, test/ant/d.docx, train/a.txt, …)"
    )
    assert note in prepared(photos).splitlines()
    assert answer("data", "prepare", f"folder:{photos}")["notes"] == [note]
    output = said("train", "--recipe", recipe(tmp_path, photos), "--run", tmp_path / "run")
    assert note in output.splitlines()


def damaged(photos):
    """Adds seven damaged files of different kinds; returns their names."""
    folder = photos / "train/ant"
    intact = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(intact[: len(intact) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.gif").write_text("hello")
    (folder / "gone.png").symlink_to("nowhere")
    write_image(photos / "test/bird/half.jpg", 64, 64)
    whole = (photos / "test/bird/half.jpg").read_bytes()
    (photos / "test/bird/half.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder / "nan.tif")
    Image.new("RGB", (8, 8)).save(folder / "odd.dds")
    unknown = bytearray((folder / "odd.dds").read_bytes())
    unknown[80:88] = b"\4\0\0\0ABCD"  # a form of pixels that nobody knows
    (folder / "odd.dds").write_bytes(unknown)
    return ["cut.png", "empty.jpg", "text.gif", "gone.png", "nan.tif", "half.jpg", "odd.dds"]


def test_all_damaged_files_are_named_at_once(tmp_path):
    photos = sorted_photos(tmp_path / "photos")
    bad = damaged(photos)
    for words in (
        ("data", "prepare", f"folder:{photos}"),
        ("train", "--recipe", recipe(tmp_path, photos), "--run", tmp_path / "run"),
    ):
        told = refused(*words, *(("--set", "data.image_size=8") if words[0] == "train" else ()))
        assert f"7 of 19 images of {photos} cannot be read" in told
        assert all(name in told for name in bad)
        assert "set data.broken=skip" in told
        assert told.count("Error:") == 1 and "Traceback" not in told
    assert not (tmp_path / "run/stage0").exists()


def test_damaged_files_are_skipped_on_request_and_recorded(tmp_path):
    photos = sorted_photos(tmp_path / "photos")
    bad, run = damaged(photos), tmp_path / "run"
    wanted = recipe(tmp_path, photos, broken="skip", image_size=8)
    output = said("train", "--recipe", wanted, "--run", run)
    assert all(name in output for name in bad)
    record = RunDirectory.open(run).record(0)
    assert record.rows == {"train": 8, "test": 4}
    assert sorted(Path(name).name for name in record.data_choices.skipped) == sorted(bad)
    assert "train/ant/cut.png" in record.data_choices.skipped
    for file in (photos / "train/bird").iterdir():
        file.write_text("damaged")
    told = refused("train", "--recipe", wanted, "--run", tmp_path / "other")
    assert "no training image of 'bird' can be read" in told


def test_a_folder_of_damaged_files_alone(tmp_path):
    for file in write_classes(tmp_path, 2).glob("*/*.png"):
        file.write_text("damaged")
    told = refused("data", "prepare", f"folder:{tmp_path}")
    assert f"none of the images of {tmp_path} can be read" in told


def test_images_of_other_sizes_are_named_at_once(tmp_path):
    photos = sorted_photos(tmp_path)
    write_image(photos / "train/bird/wide.png", 9, 8)
    write_image(photos / "test/ant/high.png", 8, 9)
    told = refused("data", "prepare", f"folder:{photos}")
    for part in ("2 images", "8x8", "wide.png (9x8)", "high.png (8x9)", "data.image_size"):
        assert part in told
    for number in range(3):
        write_image(photos / f"train/bird/wide{number}.png", 9, 8)
    result = greedy("data", "prepare", f"folder:{photos}")
    assert "5 images" in result.stderr
    assert "wide1.png (9x8), …; set data.image_size" in result.stderr
    assert "wide2.png" not in result.stderr  # as there may be very many


def test_the_first_of_several_images_is_used_and_noted(tmp_path):
    photos = sorted_photos(tmp_path)
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (255, 0)]
    for name in ("moving.gif", "pages.tif", "moving.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        file = photos / "train/ant" / name
        frames[0].save(file, save_all=True, append_images=frames[1:], **options)
    assert "images of which the first of several is used: 3 (train/ant/moving.gif," in (
        prepared(photos)
    )
    train = load_dataset(f"folder:{photos}").train
    rows = np.array([i for i, file in enumerate(train.files) if file.suffix != ".png"])
    images, _ = train.read(rows)
    assert (images[:, 0] == 255).all() and not images[:, 1:].any()


def test_names_equal_but_for_normalisation_are_one_class(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for split, name in (("train", composed), ("train", apart), ("test", apart)):
        for number in range(2):
            write_image(tmp_path / "photos" / split / name / f"{number}.png")
    sorted_photos(tmp_path / "photos", classes=(os.fsdecode(b"caf\xe9"),))
    data = load_dataset(f"folder:{tmp_path / 'photos'}")
    assert data.class_names == [composed, os.fsdecode(b"caf\xe9")]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert data.test.labels.tolist() == [0] * 2 + [1] * 2
    run = tmp_path / "run"
    said("train", "--recipe", recipe(tmp_path, tmp_path / "photos"), "--run", run)
    record = json.loads((run / "stage0/stage.json").read_text())
    assert record["class_names"] == [composed, r"caf\xe9"]


READ_WITHIN_A_GIBIBYTE = """
import re, resource, sys
from pathlib import Path
import numpy as np
from greedy.cli.progress import Preparing
from greedy.data import check_files, load_dataset

train = load_dataset(f"folder:{sys.argv[1]}", image_size=96).train
size = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (1024 * size + 2**30,) * 2)
images, _ = train.read(np.arange(len(train)))
long = [i for i, file in enumerate(train.files) if len(file.name) > 5]
assert len(long) == 2 and (images[long] == 200).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_a_long_image_takes_no_more_memory_than_others(tmp_path):
    """If they were resized before being cropped, each would take 2 GiB."""
    photos = sorted_photos(tmp_path / "photos")
    long = photos / "train/ant/long.png"
    Image.new("L", (1, 60_000), 200).save(long)
    Image.new("L", (60_000, 1), 200).save(photos / "train/ant/wide.png")
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    words = [sys.executable, "-c", READ_WITHIN_A_GIBIBYTE, photos]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    said("train", "--recipe", recipe(tmp_path, photos, image_size=8), "--run", run)
    assert answer("predict", "--run", run, long)["predictions"]


def test_the_middle_of_a_long_image_is_what_resizing_all_of_it_gives(tmp_path):
    photos = sorted_photos(tmp_path)
    for width, height in ((10, 117), (133, 20), (31, 400)):
        file = photos / "train/ant/0.png"
        write_image(file, width, height)
        images, _ = load_dataset(f"folder:{photos}", image_size=12).train.read(np.array([0]))
        image = Image.open(file).convert("RGB")
        short = min(width, height)
        whole = image.resize((width * 12 // short, height * 12 // short), Image.Resampling.BILINEAR)
        left, top = (round((side - 12) / 2) for side in whole.size)
        expected = np.asarray(whole.crop((left, top, left + 12, top + 12))).transpose(2, 0, 1)
        assert np.abs(images[0].astype(int) - expected).max() <= 1  # of rounding


def test_more_pixels_than_the_limit_are_refused_by_name(tmp_path):
    photos = sorted_photos(tmp_path / "photos")
    big = photos / "train/ant/big.png"
    write_image(big, 20, 10)
    wanted = recipe(tmp_path, photos, image_size=8, max_pixels=199)
    told = refused("train", "--recipe", wanted, "--run", tmp_path / "run")
    assert "big.png (20 x 10 pixels, more than data.max_pixels = 199)" in told
    said("train", "--recipe", wanted, "--run", tmp_path / "run", "--set", "data.max_pixels=200")
    over = tmp_path / "over.png"
    write_image(over, 21, 10)
    result = greedy("predict", "--run", tmp_path / "run", over)
    assert result.exit_code == 1
    assert "21 x 10 pixels, more than data.max_pixels = 200" in result.stderr


def test_pillows_own_limit_is_neither_a_warning_nor_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    photos = sorted_photos(tmp_path)
    write_image(photos / "train/ant/long.png", 8, 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_dataset(f"folder:{photos}", image_size=8)
        assert len(data.train.read(np.arange(9))[0]) == 9
    assert Image.MAX_IMAGE_PIXELS == 100


def test_too_little_memory_is_a_sentence(tmp_path, monkeypatch):
    photos = sorted_photos(tmp_path)

    def load(self):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    told = refused("data", "prepare", f"folder:{photos}")
    assert "there is not enough memory to decode the image" in told


def test_too_little_memory_anywhere_is_a_sentence(monkeypatch):
    def load_dataset(*_, **__):
        raise MemoryError

    monkeypatch.setattr("greedy.data.load_dataset", load_dataset)
    result = greedy("data", "prepare", "fashion-mnist-sample")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is not enough main memory for this: ")


def test_a_terminal_shows_how_far_the_files_are(tmp_path):
    photos, out = sorted_photos(tmp_path), io.StringIO()
    shown = Preparing(Console(file=out, force_terminal=True, width=80))
    with shown.progress:
        check_files(load_dataset(f"folder:{photos}"), progress=shown.files_checked)
    assert "checking images" in out.getvalue() and "12/12" in out.getvalue()
