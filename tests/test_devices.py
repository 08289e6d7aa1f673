"""Precision and memory settings of devices, whatever a user has set before."""

from collections.abc import Iterator

import pytest
import torch

from greedy.base.devices import full_float32, set_determinism

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
