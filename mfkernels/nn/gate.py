from torch import nn


def gate_layer(token_dim: int, channels: int) -> nn.Sequential:
    """Half of the "dynamic" gate of the released code, 2 hardsigmoid(Linear(tokens)); callers double it.

    A zero bias and weight give a gate of 1.
    """
    return nn.Sequential(nn.Linear(token_dim, channels), nn.Hardsigmoid())
