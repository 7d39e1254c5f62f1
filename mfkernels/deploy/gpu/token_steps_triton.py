from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operators.former_block.triton import copy, form, linear, norm
from ...operators.token_hyper.triton import doubled_gate, hidden_units, second_layer
from ...operators.triton_maps import COUNTS, place, power
from ...operators.triton_rows import product


@triton.jit
def gate(x, gates, out, size, tokens, width, BN: tl.constexpr):
    """Compute the rows out = x gates, or x where these are None; both (T, width)."""
    for first in range(0, tokens, 16):
        t = first + tl.arange(0, 16)
        for start in range(0, width, BN):
            n = start + tl.arange(0, BN)
            inside = (t < tokens)[:, None] & (n < width)[None, :]
            at = t[:, None] * width + n[None, :]
            value = tl.load(x + at, inside, 0.0).to(tl.float32)
            if gates is not None:
                value *= tl.load(gates + at, inside, 0.0).to(tl.float32)
            tl.store(out + t[:, None] * size + n[None, :], value, inside)
    tl.debug_barrier()


@triton.jit(do_not_specialize=[*COUNTS, "channels"])
def update_kernel(
    gathered, gates, tokens_in, result,
    bridge_w, bridge_b, norm_w, norm_b,
    q_w, q_b, proj_w, proj_b, norm1_w, norm1_b, fc1_w, fc1_b, fc2_w, fc2_b, norm2_w, norm2_b,
    given, before, sum0, x, q, weights, attended, sum1, second, units, active, sum2, out,
    size, tokens, channels, width, hidden, heads, depth, scale, eps,
    FORMER: tl.constexpr, FFN: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Run one sample, on rows as the kernels of `former_block` do."""
    b = tl.program_id(0).to(tl.int64)
    row = b * tokens * size
    given, before, sum0, x, q = given + row, before + row, sum0 + row, x + row, q + row
    weights, attended, sum1, second = weights + row, attended + row, sum1 + row, second + row
    units, active, sum2, out = units + row, active + row, sum2 + row, out + row
    gathered += b * tokens * channels
    if gates is not None:
        gates += b * tokens * channels
    copy(tokens_in + b * tokens * width, width, 1, before, size, 1, tokens, width, BN)
    gate(gathered, gates, given, size, tokens, channels, BN)
    linear(given, size, 1, bridge_w, channels, 1, bridge_b, before, sum0, size, tokens, channels, width, BN)
    norm(sum0, norm_w, norm_b, None, None, None, x, size, tokens, width, eps, BD)
    if FORMER:
        form(
            q_w, q_b, proj_w, proj_b, norm1_w, norm1_b, fc1_w, fc1_b, fc2_w, fc2_b, norm2_w, norm2_b,
            x, x, q, x, x, weights, attended, sum1, second, units, active, sum2, out,
            size, tokens, width, hidden, heads, depth, scale, eps, False, FFN, BD, BN, BT,
        )  # fmt: skip
        copy(out, size, 1, result + b * tokens * width, width, 1, tokens, width, BN)
    else:
        copy(x, size, 1, result + b * tokens * width, width, 1, tokens, width, BN)


NUMBERS = ["token_id", "units", "outputs", "other_units", "other_outputs", "keys", "queries"]


# A constant cannot become another network's or layer's number.
@triton.jit(do_not_specialize=[*COUNTS, *NUMBERS, "blocks", "rows"])
def outputs_kernel(
    tokens_in, token_id, batch, tokens, width,
    weight1, bias1, weight2, bias2, out, units, outputs,
    other_weight1, other_bias1, other_weight2, other_bias2, other_out, other_units, other_outputs,
    key_w, key_b, key_out, value_w, value_b, value_out, keys,
    query_w, query_b, query_out, gate_w, gate_b, gate_out, queries,
    blocks, rows, BB: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Compute the slopes of two hyper networks, and the outputs of two to four linear layers."""
    block, row, job = place(blocks, rows)
    o = block * BO + tl.arange(0, BO)
    r = (row * BB + tl.arange(0, BB)).to(tl.int64)
    if job < 2:
        if job == 1:
            weight1, bias1, weight2, bias2, out, units, outputs = (
                other_weight1, other_bias1, other_weight2, other_bias2, other_out, other_units, other_outputs,
            )  # fmt: skip
        inside_o, inside_r = o < outputs, r < batch
        token, y = tokens_in + token_id * width, tl.zeros([BB, BO], tl.float32)
        for start in range(0, units, BH):
            u = start + tl.arange(0, BH)
            inside_u = u < units
            unit = hidden_units(
                token, tokens * width, 1, r, inside_r, width, weight1, bias1, u, inside_u, BB, BH
            )  # fmt: skip
            y += second_layer(unit, weight2, units, u, inside_u, o, inside_o)
        y = doubled_gate(y + tl.load(bias2 + o, inside_o, 0.0).to(tl.float32)[None, :])
        y = tl.where((2 * o >= outputs)[None, :], y - 1, y)
    else:
        weight, bias, out, outputs = key_w, key_b, key_out, keys
        if job == 3:
            weight, bias, out = value_w, value_b, value_out
        elif job == 4:
            weight, bias, out, outputs = query_w, query_b, query_out, queries
        elif job == 5:
            weight, bias, out, outputs = gate_w, gate_b, gate_out, queries
        inside_o, inside_r = o < outputs, r < batch * tokens
        y = product(tokens_in, width, 1, r, inside_r, weight, width, 1, o, inside_o, width, BB, BO)
        y += tl.load(bias + o, inside_o, 0.0).to(tl.float32)[None, :]
        if job == 5:
            y = doubled_gate(y)
    to = out + r[:, None] * outputs + o[None, :]
    tl.store(to, y.to(out.dtype.element_ty), inside_r[:, None] & inside_o[None, :])


def update_tokens(
    gathered: Tensor,
    gates: Tensor | None,
    tokens: Tensor,
    layers: Sequence[Tensor],
    num_heads: int,
    eps: float,
) -> Tensor:
    batch, count, width = tokens.shape
    channels = gathered.shape[2]
    result = torch.empty((batch, count, width), dtype=tokens.dtype, device=tokens.device)
    if result.numel() == 0:
        return result
    parameters = [*(p.contiguous() for p in layers), *[None] * (16 - len(layers))]
    ffn = len(layers) == 16
    hidden, depth = layers[10].shape[0] if ffn else 0, width // num_heads
    # As in `former_block`: rows of sixteens begin at sixteens.
    names = ("before", "sum0", "x", "q", "attended", "sum1", "second", "sum2", "out")
    sizes = dict(given=channels) | dict.fromkeys(names, width) | dict(units=hidden, active=hidden)
    sizes["weights"] = -(-num_heads * count // 16) * 16
    kept = torch.empty((batch, count, sum(sizes.values())), dtype=torch.float32, device=tokens.device)
    rows = dict(zip(sizes, kept.split(list(sizes.values()), 2), strict=True))
    update_kernel[(batch,)](
        gathered.contiguous(), None if gates is None else gates.contiguous(), tokens.contiguous(), result,
        *parameters, rows["given"], rows["before"], rows["sum0"], rows["x"], rows["q"], rows["weights"],
        rows["attended"], rows["sum1"], rows["second"], rows["units"], rows["active"], rows["sum2"],
        rows["out"],
        kept.stride(1), count, channels, width, hidden, num_heads, depth, depth**-0.5, eps,
        FORMER=len(layers) > 4, FFN=ffn, BD=power(width, 16), BN=power(max(width, hidden), 32, 64),
        BT=power(count, 16), num_warps=8, num_stages=2,
    )  # fmt: skip
    return result


def outputs_of_tokens(
    tokens: Tensor, token_id: int, networks: Sequence[Tensor], layers: Sequence[Tensor]
) -> list[Tensor]:
    batch, count, width = tokens.shape
    parameters = [p.contiguous() for p in (*networks, *layers)]
    hypers = [parameters[:4], parameters[4:8]]
    pairs = [parameters[i : i + 2] for i in range(8, len(parameters), 2)]
    outs = [tokens.new_empty(batch, 2, hyper[2].shape[0] // 2) for hyper in hypers]
    outs += [tokens.new_empty(batch, count, weight.shape[0]) for weight, _ in pairs]
    most = max(p.shape[0] for p in parameters)
    if tokens.numel() == 0:
        return outs
    arguments: list[Any] = []
    for hyper, out in zip(hypers, outs, strict=False):
        arguments += [*hyper, out, hyper[0].shape[0], hyper[2].shape[0]]
    triples = [[*pair, out] for pair, out in zip(pairs, outs[2:], strict=True)]
    triples += triples[:1] * (4 - len(triples))  # of jobs that are not there
    for first, second in (triples[:2], triples[2:]):
        arguments += [*first, *second, first[0].shape[0]]
    blocks, rows = triton.cdiv(most, 64), triton.cdiv(batch * count, 16)
    outputs_kernel[(blocks * rows * len(outs),)](
        tokens.contiguous(), token_id, batch, count, width, *arguments, blocks, rows, BB=16, BH=16, BO=64
    )  # fmt: skip
    return outs
