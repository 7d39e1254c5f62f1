from torch import Tensor, nn


class AdaptPosition(nn.Module):
    """Adapt the positional embeddings of a detector's queries by their features.

    The result is `pos + g(feat)`, where g is two linear layers with ReLU between.

    Args:
        token_dim: d.

    Inputs:
        pos and feat, both (B, queries, d).

    Returns:
        (B, queries, d).

    Source: Chen et al., Mobile-Former, CVPR 2022, equation 4; not in the released code.
    """

    def __init__(self, token_dim: int) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(token_dim, token_dim), nn.ReLU(), nn.Linear(token_dim, token_dim))

    def forward(self, pos: Tensor, feat: Tensor) -> Tensor:
        return pos + self.g(feat)
