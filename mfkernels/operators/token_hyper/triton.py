from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_maps import COUNTS, place
from ..triton_rows import product


@triton.jit
def hidden_units(
    token, token_b, token_d, b, inside_b, width, weight, bias, u, inside_u, BB: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """Return units u of the first layer, of tokens b."""
    unit = product(token, token_b, token_d, b, inside_b, weight, width, 1, u, inside_u, width, BB, BH)
    unit += tl.load(bias + u, inside_u, 0.0).to(tl.float32)[None, :]
    # Not tl.maximum, which loses NaN.
    return tl.where(unit < 0, 0.0, unit)


@triton.jit
def second_layer(unit, weight, units, u, inside_u, o, inside_o):
    """Return what these units add to outputs o."""
    right = tl.load(weight + o[None, :] * units + u[:, None], inside_u[:, None] & inside_o[None, :], 0.0)
    return tl.dot(unit, right.to(tl.float32), input_precision="ieee")


@triton.jit
def doubled_gate(y):
    """2 hardsigmoid(y)."""
    gate = y + 3
    return tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 3


# A constant cannot become the other network's number.
@triton.jit(do_not_specialize=[*COUNTS, "token_b", "units", "outputs", "other_units", "other_outputs"])
def outputs_kernel(
    token, token_b, token_d, batch, width,
    weight1, bias1, weight2, bias2, g, out, hidden, units, outputs,
    other_weight1, other_bias1, other_weight2, other_bias2, other_g, other_out, other_hidden, other_units,
    other_outputs,
    TWO: tl.constexpr, BACKWARD: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Compute the slopes, those of the other network where the last axis is 1.

    With BACKWARD instead the gradients of the second layer's outputs, from those of the slopes (g), and the
    hidden units (B, units).
    """
    block, row, network = place(tl.cdiv(tl.maximum(outputs, other_outputs), BO), tl.cdiv(batch, BB))
    if network == 1:
        weight1, bias1, weight2, bias2, g, out, hidden, units, outputs = (
            other_weight1, other_bias1, other_weight2, other_bias2, other_g, other_out, other_hidden,
            other_units, other_outputs,
        )  # fmt: skip
    o = block * BO + tl.arange(0, BO)
    b = (row * BB + tl.arange(0, BB)).to(tl.int64)
    inside_o, inside_b = o < outputs, b < batch
    y = tl.zeros([BB, BO], tl.float32)
    for start in range(0, units, BH):
        u = start + tl.arange(0, BH)
        inside_u = u < units
        unit = hidden_units(
            token, token_b, token_d, b, inside_b, width, weight1, bias1, u, inside_u, BB, BH
        )  # fmt: skip
        if BACKWARD and block == 0:
            to = hidden + b[:, None] * units + u[None, :]
            tl.store(to, unit, inside_b[:, None] & inside_u[None, :])
        y += second_layer(unit, weight2, units, u, inside_u, o, inside_o)
    y += tl.load(bias2 + o, inside_o, 0.0).to(tl.float32)[None, :]
    at = b[:, None] * outputs + o[None, :]
    inside = inside_b[:, None] & inside_o[None, :]
    if BACKWARD:
        given = tl.load(g + at, inside, 0.0).to(tl.float32)
        tl.store(out + at, tl.where((y > -3) & (y < 3), given / 3, 0.0), inside)
    else:
        slopes = doubled_gate(y)
        if TWO:
            slopes = tl.where((2 * o >= outputs)[None, :], slopes - 1, slopes)
        tl.store(out + at, slopes.to(out.dtype.element_ty), inside)


def _launch(
    token: Tensor, networks: list[list[Tensor]], grads: list[Tensor], outs: list[Tensor],
    hiddens: list[Tensor], num_functions: int, backward: bool,
) -> None:  # fmt: skip
    batch, width = token.shape
    sides: list[list[Any]] = []
    for (weight1, bias1, weight2, bias2), g, out, hidden in zip(networks, grads, outs, hiddens, strict=True):
        tensors = [t.contiguous() for t in (weight1, bias1, weight2, bias2, g)]
        sides.append([*tensors, out, hidden, weight1.shape[0], weight2.shape[0]])
    outputs = max(side[-1] for side in sides)
    if batch * outputs == 0:
        return
    # Tiles of sixteen rows, the fewest that a product takes: there are few samples.
    grid = (triton.cdiv(outputs, 64) * triton.cdiv(batch, 16) * len(sides),)
    outputs_kernel[grid](
        token, *token.stride(), batch, width, *sides[0], *sides[-1],
        TWO=num_functions == 2, BACKWARD=backward, BB=16, BH=16, BO=64,
    )  # fmt: skip


def _networks(parameters: list[Tensor | None]) -> list[list[Tensor]]:
    given = [p for p in parameters if p is not None]
    return [given[i : i + 4] for i in range(0, len(given), 4)]


def forward(token: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *parameters, num_functions = arguments
    networks = _networks(parameters)
    outs = [
        token.new_empty(token.shape[0], num_functions, network[2].shape[0] // num_functions)
        for network in networks
    ]
    _launch(token, networks, outs, outs, outs, num_functions, backward=False)
    return outs[0], outs[1] if len(outs) > 1 else token.new_empty(0)


def backward(grad_slopes: Tensor, grad_other: Tensor, token: Tensor, *arguments: Any) -> list[Tensor]:
    *parameters, num_functions = arguments
    networks = _networks(parameters)
    outs, hiddens = (
        [token.new_empty((token.shape[0], network[i].shape[0]), dtype=torch.float32) for network in networks]
        for i in (2, 0)
    )
    given = [grad_slopes, grad_other][: len(networks)]
    _launch(token, networks, given, outs, hiddens, num_functions, backward=True)
    # The rest are plain products, which the library does best.
    wide, grad_token, grads = token.float(), torch.zeros_like(token, dtype=torch.float32), []
    for (weight1, _, weight2, _), g, hidden in zip(networks, outs, hiddens, strict=True):
        grad_hidden = torch.where(hidden > 0, g @ weight2.float(), 0.0)
        grad_token += grad_hidden @ weight1.float()
        products = (grad_hidden.t() @ wide, grad_hidden.sum(0), g.t() @ hidden, g.sum(0))
        grads += [p.to(token.dtype) for p in products]
    absent = [token.new_empty(0)] * (8 - len(grads))
    return [grad_token.to(token.dtype), *grads, *absent]
