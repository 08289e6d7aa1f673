"""Networks that are no architectures of a recipe's own, as its field names them."""

from typing import Annotated, Final

from pydantic import Field

LIBRARIES: Final = ("torchvision", "timm")
NETWORK_FIELDS: Final = frozenset(
    ("feature_multiplier", "hidden_layers", "hidden_width", "dropout", "activation")
)
"""Fields of the model section that are settings of some of the recipe's own networks."""

NetworkName = Annotated[
    str,
    Field(pattern=r"^[\w.]+:[\w.\-]+$", description="torchvision:NAME, timm:NAME, module:function"),
]
Names = Annotated[list[str], Field(min_length=1)]


def is_library_network(network: str) -> bool:
    """Returns whether a recipe's network is one of torchvision or timm."""
    return network.partition(":")[0] in LIBRARIES and ":" in network


def is_function(network: str) -> bool:
    """Returns whether a recipe's network is what a function returns."""
    return ":" in network and not is_library_network(network)


def needs_code(network: str) -> bool:
    """Returns whether a recipe's network is only known to code of the user's own."""
    return network == "python" or is_function(network)
