"""`greedy status`, `evaluate` and `export`: what a run has become."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
from command_line import answer, greedy, refused, small_recipe, train
from torch import nn

from greedy import RunDirectory, evaluate

RECIPE = small_recipe(
    data={"augmentation": "hflip"},
    model={"hidden_layers": 1},
    store={"views": 2, "encoding": "float16"},
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), RECIPE)


def states(run):
    return [each["state"] for each in answer("status", "--run", run)["stages"]]


def test_status_of_a_finished_run(run):
    document = answer("status", "--run", run)
    keys = {"recipe", "stages", "bytes_on_disk", "bytes_written", "set_aside"}
    assert document.keys() == keys
    assert document["recipe"] == "tiny"
    first, last = document["stages"]
    fields = "stage name state train_error_percent test_error_percent store_bytes"
    fields += " bytes_per_value seconds images_per_second step_memory_bytes peak_memory_bytes store"
    fields += " processes"
    assert list(first) == fields.split() == list(last)
    assert (first["stage"], first["name"], first["state"]) == (1, "linear16", "complete")
    assert (last["stage"], last["name"], last["state"]) == (2, "output", "complete")
    history = (run / "stage1/history.jsonl").read_text().splitlines()
    assert first["train_error_percent"] == json.loads(history[-1])["train_error_percent"]
    assert 0 < first["test_error_percent"] < 100
    files = (path for path in (run / "stage1/activations.zarr").rglob("*") if path.is_file())
    on_disk = sum(path.stat().st_size for path in files)
    assert first["store_bytes"] == pytest.approx(on_disk, rel=0.02)
    values = 16 * (2 * 5000 + 1000)
    assert first["bytes_per_value"] == pytest.approx(first["store_bytes"] / values)
    for field in fields.split()[-6:-2]:
        assert first[field] > 0
    assert last["store_bytes"] is None and last["bytes_per_value"] is None
    assert last["store"] is None
    assert first["processes"] == [1]


def test_status_without_json_is_a_table_of_at_most_80_columns(run):
    lines = greedy("status", "--run", run).output.splitlines()
    assert lines[1].split("  ")[0] == "stage" and lines[2].startswith("1      linear16  complete")
    assert max(map(len, lines[1:])) <= 80


def test_status_tells_what_is_still_to_do(run):
    shutil.rmtree(run / "stage2")
    assert states(run) == ["complete", "pending"]
    (run / "stage2/training").mkdir(parents=True)
    assert states(run) == ["complete", "training"]
    last = answer("status", "--run", run)["stages"][1]
    assert last["test_error_percent"] is None and last["seconds"] is None


def test_status_of_a_run_without_its_data(run):
    for stage in run.glob("stage*"):
        shutil.rmtree(stage)
    nothing = {
        "recipe": "tiny",
        "stages": [],
        "bytes_on_disk": 0,
        "bytes_written": 0,
        "set_aside": [],
    }
    assert answer("status", "--run", run) == nothing
    assert f"`greedy train --run {run}`" in greedy("status", "--run", run).output


def test_a_stage_of_other_settings_and_what_follows_are_stale_and_refused(run, tmp_path):
    (tmp_path / "other").mkdir()
    other = train(tmp_path / "other", RECIPE, "--set", "training.learning_rate=0.01")
    shutil.rmtree(run / "stage1")
    shutil.copytree(other / "stage1", run / "stage1")
    assert states(run) == ["stale", "stale"]
    for command in ("evaluate", "train"):
        assert f"`greedy train --run {run} --retrain 1`" in refused(command, "--run", run)
    assert greedy("train", "--run", run, "--retrain", "1").exit_code == 0
    assert states(run) == ["complete", "complete"]


def test_evaluate_says_how_the_assembled_network_does(run):
    result = answer("evaluate", "--run", run)
    sums = {"balanced_error_percent", "top5_error_percent", "by_class"}
    assert result.keys() == {"split", "samples", "error_percent", "loss"} | sums
    assert [each["samples"] for each in result["by_class"]] == [100] * 10
    errors = [each["error_percent"] for each in result["by_class"]]
    assert sum(errors) / 10 == pytest.approx(result["balanced_error_percent"])
    assert result["balanced_error_percent"] == pytest.approx(result["error_percent"])
    shown = greedy("evaluate", "--run", run).output
    assert f"balanced error {result['balanced_error_percent']:.2f} %, top-5 error" in shown
    assert re.search(r"Sneaker +100 +\d+\.\d\d %", shown)
    assert (result["split"], result["samples"]) == ("test", 1000)
    assert result["error_percent"] == pytest.approx(
        answer("status", "--run", run)["stages"][1]["test_error_percent"], abs=1
    )
    assert 0 < result["loss"] < 2.4
    training = answer("evaluate", "--run", run, "--split", "train")
    assert (training["split"], training["samples"]) == ("train", 5000)
    assert training["loss"] != result["loss"]


def test_errors_are_counted_by_class_and_among_the_five_likeliest(finished):
    """Evaluates a network that always finds class 0 likeliest, then 1, and so on."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    network[1].weight.data.zero_()
    network[1].bias.data = -torch.arange(10.0)
    result = evaluate(RunDirectory.open(finished), network, "test", torch.device("cpu"))
    assert [each.error_percent for each in result.by_class] == [0, *[100] * 9]
    assert result.by_class[9].name == "Ankle boot"
    assert (result.error_percent, result.balanced_error_percent) == (90, 90)
    assert result.top5_error_percent == 50


def test_evaluate_needs_no_activation_stores(run, finished):
    shutil.rmtree(run / "stage1/activations.zarr")
    assert answer("evaluate", "--run", run) == answer("evaluate", "--run", finished)
    first = answer("status", "--run", run)["stages"][0]
    assert first["state"] == "complete" and first["store_bytes"] is None


def test_a_run_can_be_moved(run, finished, tmp_path):
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    run.rename(moved)
    assert answer("evaluate", "--run", moved) == answer("evaluate", "--run", finished)
    assert answer("status", "--run", moved) == answer("status", "--run", finished)
    shutil.rmtree(moved / "stage2")
    assert greedy("train", "--run", moved).exit_code == 0


def test_an_unfinished_or_damaged_run_is_not_evaluated(run):
    weights = run / "stage1/encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    damaged = greedy("evaluate", "--run", run)
    assert damaged.exit_code == 2
    assert str(weights) in damaged.output
    shutil.rmtree(run / "stage2")
    assert greedy("evaluate", "--run", run).exit_code == 2


def test_export_takes_the_format_from_the_suffix_or_from_format(run, tmp_path):
    by_suffix = greedy("export", "--run", run, "--to", tmp_path / "net.safetensors")
    assert by_suffix.exit_code == 0, by_suffix.output
    assert "(safetensors, " in by_suffix.output
    by_name = greedy("export", "--run", run, "--to", tmp_path / "n.bin", "--format", "safetensors")
    assert by_name.exit_code == 0, by_name.output
    load = safetensors.torch.load_file
    assert load(tmp_path / "n.bin").keys() == load(tmp_path / "net.safetensors").keys()
    told = refused("export", "--run", run, "--to", tmp_path / "net.bin")
    assert "--format" in told and not (tmp_path / "net.bin").exists()


def test_export_until_a_stage(run, tmp_path):
    exit_file = tmp_path / "exit.safetensors"
    result = greedy("export", "--run", run, "--to", exit_file, "--until-stage", "1")
    assert result.exit_code == 0, result.output
    heads = safetensors.torch.load_file(run / "stage1/heads.safetensors").values()
    tensors = list(safetensors.torch.load_file(exit_file).values())
    classifier = next(each for each in heads if each.shape == (10, 16))
    assert any(each.shape == (10, 16) and torch.equal(each, classifier) for each in tensors)
    for stage in ("0", "3"):
        told = refused("export", "--run", run, "--to", tmp_path / "x.pt2", "--until-stage", stage)
        assert f"there is no stage {stage}" in told


def test_export_overwrites_only_when_forced(run, tmp_path):
    file = tmp_path / "net.safetensors"
    file.write_text("mine")
    assert "choose another --to, or add --force" in refused("export", "--run", run, "--to", file)
    assert file.read_text() == "mine"
    assert greedy("export", "--run", run, "--to", file, "--force").exit_code == 0
    assert safetensors.torch.load_file(file)
