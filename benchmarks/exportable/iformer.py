"""iFormer."""

import copy

import torch
from torch import Tensor, nn

from mfkernels.models.iformer import IFormer
from mfkernels.nn import SingleHeadModulationAttention

from .layers import sizes


def exportable_iformer(model: IFormer) -> nn.Module:
    """Return a copy of the network with its batch norms folded and its attentions as plain products."""
    network = copy.deepcopy(model)
    attentions = [m for m in network.modules() if isinstance(m, SingleHeadModulationAttention)]
    plain = {id(attention): _Attention(attention) for attention in attentions}
    for module in list(network.modules()):
        for name, child in module.named_children():
            if id(child) in plain:
                setattr(module, name, plain[id(child)])
    return network.fuse()


class _Attention(nn.Module):
    """Queries, keys, values and gate are one convolution."""

    def __init__(self, attention: SingleHeadModulationAttention) -> None:
        super().__init__()
        if attention.window_size is not None:
            raise ValueError("exportable: there is no formulation of attention in windows of its own")
        self.released = attention.form == "released"
        parts = [getattr(attention, name).fuse() for name in ("q", "k", "v_gate")]
        self.depth, self.channels = parts[0].out_channels, parts[2].out_channels // 2
        with torch.no_grad():
            for value in (parts[0].weight, parts[0].bias):
                value *= attention.scale
        self.all = nn.Conv2d(attention.channels, 2 * (self.depth + self.channels), 1)
        with torch.no_grad():
            self.all.weight.copy_(torch.cat([part.weight for part in parts]))
            self.all.bias.copy_(torch.cat([part.bias for part in parts]))
        self.proj = attention.proj.fuse()

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = sizes(x)
        q, k, rest = self.all(x).flatten(2).split([self.depth, self.depth, 2 * self.channels], 1)
        values, gate = rest.split(self.channels, 1)
        if self.released:
            values = torch.sigmoid(values)
        weights = torch.softmax(q.transpose(1, 2) @ k, -1)
        out = values @ weights.transpose(1, 2)
        if not self.released:
            out = torch.sigmoid(out)
        return self.proj((out * torch.sigmoid(gate)).reshape(batch, self.channels, height, width))
