"""The similarity matching loss, equations (4) and (5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.precision import widened
from greedy.losses.deviation import deviation
from greedy.losses.layers import same_width
from greedy.models import Shape
from greedy.models.lean import lean


def similarity_matrix(x: Tensor) -> Tensor:
    """Returns S(X): the correlation of every pair of rows, equation (5).

        s_ij = x̃_i·x̃_j / (||x̃_i|| ||x̃_j||),  x̃_i = x_i − mean(x_i)

    Takes (B, F), gives (B, B) in [-1, 1].
    """
    centred = x - x.mean(dim=1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    unit = centred / (norm + 1e-8)
    return (unit @ unit.T).clamp(-1, 1)


def similarity_loss(z: Tensor, y: Tensor) -> Tensor:
    """Returns L_sim = ||S(z) − S(Y)||², averaged over the B x B entries, equation (4).

    ``z`` (B, F) are the similarity head's features NeuralNet(H), ``y`` (B, classes) the one-hot
    labels.
    """
    return F.mse_loss(similarity_matrix(z), similarity_matrix(y))


def feature_deviation(h: Tensor) -> Tensor:
    """Returns one number a feature: its standard deviation over space or tokens, at least in
    float32.

    (B, C, H, W) becomes (B, C), and (B, T, D) becomes (B, D). Maps of at most 3 channels or of
    height 1, tokens of at most 3 features and single tokens are only flattened, and vectors stay
    unchanged. The gradient of a feature without deviation is 0.
    """
    if h.dim() == 3:
        h = h.mT[..., None]  # a token is like a position of a map
    if h.dim() == 4 and h.shape[1] > 3 and h.shape[2] > 1:
        if torch.compiler.is_compiling():  # the compiler fuses torch's own into passes over h
            return widened(h).flatten(2).std(dim=2)
        return deviation(h)
    return widened(h).flatten(1)


class SimilarityHead(nn.Module):
    """NeuralNet(H) of equation (4): a 3x3 convolution or a linear layer that keeps the width, then
    the standard deviation over each feature map, or over the tokens.

    Takes h (B, *shape), gives z (B, F).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.transform = same_width(shape)

    def forward(self, h: Tensor) -> Tensor:
        return feature_deviation(lean(self.transform, h))
