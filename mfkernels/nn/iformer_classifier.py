import torch
from torch import Tensor, nn

from .conv_bn import BNLinear


class IFormerClassifier(nn.Module):
    """Batch norm and linear layer over the pooled features; with distillation a second pair beside it.

    Args:
        features: C.
        num_classes: outputs.
        distillation: whether there is a second head, which learns from a teacher.

    Inputs:
        x (B, C).

    Returns:
        (B, num_classes): with distillation the mean of both heads, in train mode the two of them as a pair.

    State: the released iFormer's `Classfier`: `classifier` and `classifier_dist`.
    Source: Zheng, iFormer, ICLR 2025; Touvron et al., DeiT, ICML 2021 (distillation).
    """

    def __init__(self, features: int, num_classes: int, *, distillation: bool = False) -> None:
        super().__init__()
        self.classifier = BNLinear(features, num_classes)
        self.classifier_dist = BNLinear(features, num_classes) if distillation else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.classifier_dist is None:
            return self.classifier(x)
        both = self.classifier(x), self.classifier_dist(x)
        return both if self.training else (both[0] + both[1]) / 2

    def fuse(self) -> nn.Linear:
        """One linear layer that does the work of all in eval mode."""
        fused = self.classifier.fuse()
        if self.classifier_dist is not None:
            other = self.classifier_dist.fuse()
            with torch.no_grad():
                fused.weight.add_(other.weight).div_(2)
                fused.bias.add_(other.bias).div_(2)
        return fused
