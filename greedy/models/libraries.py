"""Networks of torchvision and timm by their names, with weights drawn at random."""

from typing import Any, Final

from torch import nn

from greedy.base.errors import UserError, first_line, missing_packages
from greedy.base.text import did_you_mean
from greedy.models.stages import Shape

_AUXILIARY: Final = ("googlenet", "inception_v3")  # whose training gives several outputs


def library_network(name: str, image: Shape, classes: int) -> nn.Module:
    """Builds a network of torchvision or timm, with weights drawn at random.

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME``.
        image: the shape (C, H, W) of an image.
        classes: the number of classes.

    Raises:
        UserError: the library or the network is not there, or the network takes other images.
    """
    library, _, model = name.partition(":")
    build = _from_timm if library == "timm" else _from_torchvision
    try:
        return build(model, image, classes)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{name} cannot be built for {classes} classes and images of "
            f"{'x'.join(map(str, image))} ({first_line(error)}): choose another data.image_size "
            f"or network"
        ) from error


def _from_torchvision(name: str, image: Shape, classes: int) -> nn.Module:
    from torchvision import models  # noqa: PLC0415

    _require_known("torchvision", name, models.list_models(module=models))
    channels, height, width = image
    if channels != 3:
        raise UserError(
            f"torchvision:{name} takes images of 3 channels and the data have {channels}: choose a "
            f"network of timm, which takes any number, or write a function that returns one for "
            f"them (--model module:function)"
        )
    arguments: dict[str, Any] = {}
    if name in _AUXILIARY:
        arguments |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        if height != width:
            raise ValueError("it takes square images")
        arguments["image_size"] = height
    elif name.startswith("maxvit_"):
        arguments["input_size"] = (height, width)
    return models.get_model(name, weights=None, num_classes=classes, **arguments)


def _from_timm(name: str, image: Shape, classes: int) -> nn.Module:
    try:
        import timm  # noqa: PLC0415
    except ImportError:
        raise missing_packages(f"timm:{name}", ["timm"], "timm") from None
    _require_known("timm", name.partition(".")[0], timm.list_models())
    published = timm.models.get_pretrained_cfg(name)
    sized = published is not None and published.fixed_input_size
    arguments: dict[str, Any] = {"img_size": image[1:]} if sized else {}
    return timm.create_model(name, num_classes=classes, in_chans=image[0], **arguments)


def _require_known(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        hint = did_you_mean(name, known, most=3) or "see its list of models"
        raise UserError(f"{library} has no network {name!r}: {hint}")
