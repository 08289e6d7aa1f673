"""`greedy evaluate --by-stage`: how error falls with depth."""

import pytest
import torch
from command_line import answer, greedy, refused, small_recipe, train
from few import DATA, TEST, TRAIN
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, RunDirectory, evaluate
from greedy.losses import LocalHeads, Pred
from greedy.results.exits import Exit, Exits, evaluate_exits

RECIPE = small_recipe(
    data={"name": "few:sets"},
    model={
        "network": "vgg8b",
        "feature_multiplier": 0.04,
        "hidden_layers": None,
        "hidden_width": 32,
    },
    training={"batch_size": 50},
    store={"views": 1},
)
CPU = torch.device("cpu")


def mlp(hidden_layers):
    model = {"hidden_layers": hidden_layers, "hidden_width": 32}
    return small_recipe(model=model, training={"batch_size": 128}, store={"views": 1})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), RECIPE, *DATA)


def of_assembled(run, split, until_stage):
    trainer = GreedyTrainer.from_recipe(RunDirectory.open(run).recipe, run, device="cpu")
    network = trainer.assemble(until_stage=until_stage)
    evaluation = evaluate(trainer.run, network, split, CPU)
    return evaluation, sum(each.numel() for each in network.parameters())


@pytest.mark.parametrize("split", ["test", "train"])
def test_every_exit_is_the_network_assembled_until_there(run, split):
    document = answer("evaluate", "--run", run, "--by-stage", "--split", split)
    assert document["split"] == split
    assert document["samples"] == {"test": TEST, "train": TRAIN}[split]
    exits = document["exits"]
    assert [each["stage"] for each in exits] == list(range(1, 9))
    names = RunDirectory.open(run).record(0).network
    assert [each["name"] for each in exits] == names
    for each in exits:
        expected, parameters = of_assembled(run, split, each["stage"])
        # On the way to the last exit, in other batches: a few images may stand between two classes.
        assert each["error_percent"] == pytest.approx(expected.error_percent, abs=0.5)
        assert each["loss"] == pytest.approx(expected.loss, rel=1e-4)
        assert each["parameters"] == parameters


def test_operations_are_multiply_adds_with_the_classifiers(run):
    exits = answer("evaluate", "--run", run, "--by-stage")["exits"]
    first = 28 * 28 * 9 * 5  # 5 channels of 3x3
    classifier = 5 * 14 * 28 * 10  # after pooling to at most 2048 values
    assert exits[0]["operations"] == first + classifier
    second = 28 * 28 * 9 * 5 * 10
    assert exits[1]["operations"] == first + second + 10 * 14 * 14 * 10
    linear = exits[7]["operations"] - (exits[6]["operations"] - 32 * 10)
    assert linear == 32 * 10


def test_which_early_exit_loses_little(run):
    document = answer("evaluate", "--run", run, "--by-stage", "--lose", 90)
    *early, whole = document["exits"]
    limit = whole["error_percent"] + 90  # whatever they learn
    near = [each for each in early if each["error_percent"] < limit]
    chosen = min(near, key=lambda each: each["operations"])
    assert document["lose_points"] == 90
    assert document["cheapest_stage"] == chosen["stage"]
    lost = chosen["error_percent"] - whole["error_percent"]
    saved = 100 - 100 * chosen["operations"] / whole["operations"]
    result = greedy("evaluate", "--run", run, "--by-stage", "--lose", 90)
    change = f"loses {lost:.2f}" if lost >= 0 else f"is better by {-lost:.2f}"
    said = f"stage {chosen['stage']} {change} points and saves {saved:.1f} % of the operations"
    assert result.output.splitlines()[-1] == said
    assert max(map(len, result.output.splitlines())) <= 80
    none = greedy("evaluate", "--run", run, "--by-stage", "--lose", -100)
    assert none.output.splitlines()[-1] == "no early exit loses less than -100 points"


def test_the_cheapest_exit_is_the_one_of_fewest_operations():
    rows = [(30.0, 5), (None, 9), (20.5, 40), (20.2, 35), (20.0, 50)]
    exits = [Exit(n, "conv", error, error, 1, cost) for n, (error, cost) in enumerate(rows, 1)]
    all_exits = Exits("test", 10, exits)
    cheapest = {lose: all_exits.cheapest(lose) for lose in (0.1, 0.4, 1.0, 11.0)}
    assert cheapest == {0.1: None, 0.4: exits[3], 1.0: exits[3], 11.0: exits[0]}
    assert all_exits.points_lost(exits[2]) == 0.5


@pytest.mark.parametrize("settings", [("--set", "loss.name=sim"), ("--strategy", "backprop")])
def test_stages_without_a_local_classifier_have_a_dash(tmp_path, settings):
    run = train(tmp_path, mlp(2), *settings)
    first, second, whole = answer("evaluate", "--run", run, "--by-stage")["exits"]
    for each in (first, second):
        assert each["error_percent"] is None and each["loss"] is None
        assert each["parameters"] > 0 and each["operations"] > 0
    figures = answer("evaluate", "--run", run)
    assert whole["error_percent"] == pytest.approx(figures["error_percent"], abs=0.5)
    lines = greedy("evaluate", "--run", run, "--by-stage").output.splitlines()
    assert lines[1].split()[2:4] == ["-", "-"]
    assert lines[-1] == "no early exit loses less than 1 point"
    told = refused("export", "--run", run, "--to", tmp_path / "x.pt2", "--until-stage", "1")
    assert "stage 1 has no local classifier" in told


class Deep(Pred):
    """The prediction loss with a classifier of its own."""

    def heads(self, shape, num_classes):
        width = shape[0] * (shape[1] * shape[2] if len(shape) == 3 else 1)
        own = nn.Sequential(nn.Flatten(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, num_classes))
        return LocalHeads(prediction=own)


def test_from_python_with_an_own_loss_and_network(tmp_path):
    images = torch.randint(0, 256, (300, 1, 6, 6), dtype=torch.uint8)
    samples = TensorDataset(images, torch.arange(300) % 3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    loss = Deep()
    trainer = GreedyTrainer(
        model, run_dir=tmp_path / "run", loss=loss, epochs=1, batch_size=50, device="cpu"
    )
    trainer.fit(samples, samples)
    exits = evaluate_exits(trainer.run, loss, model, "test", CPU)
    first, whole = exits.exits
    for each, until in ((first, 1), (whole, None)):
        expected = evaluate(trainer.run, trainer.assemble(until_stage=until), "test", CPU)
        assert each.error_percent == pytest.approx(expected.error_percent, abs=1)
    assert first.parameters == (4 * 9 + 4) + (64 * 8 + 8) + (8 * 3 + 3)
    assert first.operations == 16 * 4 * 9 + 64 * 8 + 8 * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lose", "2"], "--lose is for early exits: give --by-stage with it"),
        (["--by-stage", "--split", "validation"], "'validation' is not a split"),
        (["--by-stage", "--lose", "few"], "'few' is not a valid float"),
    ],
)
def test_mistakes(run, arguments, message):
    assert message in refused("evaluate", "--run", run, *arguments)


def test_a_damaged_stage_is_no_missing_classifier(tmp_path):
    run = train(tmp_path, mlp(1))
    heads = run / "stage1/heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-1] + b"\x7f")
    assert str(heads) in refused("evaluate", "--run", run, "--by-stage")
