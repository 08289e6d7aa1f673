"""Recipe files and overrides, and the mistakes in them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from greedy import recipes
from greedy.base.errors import UserError
from greedy.cache.metadata import MAX_VIEWS

Write = Callable[[str, str], Path]


def message(name_or_path: str | Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        recipes.load(name_or_path, overrides)
    return str(caught.value)


# Inheritance


def test_files_extend_shipped_recipes_and_files_beside_them(write: Write) -> None:
    write("shared/wide.toml", 'extends = "cifar10/vgg8b"\n[model]\nfeature_multiplier = 2\n')
    path = write(
        "own/mine.toml",
        'extends = "../shared/wide.toml"\nseed = 5\n'
        '[loss]\nname = "sim"\n[data]\nmean = [0]\nstd = [1]\n',
    )
    recipe = recipes.load(str(path))
    assert recipe.name == "mine"
    assert recipe.seed == 5
    assert recipe.model.feature_multiplier == 2
    assert recipe.model.dropout == 0.2  # from cifar10/vgg8b
    assert recipe.data.name == "cifar10"  # from cifar10/base
    assert recipe.data.mean == [0.0]  # lists are replaced, not joined
    assert recipe.paper is None


def test_a_name_is_the_files_own(write: Write) -> None:
    write("base.toml", 'extends = "demo"\nname = "base of all"\n')
    assert recipes.load(write("leaf.toml", 'extends = "base.toml"\n')).name == "leaf"
    assert recipes.load(write("leaf.toml", 'name = "x"\nextends = "base.toml"\n')).name == "x"


def test_an_existing_file_is_a_path_whatever_its_name(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write("saved", 'extends = "demo"\nseed = 9\n').parent)
    assert recipes.load("saved").seed == 9


def test_circles_of_extension_are_refused(write: Write) -> None:
    write("a.toml", 'extends = "b.toml"\n')
    path = write("b.toml", 'extends = "./a.toml"\n')
    assert message(path).startswith("./a.toml: extends b.toml, which extends this recipe in turn: ")
    path = write("self.toml", 'extends = "self.toml"\n')
    assert message(path).endswith(
        "extends self.toml, which extends this recipe in turn: remove one of the two lines"
    )


def test_unknown_recipes_come_with_near_names(write: Write) -> None:
    assert message("dmeo") == "there is no recipe dmeo; did you mean demo?"
    assert "did you mean cifar10/vgg11b-3x-predsim or" in message("cifar10/vgg11-3x-predsim")
    assert message("?") == "there is no recipe ?; `greedy recipes list` shows all"
    path = write("own.toml", 'extends = "svhn/bases"\n')
    assert message(path).startswith("there is no recipe svhn/bases; did you mean svhn/base or")
    assert message(write("own.toml", "extends = 3\n")).endswith(
        "own.toml: extends must be the name or path of one recipe"
    )


def test_a_file_called_like_a_shipped_recipe_does_not_take_its_place(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = recipes.load("demo")
    write("demo", "")
    write("mine", 'extends = "demo"\n')
    monkeypatch.chdir(tmp_path)
    assert recipes.load("demo") == shipped
    assert recipes.load("mine").name == "mine"


def test_shipped_names_do_not_lead_outside() -> None:
    assert message("../recipes/demo").startswith("there is no recipe ../recipes/demo")


def test_unreadable_files(tmp_path: Path, write: Write) -> None:
    missing = tmp_path / "none.toml"
    assert message(missing) == f"the recipe {missing} cannot be read: No such file or directory"
    assert "is not valid TOML" in message(write("bad.toml", "seed = \n"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 in line 1" in message(tmp_path / "bytes.toml")


# Overrides


def test_overrides_are_toml_values_or_plain_strings() -> None:
    recipe = recipes.load(
        "demo",
        [
            "seed=3",
            "model.network=mlp",
            'data.name = "mnist"',
            "data.augmentation=jitter2+hflip",
            "training.learning_rate=[1e-3, 1]",
            "training.epochs = 1_000",
            "store.ram_budget=4GiB",
            "store.views=1",
            "store.views=2",
        ],
    )
    assert recipe.name == "demo"
    assert recipe.seed == 3
    assert recipe.model.network == "mlp"
    assert recipe.data.name == "mnist"
    assert recipe.data.augmentation == "jitter2+hflip"
    assert recipe.training.learning_rate == [0.001, 1.0]
    assert recipe.training.epochs == 1000
    assert recipe.store.ram_budget == "4GiB"
    assert recipe.store.views == 2


@pytest.mark.parametrize("override", ["", "training.epochs", "=3", "training.=3", "a.b.c=1"])
def test_malformed_overrides(override: str) -> None:
    expected = f'the override "{override}" must have the form section.field=value'
    assert message("demo", override) == expected


# Errors


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.epoch=3",
            "training.epoch is not a recipe field; did you mean training.epochs?",
        ),
        ("trainig.epochs=3", "trainig is not a recipe field; did you mean training?"),
        ("epochs=3", "epochs is not a recipe field; did you mean training.epochs?"),
        (
            "training.dropout=0.3",
            "training.dropout is not a recipe field; did you mean model.dropout?",
        ),
        (
            "loss.zzz=1",
            "loss.zzz is not a recipe field; loss has name, beta, pred_pool_target, "
            "pred_hidden_layers, auxiliary, target_projection, label_smoothing, class_weights",
        ),
        (
            "model.network=vgg11",
            'model.network is "vgg11" but must be torchvision:NAME, timm:NAME, module:function or '
            "one of mlp, vgg8b, vgg11b, resnet32, resnet110, preact-resnet18, wrn-16-8, wrn-28-10, "
            "wrn-40-10, python; "
            "did you mean vgg11b?",
        ),
        (
            'training.batch_size="20"',
            'training.batch_size is "20" but must be a whole number of at least 2',
        ),
        (
            "training.epochs=true",
            "training.epochs is true but must be a whole number of at least 1 "
            "or a list of whole numbers of at least 1",
        ),
        ("model.dropout=1", "model.dropout is 1 but must be a number of at least 0 and below 1"),
        ("loss.beta=1.5", "loss.beta is 1.5 but must be a number of at least 0 and at most 1"),
        ("loss.beta=nan", "loss.beta is NaN but must be a number of at least 0 and at most 1"),
        (
            "loss=3",
            "loss must be a section with name, beta, pred_pool_target, pred_hidden_layers, "
            "auxiliary, target_projection, label_smoothing, class_weights",
        ),
        (
            "data.augmentation=hflip+hflip",
            'demo: data.augmentation is "hflip+hflip" but must be '
            "none, or one of jitter2, crop4 and random-resized-crop, and any of hflip, "
            "randaugment, color-jitter and random-erasing, joined by +",
        ),
        (
            "data.mean=[0, 0, 0]",
            "demo: data.std is [0.353] but must have one entry for each entry of data.mean",
        ),
        (
            "store.ram_budget=lots",
            'demo: store.ram_budget is "lots" but must be a size such as 4GiB or 768MiB',
        ),
    ],
)
def test_a_mistake_is_one_sentence(override: str, expected: str) -> None:
    assert message("demo", override) == expected


def test_several_mistakes_are_counted_by_field() -> None:
    text = message("demo", 'training.epochs="20"', "loss.beta=2", "data.cutout_length=-1")
    assert text.startswith("data.cutout_length is -1 but must be")
    assert text.endswith("(and 2 more)")


def test_a_mistake_names_its_file(write: Write) -> None:
    write("base.toml", 'extends = "demo"\n[store]\nview = 3\n')
    path = write("leaf.toml", 'extends = "base.toml"\n')
    assert message(path) == (
        "base.toml: store.view is not a recipe field; did you mean store.views?"
    )


def test_shared_files_are_no_recipes() -> None:
    expected = (
        "cifar10/vgg8b: loss.name is not set but must be one of pred, sim, predsim, pred-bio, "
        "sim-bio, predsim-bio, glob, python"
    )
    assert message("cifar10/vgg8b") == expected


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.epochs=[1, 2]", "training.learning_rate=[1, 2, 3]"],
        ["training.epochs=[10, 20]", "training.milestones=[[1]]"],
        ["training.epochs=0"],
        ["training.epochs=[]"],
        ["training.epochs=2.0"],
        ["training.learning_rate=0"],
        ["training.milestones=[3, 3]"],
        ["training.milestones=[0, 3]"],
        ["model.feature_multiplier=0"],
        ["data.std=[0]"],
        ["data.holdout=0"],
        ["data.augmentation=none+hflip"],
        ["data.augmentation=jitter2+crop4"],
        ['data.augmentation=""'],
        ["store.views=0"],
        [f"store.views={MAX_VIEWS + 1}"],
        ["seed=-1"],
        ["seed=1.0"],
    ],
    ids=" ".join,
)
def test_values_out_of_range(overrides: list[str]) -> None:
    assert overrides[0].partition("=")[0].partition(".")[0] in message("demo", *overrides)


def test_moments_go_with_the_data_set_they_are_of(write: Write):
    write(
        "below.toml",
        '[model]\nnetwork = "mlp"\n[loss]\nname = "pred"\n[data]\nmean = [0.5]\nstd = [0.2]\n'
        "[training]\nepochs = 1\nbatch_size = 8\nlearning_rate = 0.1\n",
    )
    named = write("named.toml", 'extends = "below.toml"\n[data]\nname = "mnist"\n')
    assert recipes.load(named).data.mean == [0.5]
    own = 'extends = "named.toml"\n[data]\nname = "folder:{}"\n'
    assert recipes.load(write("own.toml", own.format("x"))).data.mean is None
    (named.parent / "named.toml").write_text(own.replace("named", "below").format("x"))
    assert recipes.load(write("own.toml", own.format("x"))).data.mean == [0.5]
    assert recipes.load(write("own.toml", own.format("x-sample"))).data.mean is None
    known = recipes.load("cifar10/vgg8b-predsim").data
    assert known.mean and not recipes.load("cifar10/vgg8b-predsim", ["data.name=svhn"]).data.mean
    sample = ["data.name=fashion-mnist-sample"]
    assert recipes.load("fashion-mnist/mlp-predsim", sample).data.mean == [0.286]
    with pytest.raises(UserError, match=r"must be a list of numbers$"):
        recipes.load("cifar10/vgg8b-predsim", ["data.mean="])
    own = recipes.load("cifar10/vgg8b-predsim", ["data.name=folder:photos"]).data
    assert (own.mean, own.std, own.augmentation) == (None, None, known.augmentation)
    given = ["data.name=folder:photos", "data.mean=[0.5, 0.5, 0.5]", "data.std=[1.0, 1.0, 1.0]"]
    assert recipes.load("cifar10/vgg8b-predsim", given).data.mean == [0.5, 0.5, 0.5]
