"""Curves, images and the recipe as TensorBoard reads them back."""

import inspect
import io
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from command_line import greedy, refused, said, small_recipe, train
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, Reporter, Reporters, TensorBoard, UserError
from greedy.cache import Store
from greedy.results.tensorboard import first_filters

RECIPE = small_recipe(model={"hidden_layers": 1}, training={"epochs": 3, "test_every": 2})
FIGURES = {
    "loss/train": "loss",
    "loss/holdout": "holdout_loss",
    "error/train": "train_error_percent",
    "error/test": "test_error_percent",
    "learning_rate": "learning_rate",
    "images_per_second": "images_per_second",
}


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return tmp_path / "tiny.toml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), RECIPE, "--log", "tensorboard")


def events(directory):
    assert directory.is_dir()
    return EventAccumulator(str(directory), size_guidance={"images": 0, "tensors": 0}).Reload()


def curves(directory):
    """Returns every curve as its points (step, value)."""
    read = events(directory)
    return {
        tag: [(each.step, each.value) for each in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def history(stage):
    """Reads the same from the stage's own history."""
    lines = [json.loads(line) for line in (stage / "history.jsonl").read_text().splitlines()]
    curves = {
        tag: [(line["epoch"], line[field]) for line in lines if line[field] is not None]
        for tag, field in FIGURES.items()
    }
    return {tag: points for tag, points in curves.items() if points}


def assert_told(logs, stage):
    logged, expected = curves(logs), history(stage)
    assert logged.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in logged[tag]] == [step for step, _ in points]
        values = [value for _, value in points]
        assert [value for _, value in logged[tag]] == pytest.approx(values, rel=1e-6)


def picture(directory, tag):
    (image,) = events(directory).Images(tag)
    return np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))


def recipe_told(run):
    (text,) = events(run / "logs/recipe").Tensors("recipe/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    return "".join(f"{line.removeprefix('    ')}\n" for line in lines)


def test_curves_are_the_history_of_every_stage(run):
    for number in (1, 2):
        assert_told(run / f"logs/stage{number}", run / f"stage{number}")
    assert [step for step, _ in curves(run / "logs/stage1")["error/test"]] == [2, 3]


def test_the_recipe_is_told(run):
    assert recipe_told(run) == (run / "run.toml").read_text()


def test_images_are_the_training_images_as_the_first_stage_sees_them(run):
    grid = picture(run / "logs/stage1", "images")
    assert grid.shape == (8 * 30 + 2, 8 * 30 + 2, 3)
    raw = next(Store(run / "stage0/activations.zarr/train").batches(0, 64))
    for i, (pixels,) in enumerate(raw):  # this recipe does not augment
        top, left = 2 + 30 * (i // 8), 2 + 30 * (i % 8)
        shown = grid[top : top + 28, left : left + 28, 0].astype(int)
        assert np.abs(shown - pixels).max() <= 1


def test_images_are_augmented_as_in_the_first_epoch(recipe, tmp_path):
    said(
        *("train", "--recipe", recipe, "--run", tmp_path / "run", "--log", "tensorboard"),
        *("--set", "data.augmentation=jitter2+hflip", "--set", "training.epochs=1"),
    )
    grid = picture(tmp_path / "run/logs/stage1", "images")
    raw = next(Store(tmp_path / "run/stage0/activations.zarr/train").batches(0, 64))
    same = 0
    for i, (pixels,) in enumerate(raw):
        top, left = 2 + 30 * (i // 8), 2 + 30 * (i % 8)
        shown = grid[top : top + 28, left : left + 28, 0].astype(int)
        shifted = [
            np.roll(side, (y, x), (0, 1))[2:-2, 2:-2]
            for side in (pixels, pixels[:, ::-1])
            for y in range(-2, 3)
            for x in range(-2, 3)
        ]
        assert min(np.abs(shown[2:-2, 2:-2] - each).max() for each in shifted) <= 1
        same += int(np.abs(shown - pixels).max() <= 1)
    assert same < 16


def test_filters_of_the_first_layer(run):
    grid = picture(run / "logs/stage1", "filters")
    assert grid.shape == (2 * 30 + 2, 8 * 30 + 2, 3)
    weight = load_file(run / "stage1/encoder.safetensors")["layer.0.weight"][9].view(28, 28)
    scaled = 255 * (weight - weight.min()) / (weight.max() - weight.min())
    assert np.abs(grid[32:60, 32:60, 0] - scaled.numpy()).max() <= 1


def test_which_tensors_are_filters():
    named = {"b.weight": torch.rand(70, 3, 3, 3), "a.weight": torch.rand(5), "c": torch.rand(9, 48)}
    assert torch.equal(first_filters(named, (3, 4, 4)), named["b.weight"][:64])
    del named["b.weight"]
    assert torch.equal(first_filters(named, (3, 4, 4)), named["c"].view(9, 3, 4, 4))
    assert first_filters(named, (1, 4, 4)) is None
    assert first_filters({"c": torch.rand(9, 32)}, (2, 4, 4)) is None
    assert first_filters({"c": torch.rand(9, 3)}, (3, 1, 1)) is None


@pytest.mark.parametrize("strategy", ["joint", "backprop"])
def test_all_stages_at_once(recipe, tmp_path, strategy):
    run = tmp_path / "run"
    said("train", "--recipe", recipe, "--run", run, "--log", "tensorboard", "--strategy", strategy)
    for number in (1, 2):
        assert_told(run / f"logs/stage{number}", run / f"stage{number}")
    assert picture(run / "logs/stage1", "filters").any()
    assert recipe_told(run) == (run / "run.toml").read_text()


def test_fine_tuning_writes_its_own_logs(run, tmp_path):
    before = {path: path.read_bytes() for path in (run / "logs").rglob("*") if path.is_file()}
    short = ("--set", "training.epochs=1")
    said("finetune", "--run", run, "--to", tmp_path / "tuned", "--log", "tensorboard", *short)
    assert_told(tmp_path / "tuned/logs/stage2", tmp_path / "tuned/stage2")
    after = {path: path.read_bytes() for path in (run / "logs").rglob("*") if path.is_file()}
    assert before == after


def test_one_stage_alone_in_the_run_and_beside_it(run, tmp_path):
    shutil.rmtree(run / "logs")
    stage = ("train-stage", "--from-cache", run / "stage0", "--log", "tensorboard", "--stage", "1")
    said(*stage, "--retrain")
    assert_told(run / "logs/stage1", run / "stage1")
    inside = curves(run / "logs/stage1")
    said(*stage, "--to", tmp_path / "another")
    assert_told(run / "logs/another/stage1", tmp_path / "another")
    assert curves(run / "logs/stage1") == inside
    assert picture(run / "logs/another/stage1", "filters").any()


def test_a_stage_trained_again_takes_the_place_of_what_was_told(run):
    before = curves(run / "logs/stage1")
    said("train", "--run", run, "--retrain", "--log", "tensorboard")
    for number in (1, 2):
        assert_told(run / f"logs/stage{number}", run / f"stage{number}")
    assert curves(run / "logs/stage1")["images_per_second"] != before["images_per_second"]
    assert picture(run / "logs/stage1", "images").any()
    assert recipe_told(run) == (run / "run.toml").read_text()


KILLED = """
import os, sys
import greedy
from greedy.recipes import load

class Kill(greedy.Reporter):
    epoch = 0
    def epoch_started(self, epoch, rows): self.epoch = epoch
    def batch_finished(self, rows):
        if self.epoch == 3: os._exit(9)

logs = [greedy.TensorBoard(sys.argv[2])] if sys.argv[3] == "logged" else []
recipe = load(sys.argv[1])
trainer = greedy.GreedyTrainer.from_recipe(
    recipe, sys.argv[2], device="cpu", reporter=greedy.Reporters(*logs, Kill())
)
trainer.prepare(greedy.data.load_dataset(recipe.data.name))
trainer.train()
"""


@pytest.mark.parametrize("logged", ["logged", pytest.param("not logged", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ["greedy", "joint"])
def test_a_resumed_training_tells_every_epoch_once(tmp_path, recipe, logged, strategy):
    recipe.write_text(f'{RECIPE}strategy = "{strategy}"\n')
    run = tmp_path / "run"
    killed = [sys.executable, "-c", KILLED, str(recipe), str(run), logged]
    assert subprocess.run(killed, check=False).returncode == 9
    if logged == "logged":
        assert [step for step, _ in curves(run / "logs/stage1")["loss/train"]] == [1, 2]
        time.sleep(1)  # event files are put in order by the second in which they were begun
    said("train", "--run", run, "--log", "tensorboard")
    for number in (1, 2):
        assert_told(run / f"logs/stage{number}", run / f"stage{number}")


def test_logs_trouble_no_other_command(run, tmp_path):
    bare = shutil.copytree(run, tmp_path / "bare")
    shutil.rmtree(bare / "logs")
    said("cache", "verify", run)
    for command in ("status", "evaluate", "cache info"):
        place = ["--json"] if command == "cache info" else ["--json", "--run"]
        answers = [said(*command.split(), *place, each) for each in (run, bare)]
        assert answers[0] == answers[1]
    moved = run.rename(tmp_path / "moved")
    shutil.rmtree(moved / "stage2")
    said("train", "--run", moved, "--log", "tensorboard")
    assert_told(moved / "logs/stage2", moved / "stage2")
    said("cache", "verify", moved)


def test_a_finished_run_is_told_nothing_more(run):
    before = sorted((run / "logs").rglob("*"))
    said("train", "--run", run, "--log", "tensorboard")
    assert sorted((run / "logs").rglob("*")) == before


def test_without_the_package_it_is_said_before_anything_is_done(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = greedy("train", "--recipe", recipe, "--run", tmp_path / "run", "--log", "tensorboard")
    assert result.exit_code == 2
    assert "pip install '.[tensorboard]'" in result.output
    assert len(result.output.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_nothing_is_written_through_a_link(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(run / "logs")
    (run / "logs").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refused("train", "--run", run, "--retrain", "--log", "tensorboard")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_other_logs_are_not_known(run):
    assert "'wandb' is not 'tensorboard'" in refused("train", "--run", run, "--log", "wandb")


@pytest.mark.parametrize("rows", [torch.rand(40, 6), torch.rand(40, 1, 4, 4)])
def test_from_python_on_floats(tmp_path, rows):
    samples = TensorDataset(rows, torch.arange(40) % 2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(rows[0].numel(), 4), nn.Linear(4, 2))
    with TensorBoard(tmp_path / "run") as log:
        settings = {"epochs": 2, "batch_size": 20, "device": "cpu", "views": 1}
        GreedyTrainer(network, run_dir=tmp_path / "run", reporter=log, **settings).fit(
            samples, samples
        )
    assert_told(tmp_path / "run/logs/stage1", tmp_path / "run/stage1")
    seen = events(tmp_path / "run/logs/stage1").Tags()["images"]
    assert seen == ([] if rows.ndim == 2 else ["images", "filters"])


def test_reporters_pass_on_every_event():
    calls = []

    class Listener(Reporter):
        def __getattribute__(self, name):
            return lambda *arguments: calls.append((name, arguments))

    events = [name for name in vars(Reporter) if not name.startswith("_")]
    several = Reporters(Listener(), Listener())
    for name in events:
        count = len(inspect.signature(getattr(Reporter, name)).parameters) - 1
        getattr(several, name)(*range(count))
        assert calls == 2 * [(name, tuple(range(count)))]
        calls.clear()
    assert "run_started" in events


def test_a_link_is_refused_from_python(tmp_path):
    (tmp_path / "logs").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link"):
        TensorBoard(tmp_path)
