"""A run's progress for TensorBoard, written into the run's ``logs/``."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torchvision.utils import make_grid

from greedy.base.errors import missing_packages
from greedy.base.files import read_tensors
from greedy.models import Shape
from greedy.runs.choices import Choices
from greedy.runs.directory import RunDirectory, require_no_links
from greedy.runs.events import EpochReport, Reporter
from greedy.runs.record import ENCODER, StageRecord
from greedy.runs.state import RunState
from greedy.stores.opening import SourceFinder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOGS = "logs"
IMAGES = 64  # training images, and filters, that are shown
FILTER_SIDE = 24  # pixels that a filter is enlarged to at least


class TensorBoard(Reporter):
    """Writes logs for TensorBoard: curves of each stage, with epochs as steps; the recipe as text;
    training images as the first stage gets them; and that stage's filters. Each stage is a run in
    TensorBoard, so that their curves share a chart.

    Close it at the end of training, or use it in a ``with``. When a training is resumed or begun
    again, its logs are replaced: epochs before the checkpoint are reported again.

    Args:
        run_dir: the run directory.
        to: the directory of a stage that is trained outside the run directory.

    Raises:
        UserError: the package is missing, or a link stands in ``logs/``.
    """

    def __init__(self, run_dir: str | Path, *, to: Path | None = None) -> None:
        if find_spec("tensorboard") is None:
            raise missing_packages("logging for TensorBoard", ["tensorboard"], "tensorboard")
        self._run_dir, self._to = Path(run_dir), to
        logs = self._run_dir / LOGS
        require_no_links(logs)
        self._logs = logs if to is None else logs / to.name
        self._writers: dict[str, SummaryWriter] = {}
        self._alone: str | None = None  # the stage in training, unless all train at once

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files."""
        for name in list(self._writers):
            self._writers.pop(name).close()

    def stage_started(self, number: int, name: str, epochs: int, choices: Choices) -> None:
        self._alone = _name(number)
        if self._alone in self._writers:
            self._writers.pop(self._alone).close()
        self._write_recipe()
        if number == 1:
            self._write_images()

    def network_started(self, strategy: str, epochs: int, choices: Choices) -> None:
        self._alone = None
        self.close()
        self._write_recipe()
        self._write_images()

    def epoch_finished(self, report: EpochReport) -> None:
        if self._alone is not None:
            self._write_epoch(self._alone, report)

    def network_epoch_finished(self, reports: Sequence[EpochReport]) -> None:
        for number, report in enumerate(reports, start=1):
            self._write_epoch(_name(number), report)

    def stage_finished(self, record: StageRecord) -> None:
        if record.stage == 1:
            self._write_filters()

    def _writer(self, name: str) -> "SummaryWriter":
        """Returns the writer of a TensorBoard run, opened so that it replaces older logs."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        if name not in self._writers:
            self._writers[name] = SummaryWriter(str(self._logs / name), purge_step=0)
        return self._writers[name]

    def _write_epoch(self, name: str, report: EpochReport) -> None:
        writer = self._writer(name)
        scalars = {
            "loss/train": report.loss,
            "loss/holdout": report.holdout_loss,
            "error/train": report.train_error_percent,
            "error/test": report.test_error_percent,
            "learning_rate": report.learning_rate,
            "images_per_second": report.images_per_second,
        }
        for tag, value in scalars.items():
            if value is not None:
                writer.add_scalar(tag, value, report.epoch)
        writer.flush()

    def _write_recipe(self) -> None:
        if (self._logs / "recipe").exists():
            return  # TensorBoard would show the text once for each writing
        lines = (self._run_dir / "run.toml").read_text(encoding="utf-8").splitlines()
        as_code = "\n".join(f"    {line}" for line in lines)  # texts are Markdown
        self._writer("recipe").add_text("recipe", as_code, 0)
        self._writer("recipe").close()

    def _write_images(self) -> None:
        """Writes the first training images as the first stage gets them in its first epoch."""
        state = RunState.read(RunDirectory.open(self._run_dir))
        data = state.complete_record(0)
        if not _is_picture(data.row_shape):
            return
        sources = SourceFinder(state, [], torch.device("cpu"), self)
        source = sources.for_training(1, 0, "float32")
        store, images = source.stores["train"], source.images
        assert images is not None and data.store is not None
        values = next(iter(store.batches(0, IMAGES)))
        x = source.inputs(values, images.draw(store, state.run.recipe.seed, 1, 0)[: len(values)])
        mean, std = (torch.tensor(moment)[:, None, None] for moment in (images.mean, images.std))
        in_bytes = data.store.encoding == "uint8"
        grid = make_grid(x * std + mean, normalize=not in_bytes).clamp(0, 1)
        self._writer(_name(1)).add_image("images", grid, 0)

    def _write_filters(self) -> None:
        state = RunState.read(RunDirectory.open(self._run_dir))
        row_shape = state.complete_record(0).row_shape
        directory = self._to or self._run_dir / _name(1)
        filters = first_filters(read_tensors(directory / ENCODER), row_shape)
        if filters is not None:
            scale = math.ceil(FILTER_SIDE / min(filters.shape[2:]))
            enlarged = filters.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
            grid = make_grid(enlarged, normalize=True, scale_each=True)
            self._writer(_name(1)).add_image("filters", grid, 0)
            self._writer(_name(1)).flush()


def first_filters(tensors: Mapping[str, Tensor], row_shape: Shape) -> Tensor | None:
    """Returns the filters (N, C, height, width) of the first layer, from the first stage's tensors:
    those of a convolution, or the weights of a linear layer as images of the rows' shape (C, H, W).
    Returns ``None`` for any other layer, and for images that are neither grey nor in colour."""
    if not _is_picture(row_shape):
        return None
    for _, tensor in sorted(tensors.items()):
        if tensor.ndim == 4 and tensor.shape[1] == row_shape[0]:
            return tensor[:IMAGES]
        if tensor.ndim == 2 and tensor.shape[1] == math.prod(row_shape):
            return tensor[:IMAGES].unflatten(1, row_shape)
    return None


def _is_picture(row_shape: Shape) -> bool:
    return row_shape[0] in (1, 3) and min(row_shape[1:]) > 1


def _name(number: int) -> str:
    return f"stage{number}"
