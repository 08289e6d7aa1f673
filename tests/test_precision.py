"""Whether numbers are finite."""

import pytest
import torch

from greedy.base.precision import all_finite

INFINITE = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("number", INFINITE)
def test_a_single_number_is_found_wherever_it_is(dtype: torch.dtype, number: float) -> None:
    for place in range(17):  # within a vector register and behind it
        tensor = torch.ones(17, dtype=dtype)
        assert all_finite([torch.ones(2, 3), tensor])
        tensor[place] = number
        assert not all_finite([torch.ones(2, 3), tensor])


def test_sparse_and_empty_tensors_and_those_of_several_types() -> None:
    with torch.sparse.check_sparse_tensor_invariants(True):
        sparse = torch.sparse_coo_tensor([[0, 0]], [3e38, 3e38], (2,))  # adds up to infinity
        assert not all_finite([torch.ones(2), sparse])
    assert all_finite([]) and all_finite([torch.empty(0), torch.ones(())])
    assert all_finite(
        [torch.ones(2, dtype=torch.bfloat16), torch.tensor([1e300], dtype=torch.float64)]
    )
