"""Tensors as the bytes of a safetensors file."""

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from greedy.base.errors import TrainingError
from greedy.base.tensorfile import DTYPE_NAMES, file_parts


def written(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(file_parts(tensors))


def test_they_are_those_of_the_library() -> None:
    tensors = {f"{kind}": torch.arange(6).reshape(2, 3).to(kind) for kind in DTYPE_NAMES}
    tensors |= {"step": torch.tensor(3.0), "none": torch.empty(0, 4), "é\n\x7f\x01": torch.ones(3)}
    assert written(tensors) == safetensors.torch.save(tensors)
    assert written({}) == safetensors.torch.save({})


def test_memory_of_two_names_or_another_order_is_written_as_it_reads() -> None:
    values = torch.arange(12.0).reshape(3, 4).requires_grad_()
    read = safetensors.torch.load(written({"one": values, "same": values, "turned": values.T}))
    for name, expected in (("one", values), ("same", values), ("turned", values.T)):
        assert torch.equal(read[name], expected)


def test_a_type_without_a_name_is_refused() -> None:
    with pytest.raises(TrainingError, match="w is complex128, which safetensors files"):
        written({"w": torch.zeros(2, dtype=torch.complex128)})


# In a process of its own, whose highest memory is its own.
WIDE_STAGE = """
import sys
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
from greedy import GreedyTrainer
from greedy.losses import Pred
from greedy.training.checkpoint import Checkpoints

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

def watched(save):
    def watched_save(*args):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS:")
        save(*args)
        print(resident("VmHWM:") - before)
    return watched_save

Checkpoints.save = watched(Checkpoints.save)
images = torch.randint(0, 256, (8, 1, 32, 64), dtype=torch.uint8)
data = TensorDataset(images, torch.arange(8) % 2)
network = nn.Sequential(nn.Flatten(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2))
settings = {"epochs": 1, "device": "cpu", "views": 1, "batch_size": 4}
trainer = GreedyTrainer(network, run_dir=sys.argv[1], loss=Pred(), **settings)
trainer.fit(data, data)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own count of a process's memory")
def test_a_checkpoint_takes_no_memory_for_what_it_keeps(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WIDE_STAGE, str(tmp_path / "run")]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    weights = 4 * 2048 * 2048
    assert max(map(int, output.split())) < weights / 2
