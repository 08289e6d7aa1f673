"""Recipes: the shipped ones compared with the paper's table, and the fields that decide results."""

import csv
import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from greedy import recipes
from greedy.base.errors import UserError
from greedy.recipes import explain, milestones, schema

DATASETS = {
    "MNIST": "mnist",
    "FashionMNIST": "fashion-mnist",
    "KMNIST": "kmnist",
    "CIFAR10": "cifar10",
    "CIFAR100": "cifar100",
    "SVHN": "svhn",
    "STL10": "stl10",
}
MEAN_STD = {
    "mnist": ([0.1307], [0.3081]),
    "fashion-mnist": ([0.286], [0.353]),
    "kmnist": ([0.1904], [0.3475]),
    "cifar10": ([0.424, 0.415, 0.384], [0.283, 0.278, 0.284]),
    "cifar100": ([0.438, 0.418, 0.377], [0.300, 0.287, 0.294]),
    "svhn": ([0.431, 0.430, 0.446], [0.197, 0.198, 0.199]),
    "stl10": ([0.447, 0.440, 0.407], [0.260, 0.257, 0.271]),
}
STRATEGIES = {"glob": "backprop", "glob+sim": "glob+sim"}
PUBLISHED = {
    400: [200, 300, 350, 375],
    200: [100, 150, 175, 188],
    100: [50, 75, 89, 94],
}

CITED = {  # figures of other works in the paper's tables
    "fashion-mnist/wrn-28-10-glob": (2, 4.63),
    "fashion-mnist/wrn-28-10-glob-erasing": (2, 4.16),
    "kmnist/preact-resnet18-glob": (3, 2.18),
    "kmnist/preact-resnet18-glob-manifold-mixup": (3, 1.17),
    "cifar10/wrn-40-10-glob": (4, 3.87),
    "cifar10/wrn-40-10-glob-cutout": (4, 3.08),
    "cifar100/wrn-40-10-glob": (6, 18.8),
    "cifar100/wrn-40-10-glob-cutout": (6, 18.4),
    "svhn/wrn-16-8-glob": (7, 1.6),
    "svhn/wrn-16-8-glob-cutout": (7, 1.3),
}
UNPUBLISHED = {
    "demo",
    "fashion-mnist/wrn-28-10-predsim",
    "kmnist/preact-resnet18-predsim",
    "cifar10/wrn-40-10-predsim",
    "cifar100/wrn-40-10-predsim",
    "svhn/wrn-16-8-predsim",
    "stl10/wrn-16-8-predsim",
    *(
        f"{data}/{network}-auglocal"
        for data in ("cifar10", "svhn", "stl10")
        for network in ("resnet32-k16", "resnet110-k55")
    ),
    "imagenet/resnet50-predsim",
    "imagenet/vgg16-predsim",
    *(
        f"{data}/{network}-predsim"
        for data in ("cifar10", "cifar100", "svhn", "stl10")
        for network in ("resnet32-k16", "resnet110-k55")
    ),
}

Row = dict[str, str]
Write = Callable[[str, str], Path]


def published() -> list[Row]:
    path = Path(__file__).parent / "data" / "experiments.csv"
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def recipe_name(row: Row) -> str:
    factor = "" if row["feature_multiplier"] == "1" else f"-{row['feature_multiplier']}x"
    cutout = "" if row["cutout_length"] == "0" else "-cutout"
    loss = row["loss"].replace("+", "-")
    return f"{DATASETS[row['dataset']]}/{row['model']}{factor}-{loss}{cutout}"


# The shipped recipes


@pytest.mark.parametrize("row", published(), ids=recipe_name)
def test_each_published_figure_has_its_recipe(row: Row) -> None:
    recipe = recipes.load(recipe_name(row))
    mean, std = MEAN_STD[DATASETS[row["dataset"]]]
    assert recipe.name == recipe_name(row)
    assert recipe.seed == 0
    assert recipe.data == schema.Data(
        name=DATASETS[row["dataset"]],
        augmentation=row["augmentation"],
        cutout_length=int(row["cutout_length"]),
        classes_per_batch=int(row["classes_per_batch"]),
        mean=mean,
        std=std,
    )
    assert recipe.model.model_dump() == {
        "network": row["model"],
        "feature_multiplier": float(row["feature_multiplier"]),
        "hidden_layers": int(row["hidden_layers"]),
        "hidden_width": int(row["hidden_width"]),
        "dropout": float(row["dropout"]),
        "activation": row["activation"],
        "initial_weights": None,
        "stage_layers": 1,
        "stages": "auto",
    }
    assert recipes.loss_label(recipe) == row["loss"]
    assert recipe.loss.model_dump() == {
        "name": row["loss"].removeprefix("glob+"),
        "beta": float(row["beta"] or 0.99),
        "pred_pool_target": int(row["pred_pool_target"] or 2048),
        "pred_hidden_layers": 0,
        "auxiliary": "none",
        "target_projection": 128,
        "label_smoothing": 0.0,
        "class_weights": None,
    }
    assert recipe.training.model_dump() == {
        "strategy": STRATEGIES.get(row["loss"], "greedy"),
        "accumulate": 1,
        "exact": False,
        "optimizer": "adam",
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 0.0,
        "schedule": "steps",
        "warmup_epochs": 0,
        "gradient_clip": 0.0,
        "epochs": int(row["epochs"]),
        "batch_size": 128,
        "learning_rate": float(row["learning_rate"]),
        "milestones": PUBLISHED[int(row["epochs"])],
        "lr_decay": 0.25,
        "patience": 0,
        "test_every": 1,
        "checkpoint_minutes": 10,
        "precision": "auto",
        "compile": "auto",
        "deterministic": False,
    }
    assert recipe.paper is not None
    assert recipe.paper.table == int(row["table"])
    assert recipe.paper.test_error_percent == float(row["test_error_percent"])
    assert recipe.paper.cited is None


def test_names_are_the_published_figures_the_cited_and_few_others() -> None:
    assert len(published()) == 93
    assert recipes.names() == sorted([*map(recipe_name, published()), *CITED, *UNPUBLISHED])


@pytest.mark.parametrize("name", CITED)
def test_a_cited_figure_is_that_of_back_propagation_elsewhere(name: str) -> None:
    recipe = recipes.load(name)
    assert (recipe.training.strategy, recipe.loss.name) == ("backprop", "glob")
    assert (recipe.training.optimizer, recipe.model.activation) == ("sgd", "relu")
    assert (recipe.paper.table, recipe.paper.test_error_percent) == CITED[name]
    assert "arXiv" in recipe.paper.cited
    assert recipes.departures(recipe) == []


def test_what_is_unpublished_has_no_figure() -> None:
    assert not [name for name in UNPUBLISHED if recipes.load(name).paper]


def test_every_table_has_its_recipes() -> None:
    cited = [(table, name) for name, (table, _) in CITED.items()]
    own = [(int(row["table"]), recipe_name(row)) for row in published()]
    for number in range(1, 10):
        rows = [name for table, name in own + cited if table == number]
        assert recipes.of_table(number) == sorted(rows)
    with pytest.raises(UserError, match="no recipes of a table 10: choose from 1, 2, 3"):
        recipes.of_table(10)


def test_description_is_plain_data() -> None:
    rows = json.loads(json.dumps(recipes.describe()))
    assert [row["name"] for row in rows] == recipes.names()
    by_name = {row["name"]: row for row in rows}
    assert by_name["cifar10/vgg11b-3x-predsim-cutout"] == {
        "name": "cifar10/vgg11b-3x-predsim-cutout",
        "table": 4,
        "dataset": "cifar10",
        "network": "vgg11b-3x",
        "loss": "predsim",
        "paper_test_error_percent": 3.6,
    }
    assert by_name["cifar100/vgg11b-glob-sim"]["loss"] == "glob+sim"
    assert by_name["demo"]["network"] == "vgg8b-0.25x"
    assert by_name["demo"]["table"] is None
    assert by_name["demo"]["paper_test_error_percent"] is None


@pytest.mark.parametrize("name", recipes.names())
def test_toml_round_trip(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name)
    path = tmp_path / "run.toml"
    path.write_text(recipes.to_toml(recipe))
    assert recipes.load(path) == recipe
    assert recipes.from_document(tomllib.loads(recipes.to_toml(recipe))) == recipe


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**63 - 1),
    epochs=st.integers(1, 1000) | st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    learning_rate=st.floats(1e-12, 10),
    dropout=st.floats(0, 1, exclude_max=True),
    budget=st.none() | st.sampled_from(["0B", "4GiB", "1.5 TB"]),
)
def test_toml_round_trip_of_any_values(
    seed: int,
    epochs: milestones.Epochs,
    learning_rate: float,
    dropout: float,
    budget: str | None,
) -> None:
    recipe = recipes.from_document(
        {
            "extends": "demo",
            "name": 'a "name" \\ with = signs',
            "seed": seed,
            "model": {"dropout": dropout},
            "training": {"epochs": epochs, "learning_rate": learning_rate},
            "store": {"ram_budget": budget},
        }
    )
    assert recipes.from_document(tomllib.loads(recipes.to_toml(recipe))) == recipe


# The schema


def test_every_field_is_described_and_its_values_can_be_told() -> None:
    for section, model in schema.SECTIONS.items():
        for field, info in model.model_fields.items():
            assert info.description, f"{section}.{field}"
            assert explain.allowed(f"{section}.{field}")
    assert set(schema.SECTIONS) | {"name", "seed"} == set(schema.Recipe.model_fields)


def test_recipes_are_frozen() -> None:
    recipe = recipes.load("demo")
    with pytest.raises(ValidationError):
        recipe.training.epochs = 3


def test_milestones_beyond_the_epochs_are_a_mistake() -> None:
    with pytest.raises(UserError) as raised:
        recipes.load("demo", ["training.epochs=5", "training.milestones=[4, 9]"])
    assert str(raised.value) == (
        "demo: training.milestones is [4, 9] but must rise without repeats, "
        "from at least 1 to less than 5"
    )


def test_result_fields_leave_out_what_the_machine_decides() -> None:
    fields = recipes.result_fields(recipes.load("demo", ["training.epochs=5"]))
    assert fields["seed"] == 0
    assert fields["training.milestones"] == [3, 4]
    sections = {key.partition(".")[0] for key in fields}
    assert sections == {"seed", "data", "model", "loss", "training", "store"}
    assert {key for key in fields if key.startswith("store")} == {
        "store.views",
        "store.reuse",
        "store.encoding",
    }


def test_differences_are_those_of_the_result() -> None:
    five = "training.epochs=5"
    demo = recipes.load("demo", [five])
    machine = ["store.compressor=none", "store.ram_budget=1GB", "name=x"]
    machine += ["training.compile=on", "training.deterministic=true"]
    assert recipes.differences(demo, recipes.load("demo", [five, *machine])) == []
    other = recipes.load("demo", ["seed=2", "training.epochs=8", "store.views=1"])
    assert recipes.differences(demo, other) == [
        ("seed", 0, 2),
        ("training.epochs", 5, 8),
        ("training.milestones", [3, 4], [4, 6, 7]),
        ("store.views", 2, 1),
    ]


# The paper's figure beside another


def test_departures_from_the_figures_own_recipe() -> None:
    """Two figures of table 6 occur twice; the recipe's name tells which one is meant."""
    for name, factor in (("cifar100/vgg11b-2x-sim", 3), ("cifar100/vgg11b-3x-sim", 2)):
        other = recipes.load(name, [f"model.feature_multiplier={factor}"])
        assert recipes.departures(other) == ["model.feature_multiplier"]


def test_departures_of_a_file_are_from_the_nearest_with_its_figure(write: Write) -> None:
    path = write("own.toml", 'extends = "cifar100/vgg11b-3x-sim"\n[training]\nbatch_size = 64\n')
    assert recipes.departures(recipes.load(path)) == ["training.batch_size"]


def test_training_jointly_is_how_local_losses_were_published() -> None:
    joint = ["training.strategy=joint"]
    assert recipes.departures(recipes.load("mnist/mlp-pred", joint)) == []
    assert recipes.departures(recipes.load("mnist/mlp-glob", joint)) == ["training.strategy"]


def test_fields_that_came_later_leave_earlier_runs_what_they_are() -> None:
    plain = recipes.load("demo")
    later = {"data.background", "data.broken", "data.max_pixels"}
    for same in (plain, recipes.load("demo", ["data.max_pixels=100"])):
        assert not later & recipes.result_fields(same).keys()
    black = recipes.load("demo", ["data.background=black", "data.max_pixels=100"])
    assert recipes.result_fields(black)["data.background"] == "black"
    assert recipes.differences(plain, black) == [("data.background", "white", "black")]
    assert recipes.differences(black, plain) == [("data.background", "black", "white")]


def test_fields_that_came_later_decide_a_result_once_they_are_set() -> None:
    plain, black = recipes.load("demo"), recipes.load("demo", ["data.background=black"])
    assert "data.background" not in recipes.result_fields(plain)  # as runs from before have it
    assert recipes.differences(plain, black) == [("data.background", "white", "black")]
    assert recipes.differences(black, plain) == [("data.background", "black", "white")]


def test_the_size_above_which_images_are_skipped_decides_a_result() -> None:
    skip = ["data.broken=skip"]
    plain, smaller = recipes.load("demo", skip), recipes.load("demo", [*skip, "data.max_pixels=9"])
    assert recipes.differences(plain, smaller) == [("data.max_pixels", 178_956_970, 9)]
