"""Values of the authors' published implementation, and layers like theirs."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from greedy.losses import LocalLoss

GOLDEN = np.load(Path(__file__).parent / "data/local_loss_blocks.npz")
OURS = {  # the published names of what is trained, and of what is fixed, and ours
    "encoder.weight": "layer.0.weight",
    "encoder.bias": "layer.0.bias",
    "bn.weight": "layer.1.weight",
    "bn.bias": "layer.1.bias",
    "decoder_y.weight": "heads.prediction.classifier.weight",
    "decoder_y.bias": "heads.prediction.classifier.bias",
    "decoder_y.weight_fa": "heads.prediction.feedback",
    "proj_y.weight": "heads.projection",
    "linear_loss.weight": "heads.similarity.transform.weight",
    "conv_loss.weight": "heads.similarity.transform.weight",
}
CLASSES = 5


def assert_golden(values: Tensor, golden: np.ndarray, accuracy: float) -> None:
    worst = (values.detach() - torch.from_numpy(golden)).abs().max()
    assert worst <= accuracy * (np.abs(golden).max() + 0.01)


class Block(nn.Module):
    """A linear or convolutional layer of which values were published, with the heads of a loss."""

    def __init__(self, kind: str, loss: LocalLoss, activation: type[nn.Module]) -> None:
        super().__init__()
        encoder, norm, shape = (
            (nn.Linear(12, 20), nn.BatchNorm1d(20), (20,))
            if kind == "linear"
            else (nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), (8, 7, 7))
        )
        self.layer = nn.Sequential(encoder, norm, activation())
        self.heads = loss.heads(shape, CLASSES)
