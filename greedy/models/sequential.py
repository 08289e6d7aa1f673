"""Any model as an ``nn.Sequential`` of its own parts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from greedy.base.errors import UserError, first_line
from greedy.base.seeds import global_states, seeded_globally
from greedy.models.chain import NotTraceable, Part, opened, parts
from greedy.models.layout import features_first
from greedy.models.stages import Shape

Module = TypeVar("Module", bound=nn.Module)

# Of the images with which parts are compared with their model: two numbers, since code may look.
ROWS = {"training": 2, "evaluation": 3}


class Parts(nn.Sequential):
    """A model's parts, one after the other.

    Attributes:
        paths: the name of each part in the model, empty for what is no module there.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(*(part.module for part in parts))
        self.paths = [part.path for part in parts]


def sequential(model: nn.Module, image: Shape = (3, 224, 224)) -> nn.Sequential:
    """Returns a model as a ``Sequential`` of its own modules, which computes the same.

    The modules are the model's, with their weights; the model is not changed. Those that call
    others one after the other are opened: every ``Sequential``, and every module that holds several
    blocks. What happens between modules, such as flattening or adding a class token, becomes a
    small module. Maps (H, W, C) between modules become maps (C, H, W), as the heads of local losses
    and stores take them. An ``nn.Sequential`` is returned as it is.

    That both compute the same is proved by comparing their outputs on random images, bit for bit,
    in training and in evaluation mode; of a model on the meta device it is not.

    Args:
        model: the model, which maps images (B, C, H, W) to logits (B, classes).
        image: the shape (C, H, W) of an image.

    Raises:
        UserError: a part of the model needs more than the output of the one before.
    """
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        return model
    on_meta = any(p.is_meta for p in model.parameters())
    try:
        with seeded_globally(0):  # tracing runs what draws numbers in the forward pass
            found = parts(model)
    except NotTraceable as reason:
        if on_meta:
            raise _error(model, f"its forward pass cannot be traced ({reason})") from reason
        with _failures_named(model, image):
            called = _recorded(model, image)
        found = [part for each in called for part in opened(each)]
    if sum(part.learns for part in found) < 2:
        raise _error(model, "all its layers depend on more than the one before")
    network = Parts(features_first(found, image)).train(model.training)
    if not on_meta:
        _prove(model, network, image)
    return network


def _error(model: nn.Module, reason: str) -> UserError:
    return UserError(
        f"{type(model).__name__} is no chain of modules ({reason}): write it as an nn.Sequential, "
        f"whose children may be whole blocks of it"
    )


@contextmanager
def _failures_named(model: nn.Module, image: Shape) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} cannot take images of {'x'.join(map(str, image))} "
            f"({first_line(error)}): change its first layers or the size of the images"
        ) from error


def _prove(model: nn.Module, network: nn.Module, image: Shape) -> None:
    for mode in ROWS:
        with _failures_named(model, image):
            expected, drawn = _output(model, image, mode)
        try:
            given, drawn_by_parts = _output(network, image, mode)
        except Exception as error:
            reason = f"in {mode} mode its parts fail one after the other: {first_line(error)}"
            raise _error(model, reason) from error
        if not torch.equal(expected.nan_to_num(), given.nan_to_num()):
            raise _error(model, f"in {mode} mode its parts compute something else")
        if drawn != drawn_by_parts:
            raise _error(model, f"in {mode} mode its own forward pass draws random numbers")


def _output(module: nn.Module, image: Shape, mode: str) -> tuple[Tensor, list[Any]]:
    """Returns a module's output for random images, and the states of the global generators after
    it. Nothing of the module is changed, nor are other random numbers."""
    module = _copy(module).train(mode == "training")
    images = _images(module, image, ROWS[mode])
    with seeded_globally(0, images.device), torch.no_grad():
        output = module(images)
        states = global_states()
    _require_tensor(module, output)
    return output, states


def _require_tensor(model: nn.Module, output: Any) -> None:
    if not isinstance(output, Tensor):
        raise _error(model, f"it gives a {type(output).__name__} where a tensor is needed")


def _images(module: nn.Module, image: Shape, rows: int = 2) -> Tensor:
    like = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.rand((rows, *image), generator=generator).to(like)


def _copy(module: Module) -> Module:
    """Returns a copy of a module that shares its weights."""
    return deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _recorded(model: nn.Module, image: Shape) -> Iterator[Part]:
    """Yields the children that a model calls in a forward pass, where each takes what the one
    before gives, or flattens it. Raises ``UserError`` for one that takes something else."""
    copy = _copy(model).eval()
    calls: list[tuple[str, tuple[Any, ...], Any]] = []
    for name, child in _called(copy):
        child.register_forward_hook(
            lambda _, inputs, output, name=name: calls.append((name, inputs, output))
        )
    value, before = _images(copy, image), "the images are"
    with torch.no_grad():
        last = copy(value)
    _require_tensor(model, last)
    for name, inputs, output in [*calls, ("", (last,), None)]:
        same = len(inputs) == 1 and inputs[0] is value
        if not same and not (len(inputs) == 1 and _is_flattened(inputs[0], value)):
            what = f"{name} takes" if name else "its output is"
            raise _error(model, f"{what} something else than what {before}")
        if not same:
            yield Part(nn.Flatten(), "")
        if name:
            yield Part(model.get_submodule(name), name)
        value, before = output, f"{name} gives"


def _called(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the children that a model may call, those in lists and dictionaries among them."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def _is_flattened(given: Any, value: Any) -> bool:
    """Returns whether a tensor is another one flattened."""
    if not isinstance(given, Tensor) or not isinstance(value, Tensor):
        return False
    return given.shape == value.flatten(1).shape and torch.equal(given, value.flatten(1))
