"""The measured speed of a machine, and estimates for other stages from it.

A stage is estimated to compute as many operations a second as the nearest measured stage of the
same kind and precision. The distance of two stages is that of their operations for a row, their
operations for a value and their rows at a time, each in doublings, plus one doubling if their
memory modes differ. Operations that a mode computes again are counted for both, so that a mode that
was not measured takes longer by its additional passes.
"""

import math
import platform
import statistics
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greedy.base.devices import device_name
from greedy.base.files import read_with_digest, with_digest
from greedy.base.torch_private import CONVOLUTIONS
from greedy.base.user_folders import measurements_dir
from greedy.base.versions import versions
from greedy.cache.files import write_whole
from greedy.memory.choice import Choice
from greedy.models import Stage, StageShapes
from greedy.runs.choices import Mode, ModeName
from greedy.runs.disk_demand import ByteOperations

# Forward passes of the encoder and of the heads that a mode computes in addition to those of the
# plain step: from "Cost" in docs/exact-step.md, where `heads` keeps c and its gradient.
RECOMPUTED = {
    Mode.PLAIN: (0, 0),
    Mode.HEADS: (0, 1),
    Mode.KEEP_C: (1, 1),
    Mode.KEEP_C_STREAM_X: (1, 1),
    Mode.KEEP_NOTHING: (3, 1),
    Mode.STREAM_X: (3, 1),
}

# Bytes of a store that are read and decoded in a second, and, where nothing was measured, bytes
# that are encoded and written, and multiply-adds of frozen stages: on two cores of a CPU, and on a
# small GPU with more cores beside it.
READ_RATE = {"cpu": 1e9, "cuda": 2e9, "mps": 2e9}
WRITE_RATE = {"cpu": 3e8, "cuda": 6e8, "mps": 6e8}
COMPUTE_RATE = {"cpu": 5e10, "cuda": 3e12, "mps": 1e12}

Amount = Annotated[int, Field(ge=1, le=2**62)]
Speed = Annotated[float, Field(gt=0, le=1e30)]


class NotCalibrated(Exception):
    """The speed of this machine is not known; one sentence that says what to do."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Work(_Document):
    """Everything that decides the time of a stage's step.

    Attributes:
        kind: ``conv`` if the stage has a convolution, else ``linear``.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        mode: the memory mode.
        rows: rows computed at a time.
        flops: floating-point operations of the plain step for a row.
        forward_flops: floating-point operations of the frozen stage for a row.
        values: number of values in a row's input and activation.
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
        """Returns the work of a stage whose plain step on a batch has ``step_flops`` operations."""
        convolutional = any(isinstance(m, CONVOLUTIONS) for m in stage.modules())
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
        """The operations of a step for a row, those included that its memory mode computes again.
        The heads' forward pass is a third of the operations of the plain step that are not those of
        the encoder's two passes."""
        encoder, heads = RECOMPUTED[Mode(self.mode)]
        head_flops = max(0, self.flops - 2 * self.forward_flops) / 3
        return self.flops + encoder * self.forward_flops + heads * head_flops

    def distance(self, other: "Work") -> float:
        """Returns the distance to another stage in doublings."""
        pairs = (
            (self.flops, other.flops),
            (self.flops / self.values, other.flops / other.values),
            (self.rows, other.rows),
        )
        return math.hypot(*(math.log2(a / b) for a, b in pairs)) + (self.mode != other.mode)


class Measured(_Document):
    """The speed of a stage.

    Attributes:
        work: the stage.
        rows_per_second: rows a second while it trains, waiting for data included.
        frozen_rows_per_second: rows a second that it computes once it is frozen.
        written_bytes_per_second: bytes a second that its output is encoded and written with;
            ``None`` for the output layer, which has no store.
    """

    work: Work
    rows_per_second: Speed
    frozen_rows_per_second: Speed
    written_bytes_per_second: Speed | None

    @property
    def flops_per_second(self) -> float:
        """The operations of the plain step computed in a second; what a mode computes again does
        not count."""
        return self.rows_per_second * self.work.flops


class Calibration(_Document):
    """The measurements of ``greedy bench`` on one device of one machine.

    Attributes:
        device: the name of the device.
        threads: the number of torch's threads.
        versions: the versions of the packages.
        peak_flops: operations a second at best, see ``greedy.forecasts.bench.peak_flops``.
        measured: the measured stages, the newest last.
    """

    format: Literal[3] = 3
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
        """Reads the calibration of this machine.

        Raises:
            NotCalibrated: there is none, or it is damaged or of another device or number of
                threads.
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
                f"times are unknown, since {path} is damaged or of another version of greedy "
                f"({reason}): {command} replaces it"
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
        """Writes the calibration to a file, in place of any older one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, with_digest(self.model_dump(mode="json")))

    def adding(self, measured: Measured) -> Self:
        """Returns a calibration with one more stage, in place of an older one with the same
        work."""
        others = [other for other in self.measured if other.work != measured.work]
        return self.model_copy(update={"measured": [*others, measured]})

    def seconds_a_row(self, work: Work) -> float | None:
        """Estimates the seconds that a row takes in a stage's training. Returns ``None`` if no
        stage of its kind and precision was measured."""
        if (near := self._nearest(work)) is None:
            return None
        return work.computed_flops / near.work.computed_flops / near.rows_per_second

    def frozen_seconds_a_row(self, work: Work) -> float | None:
        """Estimates the seconds that a row takes to be computed by a frozen stage. Returns ``None``
        if no stage of its kind and precision was measured."""
        if (near := self._nearest(work)) is None:
            return None
        return work.forward_flops / near.work.forward_flops / near.frozen_rows_per_second

    @property
    def frozen_rate(self) -> float | None:
        """The multiply-adds a second of frozen stages, the median of all measured ones; ``None`` if
        none was."""
        rates = [m.frozen_rows_per_second * m.work.forward_flops / 2 for m in self.measured]
        return statistics.median(rates) if rates else None

    @property
    def write_rate(self) -> float | None:
        """The bytes of a store that are written in a second, the median of all measured stages;
        ``None`` if none was."""
        rates = [rate for m in self.measured if (rate := m.written_bytes_per_second) is not None]
        return statistics.median(rates) if rates else None

    def _nearest(self, work: Work) -> Measured | None:
        alike = [
            other
            for other in self.measured
            if (other.work.kind, other.work.precision) == (work.kind, work.precision)
        ]
        return min(alike, key=lambda other: work.distance(other.work), default=None)


def byte_operations(device_type: str, calibration: Calibration | None) -> ByteOperations:
    """Returns how many multiply-adds of frozen stages take as long as a byte of a store on a
    ``cpu``, ``cuda`` or ``mps`` device: measured, or those of a usual one."""
    computed = (calibration and calibration.frozen_rate) or COMPUTE_RATE[device_type]
    written = (calibration and calibration.write_rate) or WRITE_RATE[device_type]
    return ByteOperations(read=computed / READ_RATE[device_type], written=computed / written)


def calibration_of(device_type: str) -> Calibration | None:
    """Returns the calibration of this machine, ``None`` if there is none that can be used."""
    try:
        return Calibration.load(device_type)
    except NotCalibrated:
        return None
