"""Recipes from TOML files: inheritance, overrides, and back to TOML."""

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import tomli_w
from pydantic import ValidationError

from greedy.base.errors import UserError
from greedy.base.files import read_limited
from greedy.base.text import did_you_mean, legible
from greedy.recipes import explain, milestones
from greedy.recipes.identity import differences
from greedy.recipes.networks import NETWORK_FIELDS, is_function
from greedy.recipes.schema import Model, Recipe

SHIPPED: Final = Path(__file__).parent
REQUIRED: Final = ("data", "model", "loss", "training")
JOINT: Final = ("training.strategy", "greedy", "joint")


class _Layer(NamedTuple):
    """The fields that one file sets, or all overrides together."""

    origin: str
    document: dict[str, Any]

    def error(self, message: str) -> UserError:
        return UserError(f"{self.origin}: {message}" if self.origin else message)


def load(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    inherits: bool = True,
    epochs_scale: float = 1,
) -> Recipe:
    """Returns the recipe of that name, or of that file if the argument ends in .toml or names no
    shipped recipe. Overrides such as ``training.epochs=10`` come on top, and ``epochs_scale``
    multiplies the epochs last, to at least 1. Unless it ``inherits``, the file may not extend
    another. Raises ``UserError`` for any mistake in it."""
    path, name = Path(name_or_path), str(name_or_path)
    if path.suffix == ".toml" or (name not in _shipped() and path.is_file()):
        name = legible(path.stem)
    else:
        path = _shipped_path(name, names)
    layer = _Layer(str(name_or_path), _read(path))
    if "extends" in layer.document and not inherits:
        raise layer.error("extends another recipe, and a run's recipe may not: remove that line")
    layers = _layers(layer, path)
    if overrides:
        layers.append(_Layer("", _override_document(overrides)))
    if epochs_scale != 1:
        layers.append(_scaled(_resolved(layers, name), epochs_scale))
    return _resolved(layers, name)


def load_for_model(
    name_or_path: str | Path, model: str | None, overrides: Sequence[str] = ()
) -> Recipe:
    """Returns ``load``'s recipe with the network ``model``, if that is given, without the settings
    of the recipe's network. A recipe whose network was built in Python keeps it, since a function's
    name stands for that."""
    recipe = load(name_or_path, overrides)
    network = recipe.model.network
    if model in (None, network) or (network == "python" and is_function(str(model))):
        return recipe
    defaults = [f"model.{name}={Model.model_fields[name].default}" for name in NETWORK_FIELDS]
    return load(name_or_path, [*defaults, *overrides, f"model.network={model}"])


def from_document(
    document: Mapping[str, Any], name: str = "unnamed", overrides: Sequence[str] = ()
) -> Recipe:
    """Returns the recipe in a parsed TOML document, with overrides on top. The document may extend
    others, by paths relative to the current directory; ``name`` is for one without a name. Raises
    ``UserError`` for any mistake in it."""
    layers = _layers(_Layer("", dict(document)), None)
    if overrides:
        layers.append(_Layer("", _override_document(overrides)))
    return _resolved(layers, name)


def to_toml(recipe: Recipe) -> str:
    """Returns the recipe as TOML, in full; ``load`` gives an equal recipe."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def names() -> list[str]:
    """Returns the shipped recipes that can be run; the files they share name no loss."""
    return list(_names())


def of_table(number: int) -> list[str]:
    """Returns the names of the recipes for the paper's table ``number``. Raises ``UserError`` if
    there are none."""
    tables = {recipe.name: recipe.paper.table for recipe in _recipes() if recipe.paper}
    if number not in tables.values():
        known = ", ".join(map(str, sorted(set(tables.values()))))
        raise UserError(f"there are no recipes of a table {number}: choose from {known}")
    return [name for name, table in tables.items() if table == number]


def describe() -> list[dict[str, Any]]:
    """Returns the ``summary`` of each shipped recipe."""
    return [summary(recipe) for recipe in _recipes()]


def summary(recipe: Recipe) -> dict[str, Any]:
    """Returns a recipe as a table's row: name, table, dataset, network, loss and
    paper_test_error_percent; table and error are None where nothing was published."""
    return {
        "name": recipe.name,
        "table": recipe.paper and recipe.paper.table,
        "dataset": recipe.data.name,
        "network": network_label(recipe.model),
        "loss": loss_label(recipe),
        "paper_test_error_percent": recipe.paper and recipe.paper.test_error_percent,
    }


def departures(recipe: Recipe) -> list[str]:
    """Returns the fields in which a recipe with a published figure differs from the shipped recipe
    of that figure: the one of the same name, or else the nearest. Seed and store do not count,
    since the paper has neither, nor does joint training, which the paper used."""
    published = [other for other in _recipes() if other.paper == recipe.paper]
    same_name = [other for other in published if other.name == recipe.name]
    differing = [_departures(other, recipe) for other in same_name or published]
    return min(differing, key=len, default=["paper"])


def network_label(model: Model) -> str:
    """Returns the network as the paper writes it, for instance ``vgg11b-3x``."""
    factor = 1 if ":" in model.network else model.feature_multiplier
    return model.network if factor == 1 else f"{model.network}-{factor:g}x"


def loss_label(recipe: Recipe) -> str:
    """Returns the loss as the paper writes it; ``glob+sim`` is ``glob`` with ``sim`` in every
    layer."""
    strategy = recipe.training.strategy
    return strategy if strategy == "glob+sim" else recipe.loss.name


def _departures(published: Recipe, recipe: Recipe) -> list[str]:
    return [
        key
        for key, old, new in differences(published, recipe)
        if not key.startswith(("seed", "store.")) and (key, old, new) != JOINT
    ]


@cache
def _recipes() -> list[Recipe]:
    return [load(name) for name in names()]


@cache
def _names() -> tuple[str, ...]:
    return tuple(
        sorted(
            name
            for name, path in _shipped().items()
            if any("loss" in layer.document for layer in _layers(_Layer(name, _read(path)), path))
        )
    )


@cache
def _shipped() -> dict[str, Path]:
    return {
        path.relative_to(SHIPPED).with_suffix("").as_posix(): path
        for path in SHIPPED.rglob("*.toml")
    }


def _shipped_path(name: str, candidates: Callable[[], Iterable[str]]) -> Path:
    path = _shipped().get(name)
    if path is None:
        hint = did_you_mean(name, candidates(), most=3) or "`greedy recipes list` shows all"
        raise UserError(f"there is no recipe {name}; {hint}")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_limited(path).decode())
    except OSError as error:
        raise UserError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"the recipe {path} is nested too deeply: write it flat") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"the recipe {path} is not UTF-8 in line {line}, as TOML must be: save it as UTF-8"
        ) from None
    except ValueError as error:
        raise UserError(f"the recipe {path} is not valid TOML: {error}") from None


def _layers(layer: _Layer, path: Path | None) -> list[_Layer]:
    """Returns the document and all that it extends, ancestors first; ``path`` is the document's
    file."""
    folder = path.parent if path else Path()
    chain = [path.resolve()] if path else []
    layers = [layer]
    while (parent := layers[0].document.pop("extends", None)) is not None:
        if not isinstance(parent, str):
            raise layers[0].error("extends must be the name or path of one recipe")
        is_path = parent.endswith(".toml")
        path = folder / parent if is_path else _shipped_path(parent, _shipped)
        if path.resolve() in chain:
            raise layers[0].error(
                f"extends {parent}, which extends this recipe in turn: remove one of the two lines"
            )
        chain.append(path.resolve())
        folder = path.parent
        document = _read(path)
        document.pop("name", None)  # a name is not inherited
        layers.insert(0, _Layer(parent, document))
    return layers


def _override_document(overrides: Sequence[str]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        section, _, field = key.strip().rpartition(".")
        if not equals or not field or "." in section:
            raise UserError(f'the override "{override}" must have the form section.field=value')
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        document = _merged(document, {section: {field: value}} if section else {field: value})
    return document


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns two documents in one: fields of ``above`` win, sections are joined."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _resolved(layers: Sequence[_Layer], name: str) -> Recipe:
    merged: dict[str, Any] = {"name": name, **{section: {} for section in REQUIRED}}
    for layer in layers:
        _check_alone(layer)
        merged["data"] = _without_moments(merged["data"], layer.document.get("data", {}))
        merged = _merged(merged, _with_milestones(layer, merged["training"]))
    origin = next((layer.origin for layer in reversed(layers) if layer.origin), "")
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise _Layer(origin, merged).error(explain.sentence(error.errors(), merged)) from None


def _check_alone(layer: _Layer) -> None:
    """Raises ``UserError`` for mistakes that no other layer can correct: keys, types and ranges."""
    try:
        Recipe.model_validate(layer.document)
    except ValidationError as error:
        mistakes = [m for m in error.errors() if m["type"] not in ("missing", "value_error")]
        if mistakes:
            raise layer.error(explain.sentence(mistakes, layer.document)) from None


def _without_moments(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the data section of the layers ``below``, without mean and deviation if ``above``
    names another data set than that or its sample: those are measured again."""
    named = {str(layer["name"]) for layer in (above, below) if "name" in layer}
    if len({name if ":" in name else name.removesuffix("-sample") for name in named}) < 2:
        return dict(below)
    return {key: value for key, value in below.items() if key not in ("mean", "std")}


def _scaled(recipe: Recipe, scale: float) -> _Layer:
    """Returns a layer that multiplies a recipe's epochs; its milestones follow."""
    if not 0 < scale < math.inf:
        raise UserError(f"epochs cannot be multiplied by {scale:g}: give a number above 0")
    epochs = recipe.training.epochs

    def scaled(number: int) -> int:
        return max(1, math.floor(number * scale + 0.5))

    new = list(map(scaled, epochs)) if isinstance(epochs, list) else scaled(epochs)
    return _Layer("", {"training": {"epochs": new}})


def _with_milestones(layer: _Layer, below: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the layer's document; if it changes the epochs alone, with rescaled milestones."""
    training = layer.document.get("training", {})
    alone = "epochs" in training and "milestones" not in training
    if not (alone and below.get("epochs") and below.get("milestones")):
        return layer.document
    try:
        moved = milestones.rescale(below["milestones"], below["epochs"], training["epochs"])
    except ValueError as error:
        raise layer.error(f"training.milestones must {error}") from None
    return {**layer.document, "training": {**training, "milestones": moved}}
