"""Help of every command, near names for what is mistyped, and completion in the shell."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from command_line import greedy, refused, said

from greedy.cli.fields import FIELD_OF
from greedy.cli.main import EPILOG, cli
from greedy.recipes.schema import SECTIONS, Recipe

GREEDY = Path(sys.executable).with_name("greedy")


def commands(group=cli, path=()):
    """Yields the words of every command and the command, groups included."""
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


EVERY = pytest.mark.parametrize(
    ("path", "command"),
    [pytest.param(path, command, id=" ".join(("greedy", *path))) for path, command in commands()],
)


@EVERY
def test_every_help_has_an_example_of_the_command_itself(path, command):
    output = said(*path, "--help")
    assert f"Example: greedy {' '.join(path)}".strip() in output
    assert max(map(len, output.splitlines())) <= 80
    assert said(*path, "-h") == output


def test_options_of_recipe_fields_say_what_the_field_does_in_its_group():
    _, _, disk = said("train", "--help").partition("\nDisk:\n")
    views = " ".join(disk.partition("--views N|auto|live")[2].partition("--reuse")[0].split())
    meaning = SECTIONS["store"].model_fields["views"].description
    assert views == f"{meaning} [store.views; default: auto]"


def test_finetuning_says_that_it_takes_its_fields_from_the_run():
    shown = " ".join(said("finetune", "--help").split())
    assert "[training.strategy; default: backprop]" in shown
    assert "[memory.budget; default: the run's]" in shown
    assert "--stages" not in shown and "--stage-layers" not in shown


@pytest.mark.parametrize(("option", "field"), FIELD_OF.items())
def test_every_option_of_a_field_sets_it(option, field):
    section, _, name = field.rpartition(".")
    known = Recipe.model_fields if not section else SECTIONS[section].model_fields
    assert name in known
    assert f"--{option.replace('_', '-')} " in said("train", "--help")


@EVERY
def test_the_example_is_one_that_the_command_takes(path, command):
    words = shlex.split(command.epilog.splitlines()[0].removeprefix("Example: greedy "))
    group = cli
    while isinstance(group, click.Group):
        group = group.commands[words.pop(0)]
    with group.make_context(group.name, words):
        pass  # the words have been parsed, or this would have raised


@EVERY
def test_a_mistyped_option_gets_the_option_that_was_meant(path, command):
    long = [each for p in command.params for each in p.opts if each.startswith("--")]
    for option in (*long, "--help"):
        twice = f"{option[:4]}{option[3:]}"  # the second letter
        told = refused(*path, twice)
        assert f"there is no option {twice}; did you mean {option}?" in told
        assert f"(see `greedy {' '.join(path)}".rstrip() in told


def test_the_device_mistyped():
    result = greedy("train", "--recipe", "demo", "--devise", "cpu")
    assert result.exit_code == 2
    expected = "there is no option --devise; did you mean --device? (see `greedy train --help`)"
    assert result.output == f"Error: {expected}\n"


def test_a_group_alone_shows_its_help():
    assert said() == said("--help")
    assert said("recipes") == said("recipes", "--help")


def sourced(shell):
    environment = os.environ | {"_GREEDY_COMPLETE": f"{shell}_source"}
    return subprocess.run(GREEDY, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_help_says_how_the_shell_completes(shell):
    assert f"_GREEDY_COMPLETE={shell}_source greedy" in said("--help")
    script = sourced(shell)
    assert "_greedy_completion" in script.stdout and script.stderr == ""
    checked = shutil.which(shell)
    if checked:
        subprocess.run([checked, "-n"], input=script.stdout, text=True, check=True)


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("greedy tra", "train train-stage"),
        ("greedy cache ve", "verify"),
        ("greedy train --dev", "--device"),
        ("greedy train --log t", "tensorboard"),
        ("greedy train --views l", "live"),
        ("greedy trian --dev", ""),
    ],
)
def test_bash_completes_what_help_told_it_to(line, completed):
    setting = next(each.strip() for each in EPILOG.splitlines() if "bash_source" in each)
    words = line.split()
    script = (
        f"{setting}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        '_greedy_completion greedy; echo "${COMPREPLY[@]}"'
    )
    environment = os.environ | {"PATH": f"{GREEDY.parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (result.stdout.strip(), result.stderr) == (completed, "")
