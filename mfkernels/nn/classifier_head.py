import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .depthwise import pointwise_layers
from .dynamic_relu import DynamicReLU
from .fused_sequential import FusedSequential
from .inputs import Pair, check_channels, map_and_tokens
from .token_hyper import HyperNetwork


class ClassifierHead(nn.Module):
    """The head of Mobile-Former: the pooled map and the class token through two linear layers.

    Args:
        channels: C, of the map.
        num_classes: number of outputs.
        features: width of the first linear layer.
        token_dim: d.
        expansion: of the 1x1 convolution before pooling.
        groups: of that convolution; with more than one, channels are shuffled before it.
        class_tokens: n > 0: tokens 0 ... n-1 are joined to the pooled map; 0: the mean over the tokens of
            relu6(token); -1: none.
        activation: after the convolution: "relu6", or "dynamic_relu" from token `token_id`.
        hyper_reduction: see `HyperNetwork`.
        dropout: rate before the last layer.
        drop_branch: in training, probabilities per sample to drop the pooled map, and the tokens.

    Inputs:
        x (B, C, H, W) and tokens (T, B, d), or one pair of them.

    Returns:
        (B, num_classes).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `MergeClassifier`. It has a batch norm over the batch alone, so training needs
    two samples or more.
    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.3; norm and activations from the released code.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int = 1000,
        *,
        features: int,
        token_dim: int,
        expansion: int = 6,
        groups: int = 1,
        class_tokens: int = 1,
        activation: str = "relu6",
        token_id: int = 0,
        hyper_reduction: int = 4,
        dropout: float = 0.0,
        drop_branch: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        if activation not in ("relu6", "dynamic_relu"):
            raise ValueError(
                f"ClassifierHead: activation must be 'relu6' or 'dynamic_relu', got {activation!r}"
            )
        if activation == "dynamic_relu" and token_id == -1:
            raise ValueError("ClassifierHead: a dynamic_relu needs one token, got token_id -1 (all)")
        if sum(drop_branch) > 0 and class_tokens < 0:
            raise ValueError("ClassifierHead: drop_branch needs class tokens, got class_tokens -1")
        hidden = channels * expansion
        self.channels, self.token_dim = channels, token_dim
        self.class_tokens, self.drop_branch = class_tokens, tuple(drop_branch)
        shuffle = nn.ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.conv = FusedSequential(shuffle, *pointwise_layers(channels, hidden, groups))
        dynamic = activation == "dynamic_relu"
        self.act = DynamicReLU(2 if dynamic else 0)
        if dynamic:
            self.hyper = HyperNetwork(token_dim, 2 * hidden, token_id=token_id, reduction=hyper_reduction)
        tokens_width = token_dim * (1 if class_tokens == 0 else max(class_tokens, 0))
        self.fc = nn.Sequential(
            nn.Linear(hidden + tokens_width, features), nn.BatchNorm1d(features), nn.Hardswish()
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, num_classes))

    def forward(self, x: Tensor | Pair, tokens: Tensor | None = None) -> Tensor:
        pixels, tokens = map_and_tokens("ClassifierHead", x, tokens, self.token_dim)
        check_channels("ClassifierHead", pixels, self.channels)
        if tokens.shape[0] < self.class_tokens:
            raise ValueError(
                f"ClassifierHead: needs {self.class_tokens} class tokens, "
                f"got tokens of shape {tuple(tokens.shape)}"
            )
        pixels = self.conv(pixels)
        pixels = self.act(pixels, self.hyper(tokens)) if self.act.num_functions else self.act(pixels)
        pooled = F.hardswish(pixels.mean(dim=(2, 3)))
        if self.class_tokens > 0:
            parts = [pooled, *tokens[: self.class_tokens]]
        elif self.class_tokens == 0:
            parts = [pooled, F.relu6(tokens).mean(dim=0)]
        else:
            parts = [pooled]
        if self.training and sum(self.drop_branch) > 0:
            parts[0], parts[1] = self._drop(parts[0], parts[1])
        return self.classifier(self.fc(torch.cat(parts, dim=1)))

    def _drop(self, pooled: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        # One random number for both, from opposite ends: never are both dropped, if the rates sum to 1.
        drop_pooled, drop_token = self.drop_branch
        random = torch.rand(pooled.shape[0], 1, dtype=pooled.dtype, device=pooled.device)
        keep_pooled, keep_token = random >= drop_pooled, random < 1 - drop_token
        return pooled / (1 - drop_pooled) * keep_pooled, token / (1 - drop_token) * keep_token
