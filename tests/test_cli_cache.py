"""`greedy cache info`, `verify` and `drop`."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import answer, greedy, refused, said, small_recipe, train
from interrupting import StopAfter
from small_training import TEST, TRAIN, new_trainer

from greedy.base.errors import Interrupted
from greedy.runs.integrity import verify_run

RECIPE = small_recipe(data={"augmentation": "hflip"}, store={"views": 2})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), RECIPE)


def test_info_of_a_run_and_of_a_stage(run):
    document = answer("cache", "info", run)
    images, first, _ = document["stores"]
    assert (images["stage"], images["row_shape"], images["views"]) == (0, [1, 28, 28], 1)
    assert (images["minimum"], images["maximum"]) == (0, pytest.approx(1))
    assert (first["stage"], first["row_shape"], first["views"]) == (1, [16], 2)
    assert (first["encoding"], first["compressor"]) == ("uint8", "lz4")
    assert 0 < first["negatives"] < 1
    assert sum(first["histogram"]) == pytest.approx(1)
    alone = greedy("cache", "info", run / "stage1")
    assert alone.exit_code == 0
    assert "uint8 lz4" in alone.output
    assert "####" in alone.output


def test_what_was_written_is_whole(run):
    result = greedy("cache", "verify", run)
    assert (result.exit_code, result.output) == (0, "everything is as it was written\n")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "stage2/encoder.safetensors",
        "stage2/heads.safetensors",
        "stage2/history.jsonl",
        "stage2/stage.json",
        "stage1/activations.zarr/train/activations/c.0.0.0",
        "stage1/activations.zarr/test/labels/c.0",
        "stage0/activations.zarr/train/index/c.0",
    ],
)
def test_every_flipped_bit_is_found_and_its_file_named(run, name):
    flip(run / name, random.Random(name).getrandbits(40))
    for path in (run, run / name.split("/")[0]):
        result = greedy("cache", "verify", path)
        assert result.exit_code == 1
        assert str(run / name) in result.output


def test_other_settings_in_run_toml_are_found(run):
    path = run / "run.toml"
    path.write_text(path.read_text().replace("batch_size = 256", "batch_size = 255"))
    result = greedy("cache", "verify", run)
    assert result.exit_code == 1
    assert f"{path}: does not hold the settings" in result.output
    path.write_text("[[[")
    assert greedy("cache", "verify", run).exit_code == 1


def test_a_dropped_store_is_done_without(run):
    before = (run / "stage3/encoder.safetensors").read_bytes()
    result = greedy("cache", "drop", run / "stage2")
    assert result.exit_code == 0
    assert "train from stage 1's store with stage 2 replayed" in result.output
    assert "greedy cache repair" in result.output
    assert not (run / "stage2/activations.zarr").exists()
    states = answer("status", "--run", run)["stages"]
    assert [each["state"] for each in states] == ["complete"] * 3
    assert states[1]["store_bytes"] is None
    assert greedy("cache", "verify", run).exit_code == 0
    again = greedy("train", "--run", run, "--retrain", "3")
    assert again.exit_code == 0, again.output
    assert (run / "stage3/encoder.safetensors").read_bytes() != before  # never quantised


def test_commands_that_messages_name_can_be_copied(run):
    run = run.rename(run.with_name("my run's"))
    dropped = said("cache", "drop", run / "stage1")
    (train_stage,) = re.findall("`greedy (.*)`", dropped)
    said(*shlex.split(train_stage))
    assert (run / "stage1/activations.zarr").is_dir()
    flip(next((run / "stage1/activations.zarr/test/activations").glob("c*")), 900)
    (repair,) = re.findall("`greedy (.*)`", greedy("cache", "verify", run).output)
    assert "1 chunk computed" in said(*shlex.split(repair))


def test_damaged_images_are_not_to_be_repaired(run):
    flip(next((run / "stage0/activations.zarr/test/activations").glob("c*")), 900)
    found = greedy("cache", "verify", run)
    assert found.exit_code == 1
    assert "1 damaged; images cannot be computed again: begin another run" in found.output
    assert "repair" not in found.output


def test_lost_stages_are_damage(run):
    def damaged():
        found = json.loads(greedy("cache", "verify", run, "--json").stdout)["damaged"]
        return [(str(Path(each["path"]).relative_to(run)), each["what"]) for each in found]

    (run / "stage3/stage.json").unlink()
    assert damaged() == [("stage3/stage.json", "is missing")]
    shutil.rmtree(run / "stage3")  # as if it was never trained
    assert not damaged()
    shutil.rmtree(run / "stage1")
    assert damaged() == [("stage1/stage.json", "is missing")]
    assert "stage.json: is missing" in greedy("cache", "repair", run).output
    shutil.rmtree(run / "stage0/activations.zarr")
    assert damaged()[0] == ("stage0/activations.zarr", "is missing")
    shutil.rmtree(run / "stage0")
    assert damaged() == [(f"stage{n}/stage.json", "is missing") for n in (0, 1)]


def test_a_store_whose_exchange_was_interrupted_is_whole(run):
    store = run / "stage1/activations.zarr"
    (store / "train").rename(store / ".train.new")  # what comes next is its renaming back
    assert greedy("cache", "verify", run).exit_code == 0
    flip(next((store / ".train.new/activations").glob("c*")), 900)
    assert "1 damaged" in greedy("cache", "verify", run).output
    assert f"`greedy cache verify {run}` says what" in refused("cache", "info", run)


@pytest.mark.parametrize("name", ["start.json", "progress.json", "*.safetensors"])
def test_a_damaged_checkpoint_is_found(tmp_path, name):
    with pytest.raises(Interrupted):
        new_trainer(tmp_path / "run", reporter=StopAfter(3), checkpoint_minutes=0).fit(TRAIN, TEST)
    assert not verify_run(tmp_path / "run")
    (path,) = (tmp_path / "run/stage1/training/checkpoint").glob(name)
    flip(path, 900)
    (damage,) = verify_run(tmp_path / "run")
    assert f"{path.name} is damaged" in damage.problem
    path.unlink()
    assert bool(verify_run(tmp_path / "run")) == (name == "*.safetensors")


def test_dropping_a_run_keeps_its_images(run):
    assert greedy("cache", "drop", run).exit_code == 0
    assert [p.parent.name for p in run.glob("stage*/activations.zarr")] == ["stage0"]
    assert "stage 0 holds the images" in refused("cache", "drop", run / "stage0")
    assert greedy("evaluate", "--run", run).exit_code == 0


@pytest.mark.parametrize("command", ["info", "verify", "drop"])
def test_what_is_no_run_is_refused(tmp_path, command):
    assert "is not a run directory" in refused("cache", command, tmp_path)
