"""`greedy train-stage`: exactly one stage, and exactly what `greedy train` makes of it."""

import shutil

import pytest
from command_line import greedy, refused, small_recipe, times, train

RECIPE = small_recipe(data={"augmentation": "jitter2"}, model={"dropout": 0.1}, store={"views": 2})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), RECIPE, run="cache")


@pytest.fixture(scope="module")
def of_other_seed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("other"), RECIPE, "--seed", "1", run="cache")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "cache")


def contents(directory):
    """Returns the bytes of the weights and of every file of the store."""
    files = [directory / "encoder.safetensors", directory / "heads.safetensors"]
    files += [path for path in (directory / "activations.zarr").rglob("*") if path.is_file()]
    return {path.relative_to(directory): path.read_bytes() for path in files}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_gives_byte_for_byte_what_train_gives(run, finished, number):
    shutil.rmtree(run / f"stage{number}")
    source = run / f"stage{number - 1}"
    result = greedy("train-stage", "--stage", number, "--from-cache", source)
    assert result.exit_code == 0, result.output
    said = f"wrote {run / f'stage{number}'}, trained from stage {number - 1}'s store"
    assert result.output.splitlines()[-1] == said
    assert contents(run / f"stage{number}") == contents(finished / f"stage{number}")
    assert len(contents(run / "stage2")) > 8


def test_the_run_goes_on_from_its_stage(run, finished):
    shutil.rmtree(run / "stage2")
    greedy("train-stage", "--stage", "2", "--from-cache", run / "stage1")
    third = times(run / "stage3")
    result = greedy("train", "--run", run)
    assert result.output.count("complete already") == 3
    assert times(run / "stage3") == third


def test_to_writes_elsewhere_and_leaves_the_run_alone(run, tmp_path):
    before = times(run)
    arguments = ["--stage", "2", "--from-cache", run / "stage1", "--to", tmp_path / "second"]
    result = greedy("train-stage", *arguments)
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "second") == contents(run / "stage2")
    assert times(run) == before
    again = greedy("train-stage", *arguments, "--retrain")
    assert again.exit_code == 2
    assert "exists already" in again.output


def test_a_complete_stage_is_left_unless_retrain_asks(run):
    arguments = ["--stage", "2", "--from-cache", run / "stage1"]
    before = times(run)
    left = greedy("train-stage", *arguments)
    assert left.exit_code == 0
    assert f"{run / 'stage2'} is already complete: --retrain trains it again" in left.output
    assert times(run) == before
    trained = greedy("train-stage", *arguments, "--retrain")
    assert f"wrote {run / 'stage2'}" in trained.output and "became stale" not in trained.output
    assert times(run / "stage2") != {k: v for k, v in before.items() if run / "stage2" in k.parents}


def test_what_followed_from_a_retrained_stage_is_told(run):
    result = greedy("train-stage", "--stage", "1", "--from-cache", run / "stage0", "--retrain")
    assert "became stale" not in result.output  # the same bytes
    arguments = ["--stage", "2", "--from-cache", run / "stage0", "--retrain"]
    last = greedy("train-stage", *arguments).output.splitlines()[-1]
    assert last.startswith("stage 3 became stale with the new stage 2: `greedy train --run ")
    assert "--retrain 3`" in last
    assert greedy(*last.split("`")[1].split()[1:]).exit_code == 0
    assert greedy("evaluate", "--run", run).exit_code == 0


@pytest.mark.parametrize("source", ["stage1", "stage2"])
def test_stages_without_a_store_are_replayed(run, source):
    shutil.rmtree(run / "stage3")
    shutil.rmtree(run / "stage2/activations.zarr")
    result = greedy("train-stage", "--stage", "3", "--from-cache", run / source)
    assert result.exit_code == 0, result.output
    assert result.output.endswith("trained from stage 1's store with stage 2 replayed\n")
    assert greedy("evaluate", "--run", run).exit_code == 0


@pytest.mark.parametrize(
    ("stage", "source", "message"),
    [
        (4, "stage2", "there is no stage 4: this network has stages 1 to 3"),
        (0, "stage0", "there is no stage 0: this network has stages 1 to 3"),
        (2, "stage2", "stage 2 cannot train from stage 2: give an earlier one"),
        (3, "stage7", "there is no stage 7: this network has stages 1 to 3"),
        (3, "run.toml", "run.toml is not a stage directory: give one such as cache/stage2"),
        (3, ".", "cache is not a stage directory"),
    ],
)
def test_refuses_what_is_no_stage(run, stage, source, message):
    before = times(run)
    told = refused("train-stage", "--stage", stage, "--from-cache", run / source, "--retrain")
    assert message in told
    assert times(run) == before


def without_record(run, other):
    (run / "stage2/stage.json").unlink()


def with_an_incomplete_store(run, other):
    (run / "stage2/activations.zarr/train/zarr.json").unlink()


def with_the_stage_of_another_run(run, other):
    shutil.rmtree(run / "stage2")
    shutil.copytree(other / "stage2", run / "stage2")


def with_the_store_of_another_run(run, other):
    shutil.rmtree(run / "stage2/activations.zarr")
    shutil.copytree(other / "stage2/activations.zarr", run / "stage2/activations.zarr")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_record, "stage 2 in {run} is not finished: train it first"),
        (with_an_incomplete_store, "activations.zarr/train is not a finished activation store"),
        (with_the_stage_of_another_run, "stage 2 in {run} is stale"),
        (with_the_store_of_another_run, "activations.zarr/train is a store of another run"),
    ],
)
def test_refuses_a_source_it_cannot_trust(run, of_other_seed, spoil, message):
    spoil(run, of_other_seed)
    before = times(run / "stage3")
    told = refused("train-stage", "--stage", "3", "--from-cache", run / "stage2", "--retrain")
    assert message.format(run=run) in told
    assert times(run / "stage3") == before


def test_does_not_write_into_another_run(run, of_other_seed):
    before = times(of_other_seed)
    for place in (of_other_seed / "stage4", of_other_seed / "stage2"):
        arguments = ["--stage", "2", "--from-cache", run / "stage1", "--to", place]
        assert greedy("train-stage", *arguments).exit_code == 2
    assert times(of_other_seed) == before
