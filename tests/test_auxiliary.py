"""Prediction heads whose layers stand for the network's later stages."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import answer, refused, said, small_recipe
from few import DATA
from interrupting import StopAfter
from safetensors.torch import load_file
from small_training import CLASSES, TEST, TRAIN, convolutional, learned, new_trainer
from torch import nn

from greedy import GreedyTrainer, UserError, evaluate
from greedy.base.errors import Interrupted
from greedy.losses import LocalHeads, Pred, PredictionHead, PredSim
from greedy.losses.auxiliary import later_stages
from greedy.losses.strategies import stage_losses
from greedy.models import Shape, cut, shapes, vgg8b
from greedy.recipes import load
from greedy.recipes.identity import LATER_FIELDS, recipe_digest, result_fields
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.step import Learner, gradients
from greedy.stores.source import Batch

CPU = torch.device("cpu")
NARROW = small_recipe(
    data={"name": "few:sets"},
    model={
        "network": "vgg8b",
        "feature_multiplier": 0.04,
        "hidden_layers": None,
        "hidden_width": 32,
    },
    loss={"auxiliary": "downstream:2"},
    training={"epochs": 2, "batch_size": 50, "learning_rate": 0.005},
    store={"views": 1},
)


# Which stages a head stands for


@pytest.mark.parametrize(
    ("number", "count", "most", "expected"),
    [
        (1, 16, 1, [16]),
        (1, 16, 2, [9, 16]),
        (1, 16, 3, [6, 11, 16]),
        (7, 16, 3, [10, 13, 16]),
        (8, 16, 3, [12, 16]),  # the depth falls to half of what is beyond one layer
        (13, 16, 9, [14, 15, 16]),
        (15, 16, 2, [16]),
        (16, 16, 2, []),
        (1, 2, 5, [2]),
        (1, 1, 5, []),
    ],
)
def test_stages_are_chosen_evenly_up_to_the_last(
    number: int, count: int, most: int, expected: list[int]
) -> None:
    assert later_stages(number, count, most) == expected


@pytest.mark.parametrize("most", range(1, 20))
def test_later_stages_have_no_deeper_heads(most: int) -> None:
    chosen = [later_stages(number, 16, most) for number in range(1, 17)]
    depths = [len(numbers) for numbers in chosen]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == min(most, 15)
    for number, numbers in enumerate(chosen, start=1):
        assert numbers == sorted(set(numbers))
        assert not numbers or number < numbers[0] <= numbers[-1] == 16
        gaps = [b - a for a, b in zip([number, *numbers], numbers, strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1


# The layers of a head


def narrow_vgg8b() -> nn.Sequential:
    torch.manual_seed(0)
    return vgg8b(1, 28, 10, feature_multiplier=0.04, hidden_width=32, dropout=0.1)


def test_a_head_has_the_shapes_of_the_later_stages() -> None:
    hidden = [shape.hidden for shape in shapes(cut(narrow_vgg8b()), (1, 28, 28))]
    assert hidden == [
        (5, 28, 28), (10, 28, 28), (10, 14, 14), (20, 14, 14), (20, 7, 7), (20, 3, 3), (32,), (10,)
    ]  # fmt: skip
    losses = stage_losses("greedy", PredSim(auxiliary="downstream:2"), hidden)
    assert [loss.later for loss in losses[:-1]] == [
        ((20, 14, 14), (32,)),
        ((20, 14, 14), (32,)),
        ((20, 7, 7), (32,)),
        ((20, 3, 3), (32,)),
        ((20, 3, 3), (32,)),
        ((32,),),
        (),
    ]
    head = losses[0].heads(hidden[0], 10).prediction
    kinds = [[type(module) for module in layer] for layer in (head.later1, head.later2)]
    assert kinds == [
        [nn.Conv2d, nn.BatchNorm2d, nn.ReLU],
        [nn.AvgPool2d, nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU],
    ]
    h = torch.randn(4, 5, 28, 28)
    assert head.later1(h).shape == (4, 20, 14, 14)
    assert head.later2[:2](head.later1(h)).shape == (4, 20 * 7 * 14)  # at most 2048 values
    assert head(h).shape == (4, 10)
    assert list(head.state_dict())[-2:] == ["classifier.weight", "classifier.bias"]
    plain = losses[6].heads(hidden[6], 10).prediction
    assert list(plain.state_dict()) == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    ("shape", "later", "given"),
    [
        ((4, 32, 32), [(8, 32, 32), (8, 8, 8), (16, 8, 8)], [(8, 32, 32), (8, 16, 16), (16, 8, 8)]),
        ((4, 7, 5), [(6, 4, 3)], [(6, 4, 3)]),
        ((4, 8, 8), [(6, 6, 6)], [(6, 8, 8)]),  # stride 2 would give fewer positions
        ((4, 1, 1), [(6, 1, 1)], [(6, 1, 1)]),
        ((4, 8, 8), [(16, 12)], [(12, 4, 4)]),  # tokens after maps
        ((9, 6), [(9, 8), (5, 7)], [(9, 8), (9, 7)]),
        ((9, 6), [(8,), (7,)], [(8,), (7,)]),
        ((12,), [(8,), (7,)], [(8,), (7,)]),
    ],
)
def test_every_kind_of_layer_follows_every_other(
    shape: Shape, later: list[Shape], given: list[Shape]
) -> None:
    head = PredictionHead(shape, CLASSES, 2048, later=later)
    h = torch.randn(4, *shape)
    before = h.clone()
    for number, expected in enumerate(given, start=1):
        inner = nn.Sequential(*list(head)[:number])(h)
        assert inner.shape[1:] == expected
        assert not (inner < 0).any() and (inner > 0).any()
    assert head(h).shape == (4, CLASSES)
    assert torch.equal(h, before)


@pytest.mark.parametrize(
    ("shape", "later"),
    [((2, 4, 4), ((3, 2, 2), (4,))), ((4, 2), ((4, 3), (4, 5))), ((5,), ((4,), (3,)))],
)
def test_gradients_in_float64(shape: Shape, later: tuple[Shape, ...]) -> None:
    torch.manual_seed(0)
    head = Pred(auxiliary="downstream:2", later=later).heads(shape, CLASSES).prediction.double()
    nn.init.normal_(head.classifier.weight)
    h = torch.randn(6, *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, h)


# The memory modes


def learner_of(stage_network: nn.Sequential, image: Shape, loss: PredSim) -> Learner:
    torch.manual_seed(1)
    stages = cut(stage_network)
    hidden = [shape.hidden for shape in shapes(stages, image)]
    own = stage_losses("greedy", loss, hidden)[0]
    heads = own.heads(hidden[0], CLASSES).double()
    nn.init.normal_(heads.prediction.classifier.weight)
    learner = Learner(stages[0].double(), heads, own, CLASSES, "float32", shape=hidden[0])
    learner.train()
    return learner


NETWORKS = {
    "maps": (
        (2, 8, 8),
        [nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)],
        [nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), nn.ReLU()],
    ),
    "vectors": (
        (9,),
        [nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU()],
        [nn.Linear(8, 8), nn.ReLU()],
    ),
    "tokens": ((4, 6), [nn.Linear(6, 8), nn.ReLU()], [nn.Linear(8, 2), nn.ReLU(), nn.Flatten()]),
}


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.PLAIN])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_mode_gives_what_autograd_gives(kind: str, mode: Mode) -> None:
    shape, first, then = NETWORKS[kind]
    network = nn.Sequential(*first, *then, nn.Linear(8, CLASSES))

    def measured(memory: StepMemory) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        learner = learner_of(deepcopy(network), shape, PredSim(0.5, auxiliary="downstream:2"))
        learner.memory = memory
        x = torch.randn(12, *shape, dtype=torch.float64)
        loss, _ = gradients(learner, Batch(torch.arange(12) % CLASSES, x.__getitem__))
        tensors = {"loss": loss}
        for name, module in (("stage", learner.stage), ("heads", learner.heads)):
            tensors |= {f"{name}.{k}.grad": p.grad for k, p in module.named_parameters()}
            tensors |= {f"{name}.{k}": b for k, b in module.named_buffers()}
        return tensors

    expected = measured(StepMemory(Mode.PLAIN))
    later = [name for name in expected if "later" in name and name.endswith("grad")]
    assert later and all(expected[name].abs().max() > 1e-6 for name in later)
    for micro_batch in (1, 5):
        ours = measured(StepMemory(mode, micro_batch))
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a narrow VGG8B trained on images of the sample that ships."""
    folder = tmp_path_factory.mktemp("auxiliary")
    (folder / "narrow.toml").write_text(NARROW)
    said("train", "--recipe", folder / "narrow.toml", *DATA, "--run", folder / "run")
    return folder / "run"


def trained_stages(run: Path) -> list[dict[str, Any]]:
    return [stage for stage in answer("status", "--run", run)["stages"] if stage["stage"]]


def test_a_narrow_vgg_learns_with_later_layers(run: Path) -> None:
    stages = trained_stages(run)
    assert all(stage["state"] == "complete" for stage in stages)
    assert all(learned(run, number) for number in range(1, 9))
    assert stages[0]["test_error_percent"] < 60  # chance is 90
    tensors = load_file(run / "stage1/heads.safetensors")
    assert tensors["prediction.later1.0.weight"].shape == (20, 5, 3, 3)
    assert int(tensors["prediction.later2.3.num_batches_tracked"]) == 2 * 20  # of 50 rows each
    assert tensors["prediction.later2.2.weight"].std() > 0
    assert "prediction.later1.0.weight" not in load_file(run / "stage7/heads.safetensors")


def test_early_exits_go_through_them(run: Path, tmp_path: Path) -> None:
    stages = trained_stages(run)
    document = answer("evaluate", "--run", run, "--by-stage")
    for stage, exit in zip(stages, document["exits"], strict=True):
        # Computed in other batches: a few of the 1,000 images may stand between two classes.
        assert exit["error_percent"] == pytest.approx(stage["test_error_percent"], abs=0.5)
    first, convolution = 28 * 28 * 9 * 5, 14 * 14 * 9 * 5 * 20
    linear, classifier = 20 * 7 * 14 * 32, 32 * 10
    assert document["exits"][0]["operations"] == first + convolution + linear + classifier
    said("export", "--run", run, "--to", tmp_path / "early.pt2", "--until-stage", 1)
    exported = torch.export.load(tmp_path / "early.pt2").module()
    assert exported(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    said("export", "--run", run, "--to", tmp_path / "early.safetensors", "--until-stage", 2)
    said("plot", run, "--similarity", "--to", tmp_path / "matrices.svg")


def test_the_run_keeps_them(run: Path) -> None:
    recipe = run.parent / "narrow.toml"
    changed = "--set", "loss.auxiliary=none"
    told = refused("train", "--recipe", recipe, *DATA, "--run", run, *changed)
    assert "(loss.auxiliary is 'downstream:2' there, 'none' here)" in told


@pytest.mark.parametrize("strategy", ["greedy", "joint"])
def test_a_stopped_run_ends_with_the_same_bytes(tmp_path: Path, strategy: str) -> None:
    def trainer(name: str, **settings: object) -> GreedyTrainer:
        loss = PredSim(0.9, pool_target=60, auxiliary="downstream:2")
        fixed = {"epochs": 3, "views": 1, "strategy": strategy, "checkpoint_minutes": 0}
        return new_trainer(tmp_path / name, convolutional(), loss=loss, **fixed, **settings)

    whole = trainer("whole")
    records = whole.fit(TRAIN, TEST)
    with pytest.raises(Interrupted):
        trainer("cut", reporter=StopAfter(17)).fit(TRAIN, TEST)
    resumed = trainer("cut")
    resumed.fit(TRAIN, TEST)
    for number, record in enumerate(records, start=1):
        for file in ("encoder.safetensors", "heads.safetensors"):
            paths = [each.run.stage_dir(number) / file for each in (whole, resumed)]
            assert paths[0].read_bytes() == paths[1].read_bytes()
        assert learned(tmp_path / "whole", number)
        until = number if number < len(records) else None
        figures = evaluate(resumed.run, resumed.assemble(until), "test", CPU)
        assert figures.error_percent == pytest.approx(record.metrics.test_error_percent, abs=3)
    heads = load_file(whole.run.stage_dir(1) / "heads.safetensors")
    assert heads["prediction.later1.2.weight"].shape == (16, 48)  # 6 maps, pooled


def test_a_plan_counts_them(tmp_path: Path) -> None:
    recipe = tmp_path / "narrow.toml"
    recipe.write_text(NARROW)
    planned = answer("plan", "--recipe", recipe, *DATA)["stages"]
    plain = answer("plan", "--recipe", recipe, *DATA, "--set", "loss.auxiliary=none")["stages"]
    convolution, linear = 9 * 5 * 20 + 2 * 20, 20 * 7 * 14 * 32 + 2 * 32
    classifier, was = 32 * 10 + 10, 5 * 14 * 28 * 10 + 10
    assert planned[0]["parameters"] - plain[0]["parameters"] == (
        convolution + linear + classifier - was
    )
    for now, before in zip(planned[:6], plain[:6], strict=True):
        assert now["flops"] > before["flops"]
        assert now["peak_memory_bytes"] > before["peak_memory_bytes"]
        assert not now["why_plain"]
    assert planned[6:] == plain[6:]


# Recipes


def test_older_recipes_and_runs_are_what_they_were() -> None:
    recipe = load("demo")
    assert "loss.auxiliary" not in result_fields(recipe)
    assert LATER_FIELDS["loss.auxiliary"] == "none"
    deeper = load("demo", ["loss.auxiliary=downstream:2"])
    assert result_fields(deeper)["loss.auxiliary"] == "downstream:2"
    assert recipe_digest(deeper) != recipe_digest(recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["loss.auxiliary=downstream"],
            'loss.auxiliary is "downstream" but must be none, or downstream: and a number of '
            "layers, such as downstream:2",
        ),
        (["loss.auxiliary=downstream:0"], "such as downstream:2"),
        (["loss.auxiliary=upstream:2"], "such as downstream:2"),
        (
            ["loss.name=sim", "loss.auxiliary=downstream:2"],
            'loss.auxiliary is "downstream:2" but must be none where loss.name is sim',
        ),
        (["loss.name=predsim-bio", "loss.auxiliary=downstream:2"], "none where loss.name is"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, settings: list[str], message: str) -> None:
    given = [part for setting in settings for part in ("--set", setting)]
    assert message in refused("train", "--recipe", "demo", "--run", tmp_path / "run", *given)


def test_mistakes_in_python() -> None:
    with pytest.raises(UserError, match="auxiliary is 'downstream:x' but must be none, or down"):
        PredSim(auxiliary="downstream:x")


def test_a_loss_in_python_is_that_of_the_recipe(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", loss=Pred(auxiliary="downstream:3"))
    assert trainer.recipe.loss.auxiliary == "downstream:3"
    assert trainer.recipe.loss.name == "pred"


class Own(Pred):
    """A loss of a user's, with heads of its own."""

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return LocalHeads(prediction=nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes)))


def test_a_loss_without_them_is_one_for_all_stages() -> None:
    hidden: list[Shape] = [(4, 6, 6), (5,), (3,)]
    for loss in (Own(), Pred(), PredSim()):
        first, second, _ = stage_losses("greedy", loss, hidden)
        assert first is loss and second is loss
