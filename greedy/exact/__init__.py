"""The gradients of a large batch, batch norm included, with one micro-batch of activations in
memory.

    greedy.exact.step(model, F.cross_entropy, images, labels, micro_batch=16)
    optimizer.step()

Adding up the gradients of micro-batches gives other gradients than those of the batch: each batch
norm then sees a micro-batch only, and so does a loss that compares samples.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from greedy.base.errors import UserError
from greedy.exact.passes import Passes
from greedy.exact.replay import Replay
from greedy.exact.rows import each_tensor, row_count, tensors_in
from greedy.exact.support import require_supported

__all__ = ["step"]


def step(
    module: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    micro_batch: int,
) -> Tensor:
    """Computes what ``loss(module(inputs), targets).backward()`` does, without the activations of
    more than a micro-batch in memory.

    Gradients are added to ``grad`` of the parameters, and of the inputs where they require one;
    running statistics move once, with the statistics of the batch. Samples may meet in batch norms
    and in the loss alone. Dropout and stochastic depth draw for each micro-batch, and the same in
    all passes over it; hooks of the module are called in every pass.

    A batch norm whose input has a gradient takes two more passes, one without and one with a
    backward pass; independent ones share them.

    Args:
        module: any module, in training or evaluation mode; it is left as it was.
        loss: gets the outputs of all samples at once, and the targets; returns a scalar.
        inputs: a tensor (B, ...), a tuple or list of the module's positional arguments, or a
            dictionary of its named ones, each tensor with a row for each sample. They may be in
            host memory while the module is on a GPU.
        targets: what the loss takes.
        micro_batch: the number of rows that are computed at a time.

    Returns:
        The loss, a scalar without gradient.

    Raises:
        UserError: samples meet elsewhere, or the module computes something else when it is called
            again, or hides its batch norms. After this and any other failure, gradients, buffers
            and running statistics are as before.
    """
    require_supported(module, micro_batch)
    count = row_count(inputs, "the inputs")
    slices = [slice(at, min(at + micro_batch, count)) for at in range(0, count, micro_batch)]
    device = device_of(module, inputs)
    with gradients_or_none_changed(module.parameters()), Replay([module], device) as replay:
        passes = Passes(module, inputs, slices, device, replay)
        value, slopes = differentiated(loss, passes.outputs(), targets)
        _hand_on(inputs, passes.backward(slopes))
    passes.update_running()
    return value


@contextmanager
def gradients_or_none_changed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Returns a context that adds to the gradients of parameters, or leaves them as they were if it
    fails."""
    before = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, gradient in before:
            parameter.grad = gradient
        raise
    for parameter, gradient in before:
        if gradient is not None:
            found = parameter.grad
            parameter.grad = gradient if found is None else gradient.add_(found)


def device_of(module: nn.Module, inputs: Any) -> torch.device:
    """Returns the device of a module, that of the inputs if it has no tensors."""
    tensors = [*module.parameters(), *module.buffers(), *tensors_in(inputs)]
    return tensors[0].device


def differentiated(
    loss: Callable[[Any, Any], Tensor], outputs: Any, targets: Any
) -> tuple[Tensor, Any]:
    """Returns the loss of outputs without gradient, and its gradients with respect to them."""
    with torch.enable_grad():
        leaves = each_tensor(lambda t: t.requires_grad_(t.is_floating_point()), outputs)
        value = loss(leaves, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UserError("the loss returns no single number: let it return a scalar tensor")
        value.backward()
    return value.detach(), each_tensor(lambda t: t.grad, leaves)


def _hand_on(inputs: Any, gradients: Any) -> None:
    """Adds to the gradients of what made the inputs, which may share a graph."""
    pairs: list[tuple[Tensor, Tensor | None]] = []
    each_tensor(lambda t, gradient: pairs.append((t, gradient)), inputs, gradients)
    given = [(t, gradient) for t, gradient in pairs if gradient is not None]
    if given:
        torch.autograd.backward([t for t, _ in given], [gradient for _, gradient in given])
