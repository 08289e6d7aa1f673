"""The paper's networks, residual networks, and cutting a network into stages."""

from greedy.models.division import division
from greedy.models.initial import initialise, seeded
from greedy.models.libraries import library_network
from greedy.models.networks import ACTIVATIONS, mlp, vgg, vgg8b, vgg11b
from greedy.models.residual import preact_resnet18, resnet, wide_resnet
from greedy.models.sequential import sequential
from greedy.models.shapes import StageShapes, require_float32, shapes
from greedy.models.stages import ENCODERS, InputDropout, Shape, Stage, cut

__all__ = [
    "ACTIVATIONS",
    "ENCODERS",
    "InputDropout",
    "Shape",
    "Stage",
    "StageShapes",
    "cut",
    "division",
    "initialise",
    "library_network",
    "mlp",
    "preact_resnet18",
    "resnet",
    "seeded",
    "sequential",
    "require_float32",
    "shapes",
    "vgg",
    "vgg8b",
    "vgg11b",
    "wide_resnet",
]
