"""Options made from the fields of a recipe, and help that shows options in groups."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from greedy.recipes.schema import SECTIONS, Recipe

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS, DATA, TRAINING = "Options", "Data", "Training"
MEMORY, DISK, MACHINE = "Memory", "Disk", "Machine"
GROUPS = (OPTIONS, DATA, TRAINING, MEMORY, DISK, MACHINE)

# The fields that have an option, by group and by the option's name.
FIELDS = {
    DATA: {"data": "data.name", "seed": "seed"},
    TRAINING: {
        "strategy": "training.strategy",
        "stage_layers": "model.stage_layers",
        "stages": "model.stages",
        "patience": "training.patience",
        "accumulate": "training.accumulate",
        "exact": "training.exact",
        "checkpoint_minutes": "training.checkpoint_minutes",
    },
    MEMORY: {
        "memory_budget": "memory.budget",
        "micro_batch": "memory.micro_batch",
        "optimizer_state": "memory.optimizer_state",
        "ram_budget": "store.ram_budget",
    },
    DISK: {
        "disk_budget": "store.disk_budget",
        "views": "store.views",
        "reuse": "store.reuse",
        "encoding": "store.encoding",
        "keep": "store.keep",
        "stores": "store.stores",
        "store_cache": "store.cache",
    },
    MACHINE: {
        "precision": "training.precision",
        "compile": "training.compile",
        "deterministic": "training.deterministic",
    },
}
FIELD_OF = {option: field for fields in FIELDS.values() for option, field in fields.items()}
DIVIDING = ("stage_layers", "stages")  # a network into stages
TEXTS = {
    "data.name": "NAME",
    "model.stages": "NAMES",
    "store.stores": "URL",
}  # placeholders in help of texts that are no sizes


class Command(click.Command):
    """A command whose help shows options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                groups.setdefault(getattr(parameter, "group", OPTIONS), []).append(record)
        for group in sorted(groups, key=GROUPS.index):
            with formatter.section(group):
                formatter.write_dl(groups[group])


class Option(click.Option):
    """An option that help shows in a group."""

    def __init__(self, *names: Any, group: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group


def settings(command: F) -> F:
    """Adds --set, and an option for each field that has one."""
    for group, fields in reversed(FIELDS.items()):
        for name in reversed(fields):
            command = field_option(name, group)(command)
    return _set(command)


def settings_of_finetuning(command: F) -> F:
    """Adds --set, and an option for each field that has one and that fine-tuning can change; it
    takes them from the run, but for the strategy."""
    for group, fields in reversed(FIELDS.items()):
        for name in reversed([name for name in fields if name not in DIVIDING]):
            default = "backprop" if name == "strategy" else "the run's"
            command = field_option(name, group, default)(command)
    return _set(command)


def _set(command: F) -> F:
    return click.option(
        "--set",
        "settings",
        metavar="KEY=VALUE",
        multiple=True,
        help="Change any field of the recipe, e.g. training.epochs=10; may be repeated.",
    )(command)


def field_option(name: str, group: str, default: str | None = None) -> Callable[[F], F]:
    """Returns the decorator that adds the option ``name`` with the type and description of its
    field, and the field's default unless another is named."""
    field = _field(FIELD_OF[name])
    details = FIELD_OF[name]
    if default is None and not field.is_required() and field.default is not None:
        default = str(field.default).lower()
    if default is not None:
        details += f"; default: {default}"
    values = list(_values(FIELD_OF[name], field.annotation))
    kind: dict[str, Any] = {"flag_value": "true"}
    if field.annotation is not bool:  # as text: the recipe says what is wrong with it
        kind = {"metavar": "|".join(values), "shell_complete": partial(_completed, values)}
    option = f"--{name.replace('_', '-')}"
    meaning = f"{field.description}  [{details}]"
    return click.option(option, cls=Option, group=group, help=meaning, **kind)


def _completed(
    values: Sequence[str], ctx: click.Context, parameter: click.Parameter, prefix: str
) -> list[str]:
    return [value for value in values if value.islower() and value.startswith(prefix)]


def overrides(settings: Sequence[str], fields: Mapping[str, str | None]) -> list[str]:
    """Returns the values of --set and of the options for fields together, each as KEY=VALUE."""
    values = {FIELD_OF[name]: value for name, value in fields.items() if value is not None}
    return [*settings, *(f"{key}={value}" for key, value in values.items())]


def names_data(overrides: Sequence[str]) -> bool:
    """Returns whether the data set was named on this command line."""
    return any(override.partition("=")[0].strip() == "data.name" for override in overrides)


def _field(key: str) -> FieldInfo:
    section, _, name = key.rpartition(".")
    model = SECTIONS[section] if section else Recipe
    return model.model_fields[name]


def _values(key: str, kind: Any) -> Iterator[str]:
    """Yields what help shows for a value of this type: the words it may be, or a placeholder."""
    if get_origin(kind) is Annotated:
        yield from _values(key, get_args(kind)[0])
    elif get_origin(kind) is Literal:
        yield from get_args(kind)
    elif kind in (int, float, str):
        yield {int: "N", float: "X", str: TEXTS.get(key, "SIZE")}[kind]
    elif kind is not NoneType:
        for part in get_args(kind):
            yield from _values(key, part)
