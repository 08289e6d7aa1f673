"""Pages of the site that are generated from the code: commands, recipes and examples."""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo

from greedy.cli.main import cli
from greedy.recipes import describe, load, result_fields
from greedy.recipes.explain import allowed
from greedy.recipes.identity import LATER_FIELDS
from greedy.recipes.schema import SECTIONS, Recipe

EXAMPLES = Path(__file__).parents[1] / "examples"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to those in docs/."""
    pages = {
        "reference/commands.md": commands_page(),
        "reference/recipe.md": recipe_page(),
        "reference/recipes.md": recipes_page(),
    }
    pages |= {f"examples/{file.stem}.md": example_page(file) for file in EXAMPLES.glob("*.py")}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turns links to example scripts, as in the repository, into links to their pages."""
    return re.sub(r"\.\./examples/(\w+)\.py\)", r"examples/\1.md)", markdown)


def example_page(file: Path) -> str:
    text = file.read_text()
    _, _, code = text.split('"""', 2)
    docstring = ast.get_docstring(ast.parse(text))
    return f"# {file.name}\n\n{docstring}\n\n```python\n{code.strip()}\n```\n"


COMMANDS = """\
# Commands

`-h` or `--help` after any command shows this. The exit code is 2 for a mistake in the command, 1
for a failure, and 130, 143 or 129 if Ctrl-C, SIGTERM or a closed terminal stopped it.
"""


def commands_page() -> str:
    contexts = list(_contexts(click.Context(cli, info_name="greedy", **cli.context_settings)))
    return "\n".join([COMMANDS, *(_command(context) for context in contexts)])


def _contexts(context: click.Context) -> Iterator[click.Context]:
    """Yields the context of a command and, if it is a group, of all commands in it."""
    yield context
    if isinstance(context.command, click.Group):
        for name, command in context.command.commands.items():
            yield from _contexts(click.Context(command, context, name))


def _command(context: click.Context) -> str:
    command, path = context.command, context.command_path
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    records = (param.get_help_record(context) for param in command.get_params(context))
    rows = ((f"`{names}`", _linked(meaning)) for names, meaning in filter(None, records))
    example, _, more = (command.epilog or "").partition("\n\n\b\n")
    meaning = inspect.cleandoc(command.help or "")
    parts = [f"## {path}", meaning, f"    {usage}", _with_code(example)]
    if more:
        parts.append(f"```text\n{more.rstrip()}\n```")
    return "\n\n".join([*parts, _table(("option", "meaning"), rows)]) + "\n"


def _with_code(example: str) -> str:
    return re.sub(r"(Example:) (.*)", r"\1 `\2`", example)


def _linked(meaning: str) -> str:
    """Makes the recipe field in an option's help a link to its description."""
    return re.sub(r"\[(\w+\.\w+)(; default: .+)?\]$", r"\\[[`\1`](recipe.md#\1)\2\\]", meaning)


RECIPE = """\
# Recipe fields

A recipe is one TOML file that fully describes a run. It may begin with `extends = "NAME"` (or a
path ending in `.toml`), and then only has the fields that differ. `--set section.field=value`
changes a field on the command line, and `greedy recipes show NAME` prints a recipe in full.

Fields with a dot (●) decide the result of a run and cannot be changed in it; the others may be
changed at any time.
"""


def recipe_page() -> str:
    own = {name: field for name, field in Recipe.model_fields.items() if name not in SECTIONS}
    parts = [RECIPE, _fields("", own)]
    for section, model in SECTIONS.items():
        parts += [f"## {section}", model.__doc__ or "", _fields(f"{section}.", model.model_fields)]
    return "\n\n".join(parts) + "\n"


def _fields(prefix: str, fields: Mapping[str, FieldInfo]) -> str:
    decisive = result_fields(load("demo")) | LATER_FIELDS
    rows = []
    for name, field in fields.items():
        key = prefix + name
        mark = "&nbsp;●" if key in decisive else ""
        default = "its file's" if key == "name" else _default(field)
        rows.append((f"`{name}`{{ #{key} }}{mark}", allowed(key), default, field.description or ""))
    return _table(("field", "may be", "default", "meaning"), rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    match field.default:
        case None:
            return "absent"
        case bool(value):
            return f"`{value}`".lower()
        case str(value):
            return f'`"{value}"`'
        case value:
            return f"`{value}`"


RECIPES = """\
# Recipes

The {count} results in the paper's tables that are recipes, with the reported test error in percent,
after the last epoch of a single run: its own, and those of residual networks that it cites for
comparison (`wrn-…` and `preact-resnet18-…` with loss `glob`). `greedy reproduce` trains them,
`greedy recipes list --table 2` prints those of a table, and [results](../results.md) says which
have been trained here. The other recipes have no published figure. The fields of a recipe: [recipe
fields](recipe.md).
"""


def recipes_page() -> str:
    rows = describe()
    heads = ("recipe", "data set", "network", "loss", "table", "paper's test error, %")
    columns = ("name", "dataset", "network", "loss", "table", "paper_test_error_percent")
    cells = (["-" if row[key] is None else str(row[key]) for key in columns] for row in rows)
    published = sum(row["table"] is not None for row in rows)
    return RECIPES.format(count=published) + "\n" + _table(heads, cells) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
