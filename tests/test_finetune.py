"""`greedy finetune`: end to end, from the weights of a finished run; and other strategies."""

import json
import re
import shutil

import pytest
from command_line import answer, refused, said, small_recipe, train
from safetensors.torch import load_file
from small_training import TRAIN, network, new_trainer
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, RunDirectory, UserError
from greedy.training.finetuning import begin_finetuning

NARROW = {"hidden_width": 32}
RECIPE = small_recipe(model=NARROW, training={"epochs": [1, 1, 1], "batch_size": 128})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), RECIPE)


def weights(run, number):
    return load_file(run / f"stage{number}/encoder.safetensors")["layer.0.weight"]


def loss(run, split):
    return answer("evaluate", "--run", run, "--split", split)["loss"]


def test_it_begins_with_the_weights_and_leaves_their_run_alone(run, tmp_path):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    settings = ("--set", "training.epochs=1", "--set", "training.learning_rate=1e-30")
    said("finetune", "--run", run, "--to", tmp_path / "still", *settings)
    for number in (1, 2, 3):
        assert (weights(run, number) - weights(tmp_path / "still", number)).abs().max() < 1e-20
    assert before == {p: p.read_bytes() for p in before}


def test_it_trains_end_to_end_and_is_a_run_of_its_own(run):
    said("finetune", "--run", run, "--set", "training.epochs=3")
    tuned = run.with_name("run-finetuned")
    assert loss(tuned, "train") < loss(run, "train")
    assert "error" not in said("cache", "verify", tuned)
    stages = json.loads(said("status", "--run", tuned, "--json"))["stages"]
    assert [each["state"] for each in stages] == ["complete"] * 3
    assert "complete already" in said("finetune", "--run", run, "--set", "training.epochs=3")
    moved = shutil.move(tuned, run.with_name("moved"))
    shutil.rmtree(run)
    assert "complete already" in said("train", "--run", moved)
    said("train", "--run", moved, "--retrain")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda run: None, ["--strategy", "greedy"], "fine-tuning trains all stages at once"),
        (lambda run: shutil.rmtree(run / "stage2"), [], "stage 2 in .* is not finished"),
        (lambda run: None, ["--to", "{run}"], "belongs to a run with other settings"),
        (lambda run: None, ["--set", "data.image_size=14"], "data.image_size cannot be changed by"),
        (lambda run: None, ["--set", "model.hidden_width=8"], "model.hidden_width cannot be"),
    ],
    ids=["greedy", "unfinished", "itself", "data", "network"],
)
def test_a_mistake_is_one_sentence(run, prepare, arguments, message):
    prepare(run)
    told = refused("finetune", "--run", run, *(each.format(run=run) for each in arguments))
    (line,) = told.splitlines()
    assert re.search(message, line)


def test_a_beginning_that_was_cut_short_is_begun_again(run):
    tuned = run.with_name("run-finetuned")
    settings = ("--run", run, "--set", "training.epochs=1")
    said("finetune", *settings)
    whole = weights(tuned, 3)
    for path in tuned.iterdir():  # as it is when only the recipe is there
        if path.name not in ("run.toml", ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    said("finetune", *settings)
    assert (weights(tuned, 3) == whole).all()
    picture = run.with_name("matrices.png")
    said("plot", tuned, "--similarity", "--to", picture)
    assert picture.stat().st_size > 10_000


def test_weights_that_were_changed_are_not_begun_with(run, tmp_path):
    settings = ("--set", "training.epochs=1")
    said("finetune", "--run", run, "--to", tmp_path / "tuned", *settings)
    path = tmp_path / "tuned/initial.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    told = refused("train", "--run", tmp_path / "tuned", "--retrain")
    assert "is not the file that was written" in told


def test_floats_are_not_augmented_by_what_takes_bytes(tmp_path):
    images, labels = TRAIN.tensors
    data = TensorDataset(images / 100, labels)
    new_trainer(tmp_path / "run", epochs=1).fit(data, data)
    for name, values in (("randaugment", "floats"), ("color-jitter", "values from 0 to 2")):
        run = begin_finetuning(
            RunDirectory.open(tmp_path / "run"),
            tmp_path / name,
            ["training.epochs=1", f"data.augmentation={name}"],
        )
        trainer = GreedyTrainer.from_recipe(run.recipe, run.path, device="cpu", model=network())
        with pytest.raises(UserError, match=values):
            trainer.train()


# The other strategies, as they are typed


def test_one_option_trains_all_stages_at_once(run, tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(small_recipe(model=NARROW))
    printed = said("train", "--recipe", recipe, "--run", tmp_path / "joint", "--strategy", "joint")
    assert "joint, 3 stages: epoch 1/1" in printed
    assert "stage 3/3 output: train error" in printed
    table = next(line for line in printed.splitlines() if line.startswith("stage  name"))
    assert table.split()[-3:] == ["memory", "images/s", "seconds"]
    arguments = ("--run", tmp_path / "glob", "--strategy", "backprop", "--accumulate", 2)
    said("train", "--recipe", recipe, *arguments)
    status = json.loads(said("status", "--run", tmp_path / "glob", "--json"))["stages"]
    assert status[0]["train_error_percent"] is None
    assert status[0]["step_memory_bytes"] == status[2]["step_memory_bytes"] > 0


def test_plan_knows_what_all_stages_take_at_once(tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(small_recipe(model=NARROW))

    def planned(*arguments):
        return json.loads(said("plan", "--recipe", recipe, "--json", *arguments))

    joint = planned("--strategy", "joint")
    assert joint["peak_memory_bytes"] == joint["baselines"]["joint"]
    assert {each["store_bytes"] for each in joint["stages"]} == {0}
    greedy_ = planned()
    assert [s["flops"] for s in greedy_["stages"]] == [s["flops"] for s in joint["stages"]]
    backprop = planned("--strategy", "backprop")
    assert backprop["peak_memory_bytes"] == backprop["baselines"]["backprop"]
    assert backprop["flops"] < joint["flops"]


def test_glob_trains_nothing_locally(tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(small_recipe(model=NARROW, loss={"name": "glob"}))
    told = refused("train", "--recipe", recipe, "--run", tmp_path / "run")
    assert "glob is no local loss, and greedy training needs one" in told
    assert not (tmp_path / "run/stage0").exists()
