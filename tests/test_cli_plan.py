"""`greedy plan`: what a run will take, told before anything runs."""

import pytest
from command_line import NETWORKS, answer, greedy, refused, said, small_recipe, times
from pictures import write_classes

MLP = small_recipe(
    data={"augmentation": "hflip"},
    training={"epochs": 2},
    store={"views": 2, "encoding": "float16", "compressor": "none"},
)
OWN = """
import numpy as np


class Digits(list):
    classes = ["0", "1"]


def sets():
    rows = Digits((np.zeros((1, 8, 8), np.uint8), i % 2) for i in range(6))
    return rows, rows


def nameless():
    return list(sets()[0]), list(sets()[1])


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0) if self.training else x


def unusual():
    return nn.Sequential(nn.Conv2d(1, 8, 3), Centred(), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
"""
KEYS = {"stage", "mode", "micro_batch", "peak_memory_bytes", "store_bytes", "flops", "seconds"}
BASELINES = {
    "backprop",
    "backprop_bfloat16",
    "backprop_checkpointed",
    "backprop_accumulated",
    "joint",
}
CONVOLUTIONAL = ("--recipe", "python.toml", "--data", "cifar10", "--model", "own:convolutional")
MIB = 2**20


def planned(*arguments):
    return answer("plan", *arguments)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes a folder with two recipes, and what one of them needs, the current directory."""
    (tmp_path / "mlp.toml").write_text(MLP)
    (tmp_path / "python.toml").write_text(MLP.replace('"mlp"', '"python"'))
    (tmp_path / "own.py").write_text(NETWORKS + OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nothing"))  # no calibration of this machine
    return tmp_path


def test_a_plan_needs_neither_data_nor_device_and_writes_nothing(folder):
    before = times(folder)
    settings = ("--data", "cifar100", "--device", "cuda", "--memory-budget", "1GiB")
    plan = planned("--recipe", "mlp.toml", *settings)
    assert times(folder) == before
    assert [stage["stage"] for stage in plan["stages"]] == [1, 2, 3]
    assert plan["stages"][2]["parameters"] == 17 * 100
    assert all(stage.keys() >= KEYS for stage in plan["stages"])
    assert all(stage["seconds"] is None for stage in plan["stages"])
    assert plan["peak_memory_bytes"] == max(s["peak_memory_bytes"] for s in plan["stages"])
    assert plan["baselines"].keys() == BASELINES
    assert plan["device"] == "cuda"
    assert plan["memory_budget_bytes"] == 1024 * MIB


def test_every_stage_keeps_within_the_budget_in_the_fastest_mode_that_does(folder):
    plan = (*CONVOLUTIONAL, "--device", "cpu")
    ample = planned(*plan, "--memory-budget", "1GiB")
    assert {stage["mode"] for stage in ample["stages"]} == {"plain"}
    assert {stage["micro_batch"] for stage in ample["stages"]} == {256}
    tight = planned(*plan, "--memory-budget", "40MiB")
    for stage, plain in zip(tight["stages"], ample["stages"], strict=True):
        assert stage["peak_memory_bytes"] <= 40 * MIB
        fits = plain["peak_memory_bytes"] <= 40 * MIB
        assert (stage["mode"] == "plain") is fits
        assert stage["flops"] == plain["flops"]
    assert len({stage["mode"] for stage in tight["stages"]}) > 1
    assert tight["baselines"] == ample["baselines"]
    assert tight["baselines"]["backprop"] > 2 * tight["peak_memory_bytes"]


def test_a_budget_that_nothing_meets_is_refused_with_what_it_would_take(folder):
    told = refused("plan", *CONVOLUTIONAL, "--memory-budget", "1MiB", "--device", "cpu")
    message = told.replace("\n", " ")
    assert "stage 1 (conv32) takes at least" in message
    assert "for weights, gradients and the optimiser's state" in message
    assert "--memory-budget" in message


def test_the_figures_of_a_small_network(folder):
    """Known without a computer: an output layer's forward pass and weight gradient are two
    products of 16 x 10 a row; a float16 value takes two bytes."""
    plan = ("--recipe", "mlp.toml", "--device", "cpu", "--set", "training.batch_size=32")
    hidden, _, output = planned(*plan)["stages"]
    assert output["parameters"] == 16 * 10 + 10
    assert output["flops"] == 2 * 2 * 16 * 10 * 5000 * 2
    assert output["store_bytes"] == 0
    norm, heads = 2 * 16, 16 * 16 + 16 * 10 + 10
    assert hidden["parameters"] == 784 * 16 + 16 + norm + heads
    assert hidden["store_bytes"] == (2 * 5000 + 1000) * 16 * 2
    state = 4 * 4 * hidden["parameters"]
    batch = 32 * 784 * 4
    assert state + batch < hidden["peak_memory_bytes"] < 1.5 * (state + batch)


def test_on_a_cpu_the_process_takes_more_than_is_counted(folder):
    """At least its libraries, which torch makes large."""
    plan = planned("--recipe", "mlp.toml", "--device", "cpu")
    assert plan["resident_bytes"] > plan["peak_memory_bytes"] + 100 * MIB
    wide = ("--recipe", "mlp.toml", "--device", "cpu", "--set", "model.hidden_width=4000")
    for precision, share in (("float32", 1.3), ("bfloat16", 1.55)):
        plan = planned(*wide, "--precision", precision)
        assert plan["resident_bytes"] > share * plan["peak_memory_bytes"] + 100 * MIB
    there = planned("--recipe", "mlp.toml", "--device", "cuda", "--memory-budget", "1GiB")
    assert there["resident_bytes"] is None
    assert "the process takes about" in said("plan", "--recipe", "mlp.toml", "--device", "cpu")


def test_settings_are_those_of_train(folder):
    plan = ("--recipe", "mlp.toml", "--device", "cpu")
    usual = planned(*plan)
    longer = planned(*plan, "--set", "training.epochs=6", "--views", "4")
    for stage, before in zip(longer["stages"], usual["stages"], strict=True):
        assert stage["flops"] == 3 * before["flops"]
        assert stage["store_bytes"] >= before["store_bytes"]
    live = planned(*plan, "--views", "live")
    assert {stage["store_bytes"] for stage in live["stages"]} == {0}
    assert live["stages"][2]["replay_flops"] == 2 * (784 * 16 + 16 * 16) * 5000 * 2
    assert usual["replay_flops"] == 0
    held_out = planned(*plan, "--patience", "1")["stages"][2]
    assert held_out["flops"] == 0.9 * usual["stages"][2]["flops"]
    assert "did you mean uint8?" in refused("plan", *plan, "--encoding", "unit8")


def test_a_plan_is_not_kept_from_a_recipe_by_a_run_of_other_settings(folder):
    fresh = planned("--recipe", "mlp.toml", "--device", "cpu")
    settings = ("--set", "training.epochs=1", "--set", "training.batch_size=500", "--seed", "3")
    said("train", "--recipe", "mlp.toml", "--views", "1", *settings, "--device", "cpu")
    before = times(folder)
    again = planned("--recipe", "mlp.toml", "--device", "cpu")
    assert again["stages"] == fresh["stages"]
    assert times(folder) == before
    told = refused("train", "--recipe", "mlp.toml")
    assert told.count(" there, ") == 3 and "and 2 more)" in told


def test_moments_in_host_memory_leave_the_device(folder):
    plan = ("--recipe", "mlp.toml", "--device", "cuda", "--memory-budget", "1GiB")
    here, there = planned(*plan), planned(*plan, "--optimizer-state", "host")
    for a, b in zip(here["stages"], there["stages"], strict=True):
        assert a["peak_memory_bytes"] > b["peak_memory_bytes"]


def test_divided_moments_take_their_share(folder):
    """Half of two moments in float32 of the weights of layer and similarity head."""
    plan = ("--recipe", "mlp.toml", "--set", "model.hidden_width=256", "--processes", 2)
    whole, divided = planned(*plan), planned(*plan, "--optimizer-state", "sharded")
    saved = [
        one["peak_memory_bytes"] - other["peak_memory_bytes"]
        for one, other in zip(whole["stages"], divided["stages"], strict=True)
    ]
    assert saved[0] == (784 + 256) * 256 * 4
    told = refused("plan", *map(str, plan), "--memory-budget", "1MiB")
    assert "--optimizer-state sharded" in told.replace("\n", " ")
    told = refused(
        "plan", *map(str, plan), "--memory-budget", "1MiB", "--optimizer-state", "sharded"
    )
    assert "--optimizer-state sharded" not in told.replace("\n", " ")


def test_a_run_is_planned_from_what_it_has(folder):
    """And its plan for the disk is the one that `train` prints."""
    wide = ("--recipe", "mlp.toml", "--set", "model.hidden_width=256", "--encoding", "float32")
    settings = ("--disk-budget", "22MiB", "--device", "cpu", "--memory-budget", "64MiB")
    before = greedy("plan", *wide, "--run", "run", *settings)
    assert not (folder / "run").exists()
    trained = greedy("train", *wide, "--run", "run", *settings)
    assert trained.exit_code == 0, trained.output
    assert disk_plan(trained) == disk_plan(before)
    assert len(disk_plan(before)) == 2
    standing = times(folder)
    assert "nothing more is written" in greedy("plan", "--run", "run", *settings).output
    plan = planned("--run", "run", *settings)
    assert times(folder) == standing
    figures = [stage["peak_memory_bytes"] for stage in planned(*wide, *settings)["stages"]]
    assert [stage["peak_memory_bytes"] for stage in plan["stages"]] == figures
    told = refused("plan", "--recipe", "mlp.toml", "--run", "run", "--seed", "5")
    assert "belongs to a run with other settings" in told.replace("\n", " ")


def disk_plan(result):
    lines = result.output.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("disk: all stores"))
    return [line for line in lines[start:] if line.startswith("stage ") and "view" in line]


def test_an_image_folder_is_listed_and_one_header_read(folder):
    for split, images in (("train", 3), ("test", 2)):
        write_classes(folder / "images" / split, images, width=20, height=20)
    broken = folder / "images/train/bird/2.png"
    broken.write_bytes(b"no image")
    plan = planned("--recipe", "mlp.toml", "--data", "folder:images", "--device", "cpu")
    output = plan["stages"][-1]
    assert output["parameters"] == 16 * 2 + 2
    assert output["flops"] == 2 * 2 * 16 * 2 * 6 * 2


def test_a_folder_that_is_not_here_is_planned_from_its_stated_size(folder):
    for split, images in (("train", 3), ("test", 2)):
        write_classes(folder / "images" / split, images, width=20, height=20)
    plan = ["--recipe", "mlp.toml", "--device", "cpu", "--set", "data.image_size=16"]
    here = planned(*plan, "--data", "folder:images")
    stated = ["--images", 6, 4, "--classes", 2]
    assert planned(*plan, "--data", "folder:nowhere", *stated)["stages"] == here["stages"]
    told = greedy("plan", *plan, "--data", "folder:nowhere", "--images", 1281167, 50000).output
    assert "stated as --images TRAIN TEST --classes N" in told
    told = refused("plan", *plan[:4], "--data", "folder:nowhere", *stated)
    assert "set data.image_size" in told.replace("\n", " ")
    assert "for folder:PATH alone" in refused("plan", *plan[:4], *stated).replace("\n", " ")
    run = [*plan, "--data", "folder:images", "--run", "run"]
    assert greedy("train", *run).exit_code == 0
    assert "run has its images" in refused("plan", *run, *stated).replace("\n", " ")


def test_a_function_is_called_only_if_it_is_named_here(folder):
    named = MLP.replace("fashion-mnist-sample", "own:sets").replace('"mlp"', '"python"')
    (folder / "own.toml").write_text(named)
    plan = ("plan", "--recipe", "own.toml", "--device", "cpu")
    told = refused(*plan, "--model", "own:unusual")
    assert "add --data own:sets" in told.replace("\n", " ")
    told = refused(*plan, "--data", "own:sets")
    assert "--model module:function" in told.replace("\n", " ")
    assert "classes" in refused(*plan, "--data", "own:nameless", "--model", "own:unusual")
    result = greedy(*plan, "--data", "own:sets", "--model", "own:unusual")
    assert result.exit_code == 0, result.output
    assert "stage 1 has no mode but plain: the module's samples meet elsewhere" in result.output


def test_the_table_fits_a_terminal(folder):
    """That of the largest published network, whose whole step must not get away unnoticed."""
    arguments = ("plan", "--recipe", "cifar10/vgg11b-3x-predsim", "--device", "cuda")
    result = greedy(*arguments, "--precision", "float32", "--memory-budget", "4GiB")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80
    figures = {line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[1] for line in lines[-5:]}
    assert figures["back-propagation, float32"] == "5.6 GiB"
    assert figures["back-propagation, checkpointed by stage"] == "3.7 GiB"
    assert figures["local training of all stages at once"] == "4.8 GiB"


def test_without_a_local_loss_there_is_no_joint_training_to_compare_with(folder):
    plan = planned("--recipe", "mnist/mlp-glob")
    assert plan["baselines"].keys() == BASELINES - {"joint"}
    result = greedy("plan", "--recipe", "mnist/mlp-glob")
    assert result.exit_code == 0 and "local training" not in result.output
