"""Tensors as the bytes of a safetensors file, one at a time.

The library's own ``save`` puts the whole file together in memory, beside copies of its tensors: of
a wide stage with an optimiser's state three times what its training takes.
"""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from greedy.base.errors import TrainingError

# As the format calls them, in the order in which the library writes them: the widest first.
NAMES = {
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
ALIGNED = 8  # the header's length, filled up with spaces


def file_parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes that the library's ``save`` gives, in parts; tensors on a CPU are not copied, from
    a device they come one by one. Two names for the same memory become two tensors.

    Raises ``TrainingError`` naming a tensor of a type that the format does not have.
    """
    order = list(NAMES)
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise TrainingError(f"{name} is {kind}, which no file can keep: use another type")
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    yield _header({name: tensors[name] for name in names})
    for name in names:
        values = tensors[name].detach().cpu().contiguous()
        yield values.reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape, where = list(tensor.shape), [start, end]
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": where}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text
