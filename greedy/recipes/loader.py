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
from greedy.base.text import legible
from greedy.recipes import explain, milestones
from greedy.recipes.identity import differences
from greedy.recipes.schema import Model, Recipe

SHIPPED: Final = Path(__file__).parent
REQUIRED: Final = ("data", "model", "loss", "training")
JOINT: Final = ("training.strategy", "greedy", "joint")


class _Layer(NamedTuple):
    """One file's own share of a recipe, or all overrides together."""

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
    """The recipe of that name, or in that file if the argument ends in .toml or is a file, with
    overrides such as ``training.epochs=10`` on top, and epochs, at least 1, multiplied last. One
    that may not inherit is of that file alone. Raises UserError for any mistake in it."""
    path, name = Path(name_or_path), str(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        name = legible(path.stem)
    else:
        path = _shipped_path(name, names)
    layer = _Layer(str(name_or_path), _read(path))
    if "extends" in layer.document and not inherits:
        raise layer.error("extends another recipe, and a run's own stands alone: remove that line")
    layers = _layers(layer, path)
    if overrides:
        layers.append(_Layer("", _override_document(overrides)))
    if epochs_scale != 1:
        layers.append(_scaled(_resolved(layers, name), epochs_scale))
    return _resolved(layers, name)


def from_document(
    document: Mapping[str, Any], name: str = "unnamed", overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe in a parsed TOML document, which may extend others, with paths relative to the
    current directory, and overrides on top; `name` counts where the document has none. Raises
    UserError."""
    layers = _layers(_Layer("", dict(document)), None)
    if overrides:
        layers.append(_Layer("", _override_document(overrides)))
    return _resolved(layers, name)


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, in full; `load` gives an equal recipe."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def names() -> list[str]:
    """The shipped recipes that can be run, without the files they share: those name no loss."""
    return sorted(
        name
        for name, path in _shipped().items()
        if any("loss" in layer.document for layer in _layers(_Layer(name, _read(path)), path))
    )


def of_table(number: int) -> list[str]:
    """The recipes of the paper's table of that number. Raises UserError if there are none."""
    tables = {recipe.name: recipe.paper.table for recipe in _recipes() if recipe.paper}
    if number not in tables.values():
        known = ", ".join(map(str, sorted(set(tables.values()))))
        raise UserError(f"there are no recipes of a table {number}: choose from {known}")
    return [name for name, table in tables.items() if table == number]


def describe() -> list[dict[str, Any]]:
    """The summary of each shipped recipe."""
    return [summary(recipe) for recipe in _recipes()]


def summary(recipe: Recipe) -> dict[str, Any]:
    """A recipe in a row: name, table, dataset, network, loss and paper_test_error_percent; table
    and error are None where nothing was published."""
    return {
        "name": recipe.name,
        "table": recipe.paper and recipe.paper.table,
        "dataset": recipe.data.name,
        "network": network_label(recipe.model),
        "loss": loss_label(recipe),
        "paper_test_error_percent": recipe.paper and recipe.paper.test_error_percent,
    }


def departures(recipe: Recipe) -> list[str]:
    """The fields in which a recipe with a published figure differs from the shipped recipe that
    the figure belongs to: the one of its name, or else, of those with this figure, the nearest.
    Seed and store do not count: the paper has neither. Nor does training jointly: the paper's
    local losses were."""
    same_figure = [each for each in _recipes() if each.paper == recipe.paper]
    found = [_departures(each, recipe) for each in same_figure if each.name == recipe.name]
    found = found or [_departures(each, recipe) for each in same_figure]
    return min(found, key=len, default=["paper"])


def network_label(model: Model) -> str:
    """The network as the paper writes it, for instance ``vgg11b-3x``."""
    factor = model.feature_multiplier
    return model.network if factor == 1 else f"{model.network}-{factor:g}x"


def loss_label(recipe: Recipe) -> str:
    """The loss as the paper writes it: ``glob+sim`` is every layer's ``sim`` beside ``glob``."""
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
def _shipped() -> dict[str, Path]:
    return {
        path.relative_to(SHIPPED).with_suffix("").as_posix(): path
        for path in SHIPPED.rglob("*.toml")
    }


def _shipped_path(name: str, candidates: Callable[[], Iterable[str]]) -> Path:
    path = _shipped().get(name)
    if path is None:
        hint = explain.near(name, candidates(), most=3) or "; `greedy recipes list` shows all"
        raise UserError(f"there is no recipe {name}{hint}")
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
            f"the recipe {path} is no UTF-8 in line {line}, as TOML has to be: save it as that"
        ) from None
    except ValueError as error:
        raise UserError(f"the recipe {path} is not valid TOML: {error}") from None


def _layers(layer: _Layer, path: Path | None) -> list[_Layer]:
    """The document and all that it extends, ancestors first; `path` is its own file."""
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
        document.pop("name", None)  # a name is a file's own
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
    """Two documents in one: fields of `above` win, sections are joined."""
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
    """Raises UserError for mistakes that no other layer can mend: keys, types and ranges."""
    try:
        Recipe.model_validate(layer.document)
    except ValidationError as error:
        mistakes = [e for e in error.errors() if e["type"] not in ("missing", "value_error")]
        if mistakes:
            raise layer.error(explain.sentence(mistakes, layer.document)) from None


def _without_moments(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The data section of the layers so far, for one that puts a user's own data in their place:
    mean and deviation were those of the data set that goes, and are measured anew."""
    name = above.get("name", below.get("name"))
    if name == below.get("name") or ":" not in name:
        return dict(below)
    return {key: value for key, value in below.items() if key not in ("mean", "std")}


def _scaled(recipe: Recipe, scale: float) -> _Layer:
    """The layer that changes the epochs of a recipe so far, alone: milestones move along."""
    if not 0 < scale < math.inf:
        raise UserError(f"epochs cannot be multiplied by {scale:g}: give a number above 0")
    epochs = recipe.training.epochs

    def scaled(number: int) -> int:
        return max(1, math.floor(number * scale + 0.5))

    new = list(map(scaled, epochs)) if isinstance(epochs, list) else scaled(epochs)
    return _Layer("", {"training": {"epochs": new}})


def _with_milestones(layer: _Layer, below: Mapping[str, Any]) -> dict[str, Any]:
    """The layer's document; where it changes the epochs alone, with the milestones moved along."""
    training = layer.document.get("training", {})
    alone = "epochs" in training and "milestones" not in training
    if not (alone and below.get("epochs") and below.get("milestones")):
        return layer.document
    try:
        moved = milestones.rescale(below["milestones"], below["epochs"], training["epochs"])
    except ValueError as error:
        raise layer.error(f"training.milestones must {error}") from None
    return {**layer.document, "training": {**training, "milestones": moved}}
