"""An optimiser's state as plain JSON and tensors by name: nothing in it can be executed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from greedy.base.errors import TrainingError


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Converts nested dictionaries, lists, numbers and texts to a JSON value, and moves their
    tensors into ``tensors`` under names that begin with ``name``.

    Raises ``TrainingError`` for values of any other type.
    """
    match value:
        case Tensor():
            tensors[name] = value
            return {"tensor": name}
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            packed = [[k, pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]
            return {"mapping": packed}
        case list() | tuple():
            packed = [pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
            return {"tuple" if isinstance(value, tuple) else "list": packed}
    raise TrainingError(
        f"{name} holds a {type(value).__name__}, which no checkpoint can keep: let the "
        f"optimiser's state consist of tensors, numbers, texts, lists and dictionaries"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Reverses ``pack``. Raises ``ValueError`` or ``KeyError`` for values that ``pack`` did not
    write."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "mapping":
            return {key: unpack(value, tensors) for key, value in content}
        case "list":
            return [unpack(value, tensors) for value in content]
        case "tuple":
            return tuple(unpack(value, tensors) for value in content)
    raise ValueError(f"{kind} is not known")
