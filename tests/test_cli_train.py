"""`greedy train`: a recipe becomes a run, and the same command resumes it."""

import shutil
import signal
import subprocess
import sys
import tomllib

import pytest
from command_line import greedy, refused, said, small_recipe, written
from pictures import write_classes

from greedy.recipes import departures, load

RECIPE = small_recipe(
    data={"mean": [0.286], "std": [0.353]},
    model={"hidden_layers": 1},
    training={"epochs": 2},
    store={"views": 1},
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.toml").write_text(RECIPE)
    return folder, said("train", "--recipe", folder / "tiny.toml", "--run", folder / "run")


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """Copies the finished run into the current directory, next to its recipe."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_prints_a_line_for_each_epoch_store_and_stage_and_the_final_test_error(finished):
    output = finished[1]
    for line in (
        "stage 0: 5,000 training and 1,000 test images of fashion-mnist-sample",
        "stage 1/2 linear16: training, 2 epochs in float32",
        "stage 1/2 linear16: epoch 2/2, loss ",
        "stage 1/2 linear16: writing stage 1's train store, 5,000 rows",
        "stage 1/2 linear16: writing stage 1's test store, 1,000 rows",
        "stage 2/2 output: train error ",
        "stage  name      train err  test err ",
    ):
        assert f"\n{line}" in output
    shown = output.splitlines()[-1]
    error = greedy("evaluate", "--run", finished[0] / "run").output.partition(",")[0]
    assert shown == f"{error} on 1,000 images"
    assert max(map(len, output.splitlines())) <= 80 + len(str(finished[0]))


def test_a_run_is_by_default_in_runs_under_the_name_of_its_recipe(run, tmp_path):
    assert greedy("train", "--recipe", "tiny.toml", "--set", "training.epochs=1").exit_code == 0
    assert (tmp_path / "runs/tiny/stage2/stage.json").is_file()


@pytest.mark.parametrize("how", [["--recipe", "tiny.toml"], []])
def test_finished_stages_are_not_trained_again(run, how):
    before = written(run)
    result = greedy("train", *how, "--run", run)
    assert result.exit_code == 0
    assert "stage 1/2 linear16: complete already" in result.output
    assert "stage 2/2 output: complete already" in result.output
    assert written(run) == before


def test_goes_on_at_the_first_stage_that_is_not_finished(run):
    weights = (run / "stage2/encoder.safetensors").read_bytes()
    first = written(run / "stage1")
    shutil.rmtree(run / "stage2")
    result = greedy("train", "--run", run)
    assert result.exit_code == 0
    assert "stage 0" not in result.output
    assert written(run / "stage1") == first
    assert (run / "stage2/encoder.safetensors").read_bytes() == weights


def test_every_setting_has_its_effect_on_the_run(run, tmp_path):
    shorthands = ["--seed", "3", "--views", "2", "--encoding", "float16", "--reuse", "1"]
    shorthands += ["--precision", "float32", "--patience", "1"]
    more = ["--set", "training.epochs=1", "--set", "model.hidden_width=8"]
    more += ["--set", "data.augmentation=hflip"]
    result = greedy("train", "--recipe", "tiny.toml", "--run", "new", *shorthands, *more)
    assert result.exit_code == 0, result.output
    recipe = tomllib.loads((tmp_path / "new/run.toml").read_text())
    assert recipe["seed"] == 3
    store = recipe["store"]
    assert (store["views"], store["encoding"], store["reuse"]) == (2, "float16", 1)
    assert (recipe["training"]["precision"], recipe["training"]["patience"]) == ("float32", 1)
    assert "stage 1/2 linear8: training, 1 epoch in float32" in result.output
    assert "writing stage 1's train store, 10,000 rows" in result.output


def test_a_run_keeps_what_decides_its_result_and_frees_the_rest(run):
    before = written(run)
    told = refused("train", "--run", run, "--views", "2", "--set", "training.epochs=3")
    assert "training.epochs is 2 there, 3 here" in told
    assert "store.views is 1 there, 2 here" in told
    assert greedy("train", "--run", run, "--set", "store.compressor=none").exit_code == 0
    assert written(run) == before


def test_retrain_trains_again_from_a_stage_on(run):
    before = written(run)
    result = greedy("train", "--run", run, "--retrain", "2")
    assert "linear16: complete already" in result.output
    assert "output: training" in result.output
    after = written(run)
    assert {path.parent.name for path in after if after[path] != before[path]} == {"stage2"}
    weights = run / "stage2/encoder.safetensors"
    assert after[weights][0] == before[weights][0]


def test_retrain_without_a_stage_trains_all_but_the_data(run):
    before = written(run)
    result = greedy("train", "--retrain", "--run", run)
    assert result.exit_code == 0
    after = written(run)
    changed = {path.relative_to(run).parts[0] for path in after if after[path] != before[path]}
    assert changed == {"stage1", "stage2"}


def test_a_stage_whose_retraining_fails_stays_as_it_was(run):
    before = written(run / "stage2")
    files = (path for path in (run / "stage1/activations.zarr/train").rglob("*") if path.is_file())
    shard = max(files, key=lambda path: path.stat().st_size)
    shard.write_bytes(bytes(shard.stat().st_size))
    result = greedy("train", "--run", run, "--retrain", "2")
    assert result.exit_code == 1
    assert str(shard) in result.output.splitlines()[-1]
    assert "Traceback" not in result.output
    after = written(run / "stage2")
    assert {path: each for path, each in after.items() if "training" not in path.parts} == before
    assert '"state": "complete"' in greedy("status", "--run", run, "--json").output


def test_images_of_folders_are_trained_on(run, tmp_path):
    for split, count in (("train", 12), ("test", 4)):
        write_classes(tmp_path / "images" / split, count, width=9, height=9)
    of_colours = ["--set", "data.mean=[0.5,0.5,0.5]", "--set", "data.std=[0.2,0.2,0.2]"]
    settings = ["--data", "folder:images", "--set", "training.batch_size=8", *of_colours]
    result = greedy("train", "--recipe", "tiny.toml", *settings, "--run", "new")
    assert result.exit_code == 0, result.output
    assert result.output.endswith("on 8 images\n")


MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
open("called", "w").close()
def sets():
    images, labels = torch.rand(64, 1, 4, 4), torch.arange(64) % 2
    return TensorDataset(images, labels), TensorDataset(images[:8], labels[:8])
def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
"""


def test_a_function_is_called_only_if_this_command_line_names_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_data.py").write_text(MODULE)
    text = RECIPE.replace("fashion-mnist-sample", "own_data:sets").replace("= 256", "= 16")
    (tmp_path / "strange.toml").write_text(text)
    told = refused("train", "--recipe", "strange.toml", "--run", "new")
    assert "add --data own_data:sets" in told
    assert not (tmp_path / "called").exists() and not (tmp_path / "new").exists()
    allowed = greedy("train", "--recipe", "strange.toml", "--run", "new", "--data", "own_data:sets")
    assert allowed.exit_code == 0, allowed.output
    assert greedy("train", "--run", "new").exit_code == 0  # the data are in the run by now


def test_a_network_built_in_python_comes_from_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_network.py").write_text(MODULE)
    own = ["--recipe", "tiny.toml", "--run", "new", "--set", "model.network=python"]
    assert "--model module:function" in greedy("train", *own).output
    wide = greedy("train", *own, "--model", "own_network:network")
    assert wide.exit_code == 2
    assert "cannot take an input of shape" in wide.output
    data = ["--data", "own_network:sets", "--set", "training.batch_size=16"]
    result = greedy("train", *own, *data, "--model", "own_network:network")
    assert result.exit_code == 0, result.output
    evaluated = greedy("evaluate", "--run", "new", "--model", "own_network:network")
    assert evaluated.exit_code == 0
    assert greedy("evaluate", "--run", "new").exit_code == 2


def test_a_function_s_network_has_the_same_first_weights_each_time(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = MODULE.replace("(16, 8)", "(784, 8)").replace("(8, 2)", "(8, 10)")
    (tmp_path / "seeded_network.py").write_text(module)
    own = ["--recipe", "tiny.toml", "--model", "seeded_network:network"]
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        said("train", *own, "--run", name, "--seed", seed)
    first, again, other = (
        (tmp_path / name / "stage1/encoder.safetensors").read_bytes()
        for name in ("one", "same", "other")
    )
    assert first == again != other


def test_the_papers_figure_stands_beside_the_result(run):
    changed = ["--data", "fashion-mnist-sample", "--set", "training.epochs=1", "--seed", "4"]
    more = ["--set", "model.hidden_width=8", "--views", "1"]
    result = greedy("train", "--recipe", "fashion-mnist/mlp-pred", *changed, *more, "--run", "new")
    figure = load("fashion-mnist/mlp-pred").paper.test_error_percent
    last = result.output.splitlines()[-1]
    assert last.startswith(f"the paper: {figure:.2f} % (table 2), but with other data.name")
    for key in ("model.hidden_width", "training.epochs"):
        assert key in last
    assert "seed" not in last and "store" not in last


def test_departures_from_the_paper():
    assert departures(load("mnist/mlp-pred")) == []
    assert departures(load("mnist/mlp-pred", ["seed=7", "store.views=1"])) == []
    assert departures(load("mnist/mlp-pred", ["training.batch_size=64"])) == ["training.batch_size"]


def test_ctrl_c_leaves_a_run_that_goes_on(run, tmp_path):
    command = [sys.executable, "-m", "greedy.cli.main", "train", "--recipe", "tiny.toml"]
    command += ["--run", "new", "--set", "training.epochs=3000", "--set", "model.hidden_width=64"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        for line in process.stdout:
            if "epoch 1/" in line:
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        complaint = process.stderr.read()
    assert process.returncode == 130
    assert complaint.startswith("Error: interrupted")
    assert "the same command resumes" in complaint
    assert '"state": "training"' in greedy("status", "--run", "new", "--json").output
