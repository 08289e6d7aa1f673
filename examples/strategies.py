"""Train one network by three strategies and compare them in a table.

`greedy` trains a stage after the other, each from the stored output of the one before; `joint`
trains all at once, each on its own loss, as the paper did; `backprop` is ordinary end-to-end
training. Memory is what was counted for a step.

    python examples/strategies.py --run runs/strategies --epochs 5
"""

from pathlib import Path

import click

import greedy
from greedy.base.sizes import format_size
from greedy.recipes import load
from greedy.runs.status import status

LINE = "{:9s}  {:>10s}  {:>10s}  {:>8s}"


@click.command()
@click.option("--run", type=click.Path(path_type=Path), default="runs/strategies")
@click.option("--recipe", default="demo", show_default=True)
@click.option("--epochs", default=5, show_default=True, help="Of each stage, or of the network.")
@click.option("--set", "settings", multiple=True, help="As of `greedy train`; can be repeated.")
def main(run: Path, recipe: str, epochs: int, settings: tuple[str, ...]) -> None:
    print(LINE.format("strategy", "test error", "memory", "time"))
    for strategy in ("greedy", "joint", "backprop"):
        chosen = load(
            recipe, [f"training.epochs={epochs}", f"training.strategy={strategy}", *settings]
        )
        trainer = greedy.GreedyTrainer.from_recipe(chosen, run / strategy)
        trainer.prepare(greedy.data.load_dataset(chosen.data.name))
        trainer.train()
        result = greedy.evaluate(trainer.run, trainer.assemble(), "test", trainer.device)
        stages = status(greedy.RunState.read(trainer.run))
        # Where all stages train at once, the time of each is that of all.
        seconds = (sum if strategy == "greedy" else max)(each.seconds for each in stages)
        memory = max(each.step_memory_bytes for each in stages)
        print(
            LINE.format(
                strategy, f"{result.error_percent:.1f} %", format_size(memory), f"{seconds:.1f} s"
            )
        )


if __name__ == "__main__":
    main()
