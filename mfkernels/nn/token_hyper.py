from torch import Tensor, nn

from .inputs import check_tokens


class HyperNetwork(nn.Module):
    """The coefficients of an activation from a token: hardsigmoid(Linear(relu(Linear(token)))).

    Args:
        token_dim: d.
        outputs: number of coefficients, m C for m functions of C channels.
        token_id: which token; -1 for all of them (spatial-aware: `DynamicReLU` mixes them per position).
        reduction: d / reduction hidden units.

    Inputs:
        tokens (T, B, d).

    Returns:
        (B, outputs) in [0, 1]; with `token_id=-1` (B, T, outputs).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `HyperFunc`.
    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2 and equation 3.
    """

    def __init__(self, token_dim: int, outputs: int, *, token_id: int = 0, reduction: int = 4) -> None:
        super().__init__()
        if token_id < -1:
            raise ValueError(
                f"HyperNetwork: token_id must be -1 (all) or the index of a token, got {token_id}"
            )
        self.token_dim, self.token_id = token_dim, token_id
        hidden = token_dim // reduction
        self.hyper = nn.Sequential(
            nn.Linear(token_dim, hidden), nn.ReLU(), nn.Linear(hidden, outputs), nn.Hardsigmoid()
        )

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens("HyperNetwork", tokens, self.token_dim)
        if self.token_id == -1:
            return self.hyper(tokens).transpose(0, 1)
        if self.token_id >= tokens.shape[0]:
            raise ValueError(
                f"HyperNetwork: token_id is {self.token_id}, but tokens are only {tuple(tokens.shape)}"
            )
        return self.hyper(tokens[self.token_id])
