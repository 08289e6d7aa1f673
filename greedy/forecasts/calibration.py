"""What is known of how fast a machine trains, and what follows from it for other stages.

A stage is thought to compute as many operations a second as the nearest stage that was measured,
of the same kind and in the same precision. Near are those alike in operations a row, operations a
value and rows at a time, each counted in doublings; another memory mode is one doubling away. What
a mode recomputes is counted for both, so that a mode nobody has measured costs what its additional
passes cost.
"""

import math
import platform
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from greedy.base.devices import device_name
from greedy.base.files import read_with_digest, with_digest
from greedy.base.user_folders import measurements_dir
from greedy.base.versions import versions
from greedy.cache.files import write_whole
from greedy.memory.choice import Choice
from greedy.models import Stage, StageShapes
from greedy.runs.choices import Mode, ModeName

# Passes that a mode computes beyond the plain step's: of the encoder, of the heads. From "Cost" in
# docs/exact-step.md, where `heads` keeps c and its gradient.
RECOMPUTED = {
    Mode.PLAIN: (0, 0),
    Mode.HEADS: (0, 1),
    Mode.KEEP_C: (1, 1),
    Mode.KEEP_C_STREAM_X: (1, 1),
    Mode.KEEP_NOTHING: (3, 1),
    Mode.STREAM_X: (3, 1),
}

Amount = Annotated[int, Field(ge=1, le=2**62)]
Speed = Annotated[float, Field(gt=0, le=1e30)]


class NotCalibrated(Exception):
    """Nobody has measured how fast this machine is; one sentence that says what to do."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Work(_Document):
    """A stage's step as a clock sees it.

    Attributes:
        mode: the memory mode, of which ``rows`` are computed at a time.
        flops: floating-point operations of the plain step, a row.
        forward_flops: of the frozen stage, a row.
        values: of a row's input and activation.
    """

    kind: Literal["conv", "linear"]
    precision: Literal["float32", "bfloat16", "float16"]
    mode: ModeName
    rows: Amount
    flops: Amount
    forward_flops: Amount
    values: Amount

    @classmethod
    def of(
        cls,
        stage: Stage,
        shapes: StageShapes,
        precision: str,
        choice: Choice,
        step_flops: int,
        batch_size: int,
    ) -> Self:
        """Computes the work of a stage whose plain step on a whole batch has ``step_flops``."""
        convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in stage.modules())
        return cls.model_validate(
            {
                "kind": "conv" if convolutional else "linear",
                "precision": precision,
                "mode": str(choice.mode),
                "rows": choice.micro_batch,
                "flops": max(1, step_flops // batch_size),
                "forward_flops": max(1, 2 * shapes.operations),
                "values": math.prod(shapes.input) + math.prod(shapes.hidden),
            }
        )

    @property
    def computed_flops(self) -> float:
        """Operations of a step with what its memory mode recomputes; the heads' forward pass is a
        third of what the plain step has beyond the encoder's two passes."""
        encoder, heads = RECOMPUTED[Mode(self.mode)]
        head_flops = max(0, self.flops - 2 * self.forward_flops) / 3
        return self.flops + encoder * self.forward_flops + heads * head_flops

    def distance(self, other: "Work") -> float:
        """Returns the distance to another stage in doublings: how little that one says about this
        one."""
        pairs = (
            (self.flops, other.flops),
            (self.flops / self.values, other.flops / other.values),
            (self.rows, other.rows),
        )
        return math.hypot(*(math.log2(a / b) for a, b in pairs)) + (self.mode != other.mode)


class Measured(_Document):
    """One stage's speed: rows a second while it trains, waiting for data included, and rows a
    second that it computes and writes once it is frozen."""

    work: Work
    rows_per_second: Speed
    frozen_rows_per_second: Speed

    @property
    def flops_per_second(self) -> float:
        """Operations a second of the plain step, whatever the mode: recomputation is no gain."""
        return self.rows_per_second * self.work.flops


class Calibration(_Document):
    """What ``greedy bench`` has measured of one device of one machine.

    Attributes:
        peak_flops: operations a second at best, see ``greedy.forecasts.bench.peak_flops``.
        measured: stages, the newest last.
    """

    format: Literal[1] = 1
    device: str
    threads: Annotated[int, Field(ge=1, le=4096)]
    versions: dict[str, str]
    peak_flops: Speed
    measured: list[Measured] = []

    @classmethod
    def path(cls, device_type: str) -> Path:
        """Returns the file of this machine's calibration for ``cpu``, ``cuda`` or ``mps``."""
        return measurements_dir() / f"{platform.node()}-{device_type}.json"

    @classmethod
    def begin(cls, device: torch.device, peak_flops: float) -> Self:
        """Returns the calibration to add stages to: that on disk if it is of the same device,
        threads and versions, else an empty one."""
        new = cls(
            device=device_name(device),
            threads=torch.get_num_threads(),
            versions=versions(),
            peak_flops=peak_flops,
        )
        try:
            known = cls._read(cls.path(device.type))
        except (OSError, ValueError):
            return new
        same = (known.device, known.threads, known.versions) == (
            new.device,
            new.threads,
            new.versions,
        )
        if not same:
            return new
        best = max(known.peak_flops, peak_flops)  # other work on the machine only lowers it
        return known.model_copy(update={"peak_flops": best})

    @classmethod
    def load(cls, device_type: str) -> Self:
        """Reads the calibration of this machine as it computes now.

        Raises ``NotCalibrated`` if there is none, or it is damaged or of another device or number
        of threads.
        """
        if device_type == "cuda" and not torch.cuda.is_available():
            raise NotCalibrated(
                "times are unknown: `greedy bench` has to measure them where the cuda device is"
            )
        path, command = cls.path(device_type), f"`greedy bench --device {device_type}`"
        if not path.is_file():
            raise NotCalibrated(f"times are unknown until {command} has measured this machine")
        try:
            known = cls._read(path)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or ["unreadable"])[0]
            raise NotCalibrated(
                f"times are unknown, since {path} is damaged ({reason}): {command} replaces it"
            ) from error
        here = device_name(torch.device(device_type)), torch.get_num_threads()
        if (known.device, known.threads) != here:
            raise NotCalibrated(
                f"times are unknown: what was measured is {known.device} with {known.threads} "
                f"threads, and this is {here[0]} with {here[1]}: {command} "
                f"measures it"
            )
        return known

    @classmethod
    def _read(cls, path: Path) -> Self:
        try:
            return cls.model_validate(read_with_digest(path))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    def write(self, path: Path) -> None:
        """Replaces the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, with_digest(self.model_dump(mode="json")))

    def adding(self, measured: Measured) -> Self:
        """Returns a calibration with one more stage, which replaces one that is exactly alike."""
        others = [each for each in self.measured if each.work != measured.work]
        return self.model_copy(update={"measured": [*others, measured]})

    def seconds_a_row(self, work: Work) -> float | None:
        """Estimates the seconds a row of a stage's training. ``None`` if no stage of its kind and
        precision was measured."""
        if (near := self._nearest(work)) is None:
            return None
        return work.computed_flops / near.work.computed_flops / near.rows_per_second

    def frozen_seconds_a_row(self, work: Work) -> float | None:
        """Estimates the seconds a row of a frozen stage, computed and written. ``None`` as
        above."""
        if (near := self._nearest(work)) is None:
            return None
        return work.forward_flops / near.work.forward_flops / near.frozen_rows_per_second

    def _nearest(self, work: Work) -> Measured | None:
        alike = [
            each
            for each in self.measured
            if (each.work.kind, each.work.precision) == (work.kind, work.precision)
        ]
        return min(alike, key=lambda each: work.distance(each.work), default=None)
