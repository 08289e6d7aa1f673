"""The memory modes of a step, from the fastest to the smallest."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator


class Mode(StrEnum):
    """How much of a batch is in the device's memory at once. All modes give the same gradients.

    c is the encoder's output, x the stage's input, and a micro-batch a few of the batch's rows:

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
