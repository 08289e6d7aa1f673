"""Precision and memory settings of devices, whatever a user has set before."""

import os
from collections.abc import Iterator
from threading import Event

import pytest
import torch
import torch.distributed as dist

from greedy.base import ranks
from greedy.base.devices import full_float32, is_out_of_memory, pick_device, set_determinism
from greedy.base.ranks import Ranks

CUDNN = torch.backends.cudnn
NEW = hasattr(CUDNN, "conv")  # torch 2.9 and newer


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    CUDNN.allow_tf32 = True  # torch's default, for the newer switches too


def precisions() -> list[str]:
    return [CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision]


@pytest.mark.skipif(not NEW, reason="torch 2.8 has no other switch")
@pytest.mark.parametrize("chosen", ["ieee", "tf32"])
def test_full_float32_is_had_where_a_user_has_set_one_of_the_newer_switches(chosen: str) -> None:
    CUDNN.conv.fp32_precision = chosen
    CUDNN.rnn.fp32_precision = "tf32"
    with full_float32():
        assert "tf32" not in precisions()
        assert not CUDNN.allow_tf32
    assert precisions() == [chosen, "tf32"]


def test_full_float32_is_had_where_a_user_has_set_the_older_switch() -> None:
    CUDNN.allow_tf32 = True
    with full_float32():
        assert not CUDNN.allow_tf32
    assert CUDNN.allow_tf32


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_need_not_be_deterministic_may_use_tf32(deterministic: bool) -> None:
    device = torch.device("cuda")  # named, not used
    before = torch.are_deterministic_algorithms_enabled(), CUDNN.deterministic
    try:
        if NEW:
            CUDNN.conv.fp32_precision = "ieee"  # which makes the older switch unreadable
        set_determinism(device, deterministic)
        assert CUDNN.allow_tf32 is not deterministic
    finally:
        torch.use_deterministic_algorithms(before[0])
        CUDNN.deterministic = before[1]


OUT_OF_MEMORY = [
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "MPS backend out of memory (MPS allocated: 17.4 GB)",
]


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_memory_that_ran_out_is_known_by_every_library_s_words(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_user_s_allocator_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    pick_device("cpu")
    assert {v for k, v in os.environ.items() if k.endswith("ALLOC_CONF")} == {os.environ[name]}


@pytest.mark.parametrize(("count", "taken"), [(1, []), (2, [1]), (4, [1])])
def test_a_process_of_torchrun_takes_the_gpu_of_its_number_if_there_is_one(
    count: int, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be told to compute on the CPU."""
    found: list[int] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(ranks, "fresh_store", lambda store, *_: store)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    Ranks.of_torchrun()
    assert found == taken


def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL does when it ends."""
    ended, store = Event(), dist.HashStore()
    monkeypatch.setattr(dist, "destroy_process_group", ended.wait)
    monkeypatch.setattr(ranks, "group_store", lambda: store)
    monkeypatch.setattr(ranks, "WAITING", 0.0)
    try:
        assert Ranks(1, 2).fail("there is no room")
        assert store.get(ranks.FAILED) == b"process 1 has ended: there is no room"
    finally:
        ended.set()
