"""The documentation: the site is whole and built without a warning, and commands are ones that
exist."""

import html
import os
import re
import shlex
import subprocess
import sys
import tomllib
from inspect import ismodule
from itertools import groupby
from pathlib import Path

import click
import pytest

import greedy
from greedy.build.modules import NETWORKS, build_network
from greedy.cli.fields import FIELD_OF, overrides
from greedy.cli.main import cli
from greedy.data import DATASETS
from greedy.recipes import describe
from greedy.recipes.loader import load_for_model
from greedy.recipes.schema import SECTIONS, Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Builds the site as `make docs` does and returns its folder."""
    to = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", to]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return to


def text_of(part):
    """Returns the text that a reader sees of a piece of HTML."""
    inline = re.sub(r"</?(?:a|code|span)\b[^>]*>", "", part)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", inline)).split())


def as_read(text):
    """Returns our own texts with code in them as a reader sees them."""
    return " ".join(text.replace("`", "").split())


def rows_of(page):
    """Returns the texts of the cells of all tables of a page."""
    rows = re.findall(r"<tr>.*?</tr>", page.read_text(), re.DOTALL)
    return [[text_of(each) for each in re.findall(r"<td.*?</td>", row, re.DOTALL)] for row in rows]


def test_every_field_of_a_recipe_has_its_row(site):
    page = site / "reference/recipe.html"
    keys = re.findall(r'<td><code id="([^"]+)"', page.read_text())
    shown = dict(zip(keys, filter(None, rows_of(page)), strict=True))
    fields = dict(Recipe.model_fields)
    for section, model in SECTIONS.items():
        del fields[section]
        fields |= {f"{section}.{name}": field for name, field in model.model_fields.items()}
    assert shown.keys() == fields.keys()
    for key, (name, _, default, meaning) in shown.items():
        field = fields[key]
        assert name.removesuffix("●").strip() == key.rpartition(".")[2]
        assert meaning == as_read(field.description)
        if field.is_required():
            assert default == ("its file's" if key == "name" else "required")
        elif field.default is None:
            assert default == "absent"
        else:
            assert tomllib.loads(f"x = {default}") == {"x": field.default}
    assert shown["training.strategy"][1] == "one of greedy, joint, backprop, glob+sim"
    assert shown["model.dropout"][1] == "a number of at least 0 and below 1"
    assert "●" in shown["training.epochs"][0] and "●" not in shown["memory.budget"][0]


def test_every_recipe_has_its_row(site):
    rows = [row for row in rows_of(site / "reference/recipes.html") if row]
    assert sorted(row[0] for row in rows) == sorted(row["name"] for row in describe())
    assert ["cifar10/vgg11b-3x-predsim", "cifar10", "vgg11b-3x", "predsim", "4", "3.97"] in rows


def root():
    return click.Context(cli, info_name="greedy", **cli.context_settings)


def contexts(context):
    """Yields the context of a command and, if it is a group, of those in it."""
    yield context
    if isinstance(context.command, click.Group):
        for name, command in context.command.commands.items():
            yield from contexts(click.Context(command, context, name))


def test_every_command_and_option_is_shown(site):
    _, *sections = (site / "reference/commands.html").read_text().split("<h2 ")
    shown = {text_of("<h2 " + each.split("<a")[0]): text_of("<h2 " + each) for each in sections}
    expected = list(contexts(root()))
    assert list(shown) == [context.command_path for context in expected]
    for context in expected:
        section = shown[context.command_path]
        for param in context.command.get_params(context):
            if isinstance(param, click.Option):
                names, meaning = param.get_help_record(context)
                assert names in section
                assert as_read(meaning) in section
            else:
                assert param.make_metavar(context) in section


def test_every_public_name_is_described(site):
    pages = [page.read_text() for page in (site / "reference/python").glob("*.html")]
    ids = {name for page in pages for name in re.findall(r'id="([^"]+)"', page)}
    modules = [
        greedy,
        *(each for each in map(greedy.__getattr__, greedy.__all__) if ismodule(each)),
    ]
    for module in modules:
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            # A function that is named as the module it comes from is described there.
            home = getattr(value, "__module__", module.__name__)
            described = {f"{module.__name__}.{name}", f"{home}.{name}"} & ids
            assert described or ismodule(value), f"{module.__name__}.{name}"


def test_pages_load_nothing_from_elsewhere(site):
    loaded = r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)"
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert [(page.name, re.findall(loaded, page.read_text())) for page in pages] == [
        (page.name, []) for page in pages
    ]


@EVERY_PAGE
def test_links_lead_to_files_of_the_repository(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, _ = target.partition("#")
        made = Path("docs/reference") in (page.parent / path).resolve().relative_to(ROOT).parents
        assert "://" in target or made or (page.parent / path).exists(), target


def shell_lines(page):
    """Yields the commands in a page's blocks of shell, and after a prompt in other blocks."""
    for language, block in re.findall(
        r"^ *```(\w*).*?\n(.*?)^ *```", page.read_text(), re.M | re.S
    ):
        lines = re.sub(r"\\\n", " ", block).splitlines()
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        yield from lines if language == "sh" else prompted


def greedy_commands(line):
    """Yields the words after each `greedy` in a line of shell, also where torchrun starts it."""
    words = shlex.split(line, comments=True)
    for is_end, command in groupby(words, lambda word: word in ("&&", "||", "|", ";", "&")):
        first, *rest = command
        if not is_end and first == "torchrun" and "greedy" in rest:
            yield rest[rest.index("greedy") + 1 :]
        if not is_end and first == "greedy":
            yield rest


def below(context, words):
    """Returns the command in a group that the first word names, or the first of several, and the
    words after it."""
    names, *others = words
    commands = {name: context.command.get_command(context, name) for name in names.split("|")}
    assert None not in commands.values(), words
    name, command = next(iter(commands.items()))
    return click.Context(command, context, name), others


@EVERY_PAGE
def test_commands_are_ones_that_greedy_takes(page):
    for line in shell_lines(page):
        for command in greedy_commands(line):
            context, words = root(), command
            while isinstance(context.command, click.Group):
                context, words = below(context, words)
            parsed = context.command.make_context(context.info_name, words).params
            recipe, model = parsed.get("recipe_name"), parsed.get("model")
            if recipe is not None and not recipe.endswith(".toml"):
                values = {name: parsed.get(name) for name in FIELD_OF}
                can_be_trained(load_for_model(recipe, model, overrides(parsed["settings"], values)))


def can_be_trained(recipe):
    """Builds the network of a recipe for its data set, where both have names."""
    data = next((each for each in DATASETS if each.name == recipe.data.name), None)
    if data is not None and recipe.model.network in NETWORKS:
        build_network(recipe.model, data.shape, data.classes)


def prose(page):
    """Returns a page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)


@EVERY_PAGE
def test_options_in_running_text_exist(page):
    """Commands such as `greedy train --recipe R`, with any values."""
    for code in re.findall(r"`(greedy [^`]+)`", prose(page)):
        context = root()
        words = shlex.split(code)[1:]
        while words and isinstance(context.command, click.Group):
            context, words = below(context, words)
        context.command.make_parser(context).parse_args(words)


@EVERY_PAGE
def test_lists_stand_alone(page):
    """A list without an empty line before it is text on the site, though not in the repository."""
    item = r"(?:[-*]|\d+\.) "
    assert re.findall(rf"^(?! *{item}| )\S.*\n{item}.*", prose(page), re.M) == []
