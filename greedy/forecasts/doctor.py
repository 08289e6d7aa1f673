"""The facts about this machine, and the choices of every ``auto`` on it."""

import errno
import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO, Literal

import psutil
import torch

from greedy.base.devices import (
    available_memory,
    device_name,
    free_memory,
    pick_device,
    pick_precision,
)
from greedy.base.versions import versions
from greedy.memory.choice import FREE_MEMORY_SHARE
from greedy.recipes.per_stage import AUTO_ENCODING
from greedy.runs.plan_basis import FREE_DISK_SHARE
from greedy.training.resolve import RESIDENT_SHARE

OPTIONAL = ("scipy", "onnx", "onnxscript", "onnxruntime", "matplotlib", "tensorboard")
PROBE_BYTES, PROBE_SECONDS = 256 * 2**20, 1.0  # at most, for writing and for reading each
BLOCK = 8 * 2**20

PageCache = Literal["dropped", "kept", "unknown"]


@dataclass(frozen=True)
class Device:
    """A device to compute on.

    Attributes:
        type: the value of ``--device``; of several GPUs the first is used.
        name: the name of its model.
        total_bytes: bytes of its memory.
        free_bytes: bytes of its memory that are free.
        fast_bfloat16: whether it computes bfloat16 faster than float32; every device computes both.
    """

    type: str
    name: str
    total_bytes: int
    free_bytes: int
    fast_bfloat16: bool


@dataclass(frozen=True)
class Disk:
    """The file system of the runs.

    Attributes:
        path: the directory that was looked at.
        total_bytes: bytes in all.
        free_bytes: bytes that are free.
        read_bytes_per_second: the rate at which a file was read from front to back; ``None`` if
            none could be written.
        page_cache: where the file was read from. ``dropped``: from the disk. ``kept``: from memory.
            ``unknown``: from one of the two.
    """

    path: str
    total_bytes: int
    free_bytes: int
    read_bytes_per_second: float | None
    page_cache: PageCache


@dataclass(frozen=True)
class Automatic:
    """The automatic choices of a run that began now."""

    device: str
    precision: str
    encoding: str
    memory_budget_bytes: int
    disk_budget_bytes: int
    ram_budget_bytes: int
    threads: int


@dataclass(frozen=True)
class Examination:
    """The facts about a machine. Packages that are not installed have the version ``None``."""

    versions: Mapping[str, str | None]
    system: str
    devices: Sequence[Device]
    memory_total_bytes: int
    memory_free_bytes: int
    disk: Disk
    automatic: Automatic


def examine(place: Path) -> Examination:
    """Examines the machine, and the disk of the directory ``place`` with a temporary file of at
    most 256 MiB, which takes a second or two."""
    disk = _disk(place)
    return Examination(
        versions=_versions(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        devices=_devices(),
        memory_total_bytes=psutil.virtual_memory().total,
        memory_free_bytes=available_memory(),
        disk=disk,
        automatic=_automatic(disk.free_bytes),
    )


def _versions() -> dict[str, str | None]:
    by_package: dict[str, str | None] = {**versions(), "cuda of torch": torch.version.cuda}
    for name in ("torchvision", "safetensors", "pillow", *OPTIONAL):
        try:
            by_package[name] = version(name)
        except PackageNotFoundError:
            by_package[name] = None
    return by_package


def _devices() -> list[Device]:
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return [_device(device) for device in (*devices, torch.device("cpu"))]


def _device(device: torch.device) -> Device:
    total = psutil.virtual_memory().total
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    fast = pick_precision("auto", device) == "bfloat16"
    return Device(device.type, device_name(device), total, free_memory(device), fast)


def _automatic(disk_free: int) -> Automatic:
    device = pick_device("auto")
    return Automatic(
        device=device.type,
        precision=pick_precision("auto", device),
        encoding=AUTO_ENCODING,
        memory_budget_bytes=int(FREE_MEMORY_SHARE * free_memory(device)),
        disk_budget_bytes=int(FREE_DISK_SHARE * disk_free),
        ram_budget_bytes=int(RESIDENT_SHARE * available_memory()),
        threads=torch.get_num_threads(),
    )


def _disk(place: Path) -> Disk:
    usage = shutil.disk_usage(place)
    rate: float | None = None
    page_cache: PageCache = "unknown"
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            _fill(file, min(PROBE_BYTES, usage.free // 4))
            page_cache = _drop_pages(file)
            rate = _read_rate(file)
    except OSError:  # no permission to write, or no room: the other facts are known all the same
        pass
    return Disk(str(place.absolute()), usage.total, usage.free, rate, page_cache)


def _fill(file: BinaryIO, size: int) -> None:
    """Writes random bytes, which no file system can compress, until ``size`` are on the disk or
    ``PROBE_SECONDS`` are over."""
    block = os.urandom(BLOCK)
    began = time.perf_counter()
    for _ in range(size // BLOCK):
        file.write(block)
        os.fsync(file.fileno())
        if time.perf_counter() - began > PROBE_SECONDS:
            break


def _drop_pages(file: BinaryIO) -> PageCache:
    """Asks the system to drop a file's pages from memory, and returns whether it did."""
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return "unknown"
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    byte = bytearray(1)
    try:  # reads a byte if it is in memory, and fails if the disk would have to be waited for
        os.preadv(file.fileno(), [byte], os.fstat(file.fileno()).st_size // 2, os.RWF_NOWAIT)
    except OSError as error:
        return "dropped" if error.errno == errno.EAGAIN else "unknown"
    return "kept"


def _read_rate(file: BinaryIO) -> float | None:
    """Measures the bytes a second at which a file is read from its start until its end, or until
    ``PROBE_SECONDS`` are over. Returns ``None`` for an empty file."""
    file.seek(0)
    buffer, done = mmap.mmap(-1, BLOCK), 0
    began = time.perf_counter()
    while time.perf_counter() - began < PROBE_SECONDS and (
        read := os.readv(file.fileno(), [buffer])
    ):
        done += read
    return done / (time.perf_counter() - began) if done else None
