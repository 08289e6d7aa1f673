"""What is decided of a stage once, when its training starts, and the memory modes of a step."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

# What a record may claim: it can come from a stranger, and others believe it.
Count = Annotated[int, Field(ge=0, le=2**62)]
Size = Annotated[int, Field(ge=1, le=2**40)]


class Mode(StrEnum):
    """How much of a batch is in the device's memory at once. All modes give the same gradients.

    c is the encoder's output, x the stage's input, and a micro-batch a few of the batch's rows. In
    a block of several layers, c are the outputs of all layers before the last batch norm, and its
    gradient those of the batch norms' outputs:

    - ``plain``: everything that autograd keeps;
    - ``heads``: x, c and its gradient; the local heads see a micro-batch at a time;
    - ``keep-c``: x and c;
    - ``keep-c-stream-x``: c; x stays in host memory and is copied a micro-batch at a time;
    - ``keep-nothing``: x only; c is computed again;
    - ``stream-x``: one micro-batch only.
    """

    PLAIN = "plain"
    HEADS = "heads"
    KEEP_C = "keep-c"
    KEEP_C_STREAM_X = "keep-c-stream-x"
    KEEP_NOTHING = "keep-nothing"
    STREAM_X = "stream-x"

    @property
    def keeps_gradient(self) -> bool:
        """Whether dL/dc of the whole batch is kept."""
        return self is Mode.HEADS

    @property
    def keeps_c(self) -> bool:
        """Whether c of the whole batch is kept."""
        return self in {Mode.HEADS, Mode.KEEP_C, Mode.KEEP_C_STREAM_X}

    @property
    def streams(self) -> bool:
        """Whether x stays in host memory."""
        return self in {Mode.KEEP_C_STREAM_X, Mode.STREAM_X}


def _checked(name: str) -> str:
    return str(Mode(name))


# A mode in a JSON document. `AfterValidator(Mode)` fails: pydantic counts a validator's arguments,
# and calling an enum takes more of them since Python 3.12.
ModeName = Annotated[str, AfterValidator(_checked)]


def modes(device_type: str) -> list[Mode]:
    """Returns the modes that differ on a device: on a CPU, streaming from host memory saves
    nothing."""
    return [mode for mode in Mode if device_type != "cpu" or not mode.streams]


DEFAULT_MICRO_BATCH = 16


@dataclass(frozen=True)
class StepMemory:
    """A memory mode and the number of rows of its micro-batches, which ``plain`` ignores."""

    mode: Mode = Mode.PLAIN
    micro_batch: int = DEFAULT_MICRO_BATCH

    def recorded(self) -> dict[str, Any]:
        """Returns the JSON fields of a stage's record."""
        return {"memory_mode": str(self.mode), "micro_batch": self.micro_batch}

    def slices(self, rows: int) -> list[slice]:
        """Returns the rows of each micro-batch of a batch."""
        size = rows if self.mode is Mode.PLAIN else self.micro_batch
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def smaller(self, device_type: str) -> "StepMemory | None":
        """Returns what to try next when this ran out of memory and no count is available: the next
        mode of the device, and after the last one half the micro-batch. ``None`` after a
        micro-batch of one row."""
        order = list(Mode)
        for mode in order[order.index(self.mode) + 1 :]:
            if mode in modes(device_type):
                return StepMemory(mode, self.micro_batch)
        if self.micro_batch > 1:
            return StepMemory(self.mode, self.micro_batch // 2)
        return None


class _Decided(BaseModel):
    """Frozen, and written as it was decided: without what was left out."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}


class DataChoices(_Decided):
    """What was decided of stage 0: mean and deviation of each channel; which numbers image files
    hold, and which of them were left out since they could not be read, with reasons; the seed with
    which the stored pass through a data set was drawn that is drawn again in every pass."""

    mean: list[float]
    std: list[float]
    pixels: Literal["bytes", "integers", "floats"] = "bytes"  # see ``greedy.data.modes``
    skipped: dict[str, str] = {}
    pass_seed: Annotated[int, Field(ge=0)] | None = None

    @property
    def fresh(self) -> bool:
        """Whether training rows are read again from the data set for every view and live epoch."""
        return self.pass_seed is not None


class Choices(_Decided):
    """The automatic choices of a stage's training, see ``greedy.training.resolve``. ``views`` and
    ``reuse`` are those of the store that it writes."""

    precision: Literal["float32", "bfloat16", "float16"]
    views: Size | Literal["live"]
    reuse: Count = 0
    encoding: Literal["float32", "float16", "bfloat16", "uint8", "uint4"]
    shuffle: Literal["rows", "window"]
    chunk_rows: Size
    memory_mode: ModeName
    micro_batch: Size
    planned_peak_bytes: Count | None
    write_batch: Size
    threads: Annotated[int, Field(ge=1, le=4096)]
    compile: bool = False
    unfold: bool = False
    channels_last: bool = False
    deterministic: bool = False
    memory_reduced: bool = False

    @property
    def memory(self) -> StepMemory:
        """What a step keeps of a batch."""
        return StepMemory(Mode(self.memory_mode), self.micro_batch)
