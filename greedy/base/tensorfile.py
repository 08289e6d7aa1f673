"""Tensors as the bytes of a safetensors file, one at a time.

The library's ``save`` holds the whole file in memory, in addition to copies of its tensors: for a
wide stage with optimiser state, three times the memory that training takes.
"""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from greedy.base.errors import TrainingError

# The format's names, in the order in which the library writes tensors: the widest first.
DTYPE_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNED = 8  # the header's length is padded with spaces to a multiple of it


def file_parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields the bytes that the library's ``save`` gives, in parts; CPU tensors are not copied,
    those of a device come one by one. Two names for the same memory become two tensors.

    Raises ``TrainingError`` naming a tensor whose type the format does not have.
    """
    order = list(DTYPE_NAMES)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise TrainingError(
                f"{name} is {kind}, which safetensors files cannot hold: use another type"
            )
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    yield _header({name: tensors[name] for name in names})
    for name in names:
        values = tensors[name].detach().cpu().contiguous()
        yield values.reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape, offsets = list(tensor.shape), [start, end]
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": shape,
            "data_offsets": offsets,
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text
