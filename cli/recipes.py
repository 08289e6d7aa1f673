"""``greedy recipes``: the recipes that come with the package."""

import click

from greedy import recipes as shipped
from greedy.base.sizes import percent
from greedy.cli import options
from greedy.cli.failures import Group
from greedy.cli.tables import print_json, print_table


@click.group(cls=Group, epilog="Example: greedy recipes list --table 2")
def recipes() -> None:
    """List the recipes and show one."""


@recipes.command("list", epilog="Example: greedy recipes list --table 2")
@click.option("--table", "number", type=int, metavar="N", help="Only those of the paper's table N.")
@options.as_json
@options.debug
def list_recipes(number: int | None, as_json: bool) -> None:
    """List the recipes with the paper's test errors."""
    names = shipped.names() if number is None else shipped.of_table(number)
    rows = [row for row in shipped.describe() if row["name"] in names]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("name", "loss", "table", "paper's test error"),
        (
            (
                row["name"],
                row["loss"],
                str(row["table"] or "-"),
                percent(row["paper_test_error_percent"]),
            )
            for row in rows
        ),
        text_columns=2,
    )


@recipes.command(epilog="Example: greedy recipes show cifar10/vgg11b-3x-predsim")
@click.argument("name")
@options.as_json
@options.debug
def show(name: str, as_json: bool) -> None:
    """Print a recipe in full, as TOML."""
    recipe = shipped.load(name)
    if as_json:
        print_json(recipe.model_dump(exclude_none=True))
        return
    click.echo(shipped.to_toml(recipe), nl=False)
