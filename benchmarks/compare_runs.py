"""How much more one way of training errs than another, stage by stage, on the same images.

The error of one run on 10,000 test images is uncertain by 0.3 points, more than two ways of
training differ by. So both classify the same images, and each image in several forms: as it is,
and shifted, flipped or coloured as the recipe augments training images, alike for all runs. Cutout
is left out.

    python benchmarks/compare_runs.py --pair live-0 auto-0 --pair live-1 auto-1

A pair are two runs of one seed. Errors are in percent, differences in points, the second run less
the first. Their 95 % intervals are over images, of each image's mean over all pairs and forms. The
differences of single pairs show how much seeds differ.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from greedy import RunState
from greedy.base.errors import UserError
from greedy.base.seeds import torch_generator
from greedy.build.modules import build_loss
from greedy.data import Augmentation
from greedy.results.evaluation import raw_to_float
from greedy.runs.directory import RunDirectory
from greedy.runs.network import assemble

ROWS = 1000  # classified at a time
CPU = torch.device("cpu")


class Images(NamedTuple):
    """Raw test images in several forms, each (N, C, H, W), and their labels (N,)."""

    forms: list[Tensor]
    labels: Tensor

    @classmethod
    def of(cls, run: RunDirectory, passes: int) -> "Images":
        """Returns the images of a run as they are and augmented ``passes`` times."""
        store, data = run.open_store(0, "test"), run.recipe.data
        images = torch.from_numpy(store.load()[0])
        augmentation = Augmentation.parse(data.augmentation)
        forms = [images]
        for number in range(passes):
            generator = torch_generator(0, "compare", number)
            height, width = images.shape[2:]
            draws = augmentation.draw(store.rows, height, width, generator)
            forms.append(augmentation.apply(images, draws))
        return cls(forms, torch.from_numpy(np.asarray(store.labels)))

    @torch.no_grad()
    def misses(self, network: nn.Module) -> NDArray[np.float64]:
        """Returns in how many of its forms each image (N,) is misclassified, in percent."""
        wrong = torch.zeros(len(self.labels), dtype=torch.float64)
        for form in self.forms:
            parts = (network(raw_to_float(x.numpy(), CPU)).argmax(1) for x in form.split(ROWS))
            wrong += torch.cat(list(parts)) != self.labels
        return (100 * wrong / len(self.forms)).numpy()


def require_same_data(runs: list[RunDirectory]) -> None:
    """Raises ``UserError`` for runs that were trained on other data than the first."""
    for run in runs:
        if run.recipe.data != runs[0].recipe.data:
            raise UserError(
                f"{run.path} has other data than {runs[0].path}: compare runs of one set"
            )


def misses_by_stage(run: RunDirectory, images: Images) -> dict[int, NDArray[np.float64]]:
    """Returns the misses of every complete stage with its classifier; the last's are those of the
    network."""
    loss, found = build_loss(run.recipe.loss), {}
    names = RunState.read(run).complete_record(0).network
    for number in range(1, len(names) + 1):
        if run.record(number) is None:
            break
        whole = number == len(names)
        network = assemble(run, loss, until_stage=None if whole else number)
        found[number] = images.misses(network)
    return found


def compared(first: list[NDArray[np.float64]], second: list[NDArray[np.float64]]) -> dict[str, Any]:
    """Returns the figures of a stage from the misses of all pairs."""
    difference = np.mean(second, axis=0) - np.mean(first, axis=0)
    return {
        "first": float(np.mean(first)),
        "second": float(np.mean(second)),
        "difference": float(difference.mean()),
        "interval": float(1.96 * difference.std() / np.sqrt(len(difference))),
        "pairs": [float((b - a).mean()) for a, b in zip(first, second, strict=True)],
    }


@click.command()
@click.option("--pair", "pairs", nargs=2, type=Path, multiple=True, required=True)
@click.option("--passes", default=7, show_default=True, help="Augmented forms of each image.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(pairs: list[tuple[Path, Path]], passes: int, as_json: bool) -> None:
    """Compare pairs of runs."""
    try:
        runs = [tuple(map(RunDirectory.open, pair)) for pair in pairs]
        require_same_data([run for pair in runs for run in pair])
        images = Images.of(runs[0][0], passes)
        misses = [tuple(misses_by_stage(run, images) for run in pair) for pair in runs]
    except UserError as error:
        raise click.ClickException(str(error)) from error
    stages = sorted(set.intersection(*(set(run) for pair in misses for run in pair)))
    figures = {
        stage: compared([a[stage] for a, _ in misses], [b[stage] for _, b in misses])
        for stage in stages
    }
    if as_json:
        print(json.dumps({"forms": passes + 1, "stages": figures}))
        return
    for stage, found in figures.items():
        single = ", ".join(f"{each:+.2f}" for each in found["pairs"])
        print(
            f"stage {stage}: {found['first']:.2f} and {found['second']:.2f} %, "
            f"{found['difference']:+.2f} ± {found['interval']:.2f} (single pairs {single})"
        )


if __name__ == "__main__":
    main()
