"""``greedy finetune``: end-to-end training from the weights of a finished run."""

from pathlib import Path

import click

from greedy.cli import fields, options
from greedy.cli.failures import terminable
from greedy.cli.tables import say
from greedy.cli.train import give_data, tensorboard, train_and_show


@click.command(
    cls=fields.Command, epilog="Example: greedy finetune --run runs/demo --set training.epochs=5"
)
@options.run
@click.option(
    "--to",
    metavar="DIR",
    type=options.PATH,
    help="The run directory to write  [default: DIR-finetuned beside --run].",
)
@fields.settings_of_finetuning
@options.ignore_changes
@options.device
@options.log
@options.model
@options.debug
def finetune(
    run: Path,
    to: Path | None,
    settings: tuple[str, ...],
    ignore_changes: bool,
    device: str,
    log: str | None,
    model: str | None,
    **field_values: str | None,
) -> None:
    """Train a finished run's network end to end, from its weights; the same command resumes.

    The result is another run, by default trained for 10 epochs by back-propagation at a tenth of
    the learning rate. The finished run is not changed.
    """
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415
    from greedy.trainer import GreedyTrainer  # noqa: PLC0415
    from greedy.training.finetuning import begin_finetuning  # noqa: PLC0415

    source = RunDirectory.open(run)
    to = to or run.with_name(f"{run.name}-finetuned")
    logger = tensorboard(to) if log else None
    overrides = fields.overrides(settings, field_values)
    with terminable():
        tuned = begin_finetuning(source, to, overrides, ignore_changes=ignore_changes)
    network = load_network(tuned.recipe, model)
    trainer = GreedyTrainer.from_recipe(tuned.recipe, to, device=device, model=network)
    say(f"{tuned.recipe.name}, from the weights of {run}, in {to} on {trainer.device}")
    if fields.names_data(overrides) and trainer.needs_data():
        give_data(trainer, tuned.recipe.data.name, ignore_changes=ignore_changes)
    train_and_show(trainer, log=logger)
