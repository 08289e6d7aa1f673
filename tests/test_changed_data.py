"""Data that changed since a run stored them are named and counted, never used silently."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import greedy, refused, said, small_recipe
from PIL import Image
from small_training import TEST, TRAIN, new_trainer, states
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer
from greedy.base.errors import UserError
from greedy.runs.directory import RunDirectory
from greedy.runs.integrity import verify_run
from greedy.runs.record import FILES

RNG = np.random.default_rng(0)
LATER = 1_900_000_000 * 10**9  # when files are edited


def write(file: Path) -> None:
    """Writes an image of noise; its file always has the same size."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)).save(file, "BMP")
    os.utime(file, ns=(LATER, LATER))


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """Makes a folder with images in ``photos``, and trains a run on them."""
    place = tmp_path_factory.mktemp("begun")
    for split, count in (("train", 6), ("test", 2)):
        for name in ("ant", "bee"):
            for number in range(count):
                file = place / "photos" / split / name / f"{number}.bmp"
                write(file)
                os.utime(file, ns=(LATER // 2, LATER // 2))
    text = small_recipe(data={"name": "folder:photos"}, training={"batch_size": 4})
    (place / "tiny.toml").write_text(text)
    before = Path.cwd()
    os.chdir(place)
    try:
        said("train", "--recipe", "tiny.toml", "--run", "run")
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def photos(begun, tmp_path, monkeypatch) -> Path:
    """Makes the images of a run, both in the current directory."""
    shutil.copytree(begun, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return Path("photos")


AGAIN = ("train", "--recipe", "tiny.toml", "--run", "run")


def edit(photos: Path) -> None:
    write(photos / "train/ant/1.bmp")
    write(photos / "test/bee/0.bmp")


def add(photos: Path) -> None:
    write(photos / "train/ant/9.bmp")


def delete(photos: Path) -> None:
    (photos / "train/bee/5.bmp").unlink()


def rename(photos: Path) -> None:
    (photos / "train/bee/5.bmp").rename(photos / "train/bee/7.bmp")


def move(photos: Path) -> None:
    (photos / "train/bee/5.bmp").rename(photos / "train/ant/5b.bmp")


def grow(photos: Path) -> None:
    file = photos / "train/bee/5.bmp"
    before = file.stat()
    Image.new("L", (8, 8)).resize((16, 8)).save(file)
    os.utime(file, ns=(before.st_mtime_ns, before.st_mtime_ns))


def remove_class(photos: Path) -> None:
    for file in (photos / "train/bee").iterdir():
        file.unlink()


def edit_in_its_time(photos: Path) -> None:
    file = photos / "train/ant/1.bmp"
    before = file.stat()
    write(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange_classes(photos: Path) -> None:
    for old, new in (("ant", "other"), ("bee", "ant"), ("other", "bee")):
        (photos / "test" / old).rename(photos / "test" / new)


CHANGES = {
    edit_in_its_time: "of 16 files 1 changed: train/ant/1.bmp",
    exchange_classes: "of 16 files 4 changed: test/ant/0.bmp, test/ant/1.bmp, test/bee/0.bmp, …",
    edit: "of 16 files 2 changed: train/ant/1.bmp, test/bee/0.bmp",
    add: "of 16 files 1 new: train/ant/9.bmp",
    delete: "of 16 files 1 gone: train/bee/5.bmp",
    rename: "of 16 files 1 new: train/bee/7.bmp; 1 gone: train/bee/5.bmp",
    move: "of 16 files 1 new: train/ant/5b.bmp; 1 gone: train/bee/5.bmp",
    grow: "of 16 files 1 changed: train/bee/5.bmp",
    remove_class: "photos/train/bee holds no image",
}


@pytest.mark.parametrize(("change", "what"), CHANGES.items(), ids=lambda each: str(each)[:20])
def test_changed_files_are_counted_and_named(photos, change, what):
    change(photos)
    told = refused(*AGAIN)
    assert what in told
    assert "`greedy train --run run --retrain 0`" in told
    assert "--ignore-changes" in told
    assert "error" in said(*AGAIN, "--ignore-changes")


def test_files_that_were_only_touched_are_the_same_while_another_process_trains(photos):
    for file in photos.rglob("*.bmp"):
        file.touch()
    with RunDirectory.open(Path("run")).write_lock():
        assert "changed" not in greedy("evaluate", "--run", "run").output
        assert "is in use" in greedy(*AGAIN, "--retrain").output


def test_files_that_were_only_touched_or_copied_are_the_same(photos):
    for file in photos.rglob("*.bmp"):
        file.touch()
    table = Path("run/stage0", FILES)
    before = table.read_bytes()
    assert "error" in said(*AGAIN)
    assert table.read_bytes() != before  # the next time no file is read
    shutil.copytree(photos, "copied")
    shutil.rmtree(photos)
    Path("copied").rename(photos)
    Path("run").chmod(0o555)
    assert "error" in said(*AGAIN)


def test_a_folder_that_cannot_be_read_is_reported_and_stops_training(photos, monkeypatch):
    scanning = os.scandir

    def unreadable(path="."):
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return scanning(path)

    monkeypatch.setattr(os, "scandir", unreadable)
    what = "photos/train/bee cannot be read (Permission denied): permit reading it"
    for asked in (AGAIN, ("data", "prepare", "folder:photos")):
        assert what in refused(*asked)
    assert "error" in said(*AGAIN, "--ignore-changes")
    looked = greedy("evaluate", "--run", "run")
    assert looked.exit_code == 0
    assert what in looked.stderr


def test_a_finished_run_needs_no_folder(photos):
    shutil.rmtree(photos)
    assert "error" in said(*AGAIN)


def test_all_commands_on_stored_images_compare_the_folder(photos):
    edit(photos)
    one = ("train-stage", "--stage", 2, "--from-cache", "run/stage1", "--retrain")
    end_to_end = ("finetune", "--run", "run", "--set", "training.epochs=1")
    for asked in (one, end_to_end):
        told = refused(*asked)
        assert CHANGES[edit] in told
        said(*asked, "--ignore-changes")
    for asked in (("evaluate", "--run", "run"), ("cache", "repair", "run")):
        result = greedy(*asked)
        assert result.exit_code == 0
        assert CHANGES[edit] in result.stderr
    tuned = greedy("finetune", "--run", "run", "--set", "training.epochs=1", "--ignore-changes")
    assert tuned.exit_code == 0
    later = greedy("evaluate", "--run", "run-finetuned")
    assert CHANGES[edit] in later.stderr


def test_an_interrupted_training_does_not_resume_on_changed_images(photos):
    shutil.rmtree("run/stage2")
    edit(photos)
    assert CHANGES[edit] in greedy("train", "--run", "run").output
    assert not Path("run/stage2").exists()


def test_a_run_is_trained_again_on_changed_images(photos):
    edit(photos)
    assert greedy(*AGAIN, "--retrain").exit_code == 2
    before = RunDirectory.open(Path("run")).record(0)
    said(*AGAIN, "--retrain", 0)
    run = RunDirectory.open(Path("run"))
    assert run.record(0).lineage != before.lineage
    assert states(run, range(4)) == ["complete"] * 4
    assert "error" in said(*AGAIN)
    fresh = said("train", "--recipe", "tiny.toml", "--run", "fresh")
    assert RunDirectory.open(Path("fresh")).record(0).lineage == run.record(0).lineage
    assert fresh.splitlines()[-1] == said(*AGAIN).splitlines()[-1]
    assert verify_run(Path("run")) == []


def test_images_that_change_while_a_run_is_trained_again(photos, monkeypatch):
    training = GreedyTrainer._train_stage

    def stopped(trainer, state, number, *how):
        if number == 2:
            raise KeyboardInterrupt
        return training(trainer, state, number, *how)

    edit(photos)
    with monkeypatch.context() as patched:
        patched.setattr(GreedyTrainer, "_train_stage", stopped)
        assert greedy(*AGAIN, "--retrain", 0).exit_code == 130
    add(photos)
    said(*AGAIN, "--retrain", 0)
    run = RunDirectory.open(Path("run"))
    assert states(run, range(4)) == ["complete"] * 4
    said("train", "--recipe", "tiny.toml", "--run", "fresh")
    for number in range(1, 4):
        name = f"stage{number}/encoder.safetensors"
        assert Path("run", name).read_bytes() == Path("fresh", name).read_bytes()


def test_a_run_without_the_record_opens_and_compares_nothing(photos):
    Path("run/stage0", FILES).unlink()
    edit(photos)
    assert "error" in said(*AGAIN)
    assert said("evaluate", "--run", "run")
    before = RunDirectory.open(Path("run")).record(0)
    said(*AGAIN, "--retrain", 0)
    assert RunDirectory.open(Path("run")).record(0).lineage != before.lineage


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", 150, -4])
def test_a_damaged_record_is_found(photos, damage):
    """A number is the place of a wrong byte; at -4, an archive's length is beyond any file's."""
    table = Path("run/stage0", FILES)
    broken = bytearray(table.read_bytes())
    if isinstance(damage, int):
        broken[damage] ^= 255
    table.write_bytes(broken if isinstance(damage, int) else damage)
    assert [each.path for each in verify_run(Path("run"))] == [table]
    assert f"{table} is damaged" in refused(*AGAIN)


def test_files_that_change_while_they_are_read_stop_the_reading(photos, monkeypatch):
    from greedy.data.folder import FolderSplit

    reading = FolderSplit.read

    def disturbed(split, rows):
        write(photos / "train/ant/0.bmp")
        return reading(split, rows)

    monkeypatch.setattr(FolderSplit, "read", disturbed)
    os.utime(photos / "train/ant/0.bmp", ns=(1, 1))
    told = refused("train", "--recipe", "tiny.toml", "--run", "new")
    assert "1 files of folder:photos changed while they were read" in told


@pytest.fixture(scope="module")
def in_python(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("in_python") / "run"
    new_trainer(run, epochs=1).fit(TRAIN, TEST)
    return run


class Unlabelled(torch.utils.data.Dataset):
    """A data set of the same samples without a list of labels."""

    def __init__(self, samples: TensorDataset) -> None:
        self.rows = list(samples)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.rows[index]


def again(run: Path) -> GreedyTrainer:
    return new_trainer(run, epochs=1)


@pytest.mark.parametrize("kind", [lambda samples: samples, Unlabelled], ids=["apart", "in samples"])
def test_every_label_of_a_python_data_set_is_compared(in_python, kind):
    images, labels = (each.clone() for each in TRAIN.tensors)
    again(in_python).fit(kind(TRAIN), kind(TEST))
    labels[[17, 301]] = (labels[[17, 301]] + 1) % 3
    other = kind(TensorDataset(images, labels))
    with pytest.raises(UserError, match="2 labels of the train split: samples 17, 301"):
        again(in_python).fit(other, kind(TEST))
    again(in_python).fit(other, kind(TEST), ignore_changes=True)


def test_images_of_a_python_data_set_are_compared(in_python):
    images, labels = TRAIN.tensors
    for other in (255 - images, images.flip(3), (images // 16) * 16):
        with pytest.raises(UserError, match="of 64 images of the train split .*samples"):
            again(in_python).fit(TensorDataset(other, labels), TEST)
    one = images.clone()
    one[:, 0, 4, 4] ^= 128
    with pytest.raises(UserError, match="64 of 64 images of the train split"):
        again(in_python).fit(TensorDataset(one, labels), TEST)
    with pytest.raises(UserError, match="of the test split"):
        again(in_python).fit(TRAIN, TensorDataset(255 - TEST.tensors[0], TEST.tensors[1]))


def test_skipped_files_are_compared_too(photos):
    broken = photos / "train/ant/8.bmp"
    broken.write_bytes(b"BM")
    asked = ("train", "--recipe", "tiny.toml", "--run", "new", "--set", "data.broken=skip")
    said(*asked)
    assert "error" in said(*asked)
    write(broken)
    assert "of 17 files 1 changed: train/ant/8.bmp" in greedy(*asked).output


class Relabelled(Unlabelled):
    """Samples of which some have other labels than the list of labels."""

    def __init__(self, samples: TensorDataset) -> None:
        super().__init__(samples)
        self.dataset = samples

    def __getitem__(self, index: int):
        image, label = self.rows[index]
        return image, (label + 1) % 3 if index % 10 == 7 else label


def test_labels_are_compared_with_those_of_the_samples(tmp_path):
    again(tmp_path / "run").fit(Relabelled(TRAIN), TEST)
    again(tmp_path / "run").fit(Relabelled(TRAIN), TEST)
    images, labels = (each.clone() for each in TRAIN.tensors)
    labels[[18, 301]] = (labels[[18, 301]] + 1) % 3
    with pytest.raises(UserError, match="2 labels of the train split: samples 18, 301"):
        again(tmp_path / "run").fit(Relabelled(TensorDataset(images, labels)), TEST)


def test_each_feature_is_compared_on_its_own_scale(tmp_path):
    features = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    features *= torch.tensor([1e6, 1, 1])
    labels = torch.arange(60) % 3
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 3))

    def fit(features: torch.Tensor) -> None:
        samples = TensorDataset(features, labels)
        new_trainer(tmp_path / "run", network, epochs=1).fit(samples, samples)

    fit(features)
    fit(features)
    with pytest.raises(UserError, match="60 of 60 images of the train split") as caught:
        fit(features * torch.tensor([1, 2, 1]))
    assert "greedy train" not in str(caught.value)  # no command has these samples


def test_changed_data_of_a_function_are_trained_by_the_named_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("sets_of_a_function.py").write_text(
        "from small_training import TRAIN, TEST\nsets = lambda: (TRAIN, TEST)\n"
    )
    name = "sets_of_a_function:sets"
    Path("tiny.toml").write_text(small_recipe(data={"name": name}))
    said(*AGAIN, "--data", name)
    monkeypatch.setattr("sets_of_a_function.TRAIN", TensorDataset(*TRAIN[:300]))
    told = refused(*AGAIN, "--data", name)
    remedy = f"greedy train --run run --data {name} --retrain 0"
    assert f"`{remedy}`" in told
    said(*remedy.split()[1:])
