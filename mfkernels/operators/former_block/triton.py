"""Run the Former of one sample in one program.

Its few tokens stay in the nearest cache, and the weights stream by. Every step takes rows (T, ...) in float32
and leaves rows; all of them lie side by side in one tensor, so that they have one stride, `size`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_maps import COUNTS, add_to_mean, power
from ..triton_rows import product

# --- steps -------------------------------------------------------------------------------------------------


@triton.jit
def copy(x, x_t, x_d, out, out_t, out_d, tokens, width, BN: tl.constexpr):
    for first in range(0, tokens, 16):
        t = first + tl.arange(0, 16)
        for start in range(0, width, BN):
            n = start + tl.arange(0, BN)
            inside = (t < tokens)[:, None] & (n < width)[None, :]
            value = tl.load(x + t[:, None] * x_t + n[None, :] * x_d, inside, 0.0)
            tl.store(out + t[:, None] * out_t + n[None, :] * out_d, value.to(out.dtype.element_ty), inside)
    tl.debug_barrier()


@triton.jit
def linear(
    x, x_t, x_k, w, w_out, w_k, bias, add, out, size, tokens, inputs, outputs, BN: tl.constexpr
):  # fmt: skip
    """Compute out = x w^T + bias + add; bias and add may be None."""
    for first in range(0, tokens, 16):
        t = first + tl.arange(0, 16)
        for start in range(0, outputs, BN):
            n = start + tl.arange(0, BN)
            y = product(x, x_t, x_k, t, t < tokens, w, w_out, w_k, n, n < outputs, inputs, 16, BN)
            inside = (t < tokens)[:, None] & (n < outputs)[None, :]
            at = t[:, None] * size + n[None, :]
            if bias is not None:
                y += tl.load(bias + n, n < outputs, 0.0).to(tl.float32)[None, :]
            if add is not None:
                y += tl.load(add + at, inside, 0.0)
            tl.store(out + at, y, inside)
    tl.debug_barrier()


@triton.jit
def gelu(x, out, grad, size, tokens, width, BN: tl.constexpr):
    """Compute out = gelu(x); with grad, of gelu(x), instead out = that of x."""
    for first in range(0, tokens, 16):
        t = first + tl.arange(0, 16)
        for start in range(0, width, BN):
            n = start + tl.arange(0, BN)
            at = t[:, None] * size + n[None, :]
            inside = (t < tokens)[:, None] & (n < width)[None, :]
            value = tl.load(x + at, inside, 0.0)
            below = 0.5 * (1 + tl.erf(value * 0.7071067811865476))
            if grad is None:
                y = value * below
            else:
                slope = below + value * tl.exp(-0.5 * value * value) * 0.3989422804014327
                y = tl.load(grad + at, inside, 0.0) * slope
            tl.store(out + at, y, inside)
    tl.debug_barrier()


@triton.jit
def norm(x, weight, bias, grad, add, products, out, size, tokens, width, eps, BD: tl.constexpr):
    """Store the layer norm of x in out, or with grad the gradient of x + add, and products.

    The sum of the rows of products is the gradient of the weight.
    """
    d = tl.arange(0, BD)
    factors = tl.load(weight + d, d < width, 0.0).to(tl.float32)[None, :]
    for first in range(0, tokens, 16):
        t = first + tl.arange(0, 16)
        inside = (t < tokens)[:, None] & (d < width)[None, :]
        at = t[:, None] * size + d[None, :]
        value = tl.load(x + at, inside, 0.0)
        value = tl.where(inside, value - (tl.sum(value, 1) / width)[:, None], 0.0)
        scale = (1 / tl.sqrt(tl.sum(value * value, 1) / width + eps))[:, None]
        value *= scale
        if grad is None:
            y = value * factors + tl.load(bias + d, d < width, 0.0).to(tl.float32)[None, :]
        else:
            given = tl.load(grad + at, inside, 0.0)
            tl.store(products + at, given * value, inside)
            given *= factors
            along = (tl.sum(given * value, 1) / width)[:, None]
            y = scale * (given - (tl.sum(given, 1) / width)[:, None] - value * along)
            if add is not None:
                y += tl.load(add + at, inside, 0.0)
        tl.store(out + at, y, inside)
    tl.debug_barrier()


@triton.jit
def attend(q, k, v, weights, out, size, tokens, heads, depth, scale, BT: tl.constexpr):
    """Compute out = softmax(scale q k^T) v by heads; weights (T, heads T) keeps the softmax."""
    key = tl.arange(0, BT)
    for head in range(heads):
        c = head * depth
        for first in range(0, tokens, 16):
            t = first + tl.arange(0, 16)
            logits = scale * product(
                q + c, size, 1, t, t < tokens, k + c, size, 1, key, key < tokens, depth, 16, BT
            )  # fmt: skip
            logits = tl.where((key < tokens)[None, :], logits, float("-inf"))
            powers = tl.exp(logits - tl.max(logits, 1)[:, None])
            inside = (t < tokens)[:, None] & (key < tokens)[None, :]
            to = weights + head * tokens + t[:, None] * size + key[None, :]
            tl.store(to, powers / tl.sum(powers, 1)[:, None], inside)
    tl.debug_barrier()
    for head in range(heads):
        c = head * depth
        own = weights + head * tokens
        linear(own, size, 1, v + c, 1, size, None, None, out + c, size, tokens, tokens, depth, 32)


@triton.jit
def attend_gradient(
    q, k, v, weights, grad, logits, grad_q, grad_k, grad_v, size, tokens, heads, depth, scale,
    BT: tl.constexpr,
):  # fmt: skip
    """From grad, of what attend gives; logits: room for the gradients of the logits."""
    key = tl.arange(0, BT)
    none = tl.zeros([16], tl.float32)
    for head in range(heads):
        c = head * depth
        for first in range(0, tokens, 16):
            t = first + tl.arange(0, 16)
            inside = (t < tokens)[:, None] & (key < tokens)[None, :]
            at = head * tokens + t[:, None] * size + key[None, :]
            weight = tl.load(weights + at, inside, 0.0)
            given = product(
                grad + c, size, 1, t, t < tokens, v + c, size, 1, key, key < tokens, depth, 16, BT
            )  # fmt: skip
            _, pivot, _, mean = add_to_mean(weight, given, none - 1, none, none, none, BT)
            tl.store(logits + at, scale * weight * (given - pivot[:, None] - mean[:, None]), inside)
    tl.debug_barrier()
    for head in range(heads):
        c = head * depth
        own, kept = logits + head * tokens, weights + head * tokens
        linear(own, size, 1, k + c, 1, size, None, None, grad_q + c, size, tokens, tokens, depth, 32)
        linear(own, 1, size, q + c, 1, size, None, None, grad_k + c, size, tokens, tokens, depth, 32)
        linear(kept, 1, size, grad + c, 1, size, None, None, grad_v + c, size, tokens, tokens, depth, 32)


@triton.jit
def form(
    qkv_w, qkv_b, proj_w, proj_b, norm1_w, norm1_b, fc1_w, fc1_b, fc2_w, fc2_b, norm2_w, norm2_b,
    x, normed, q, k, v, weights, attended, sum1, second, units, active, sum2, out,
    size, tokens, width, hidden, heads, depth, scale, eps,
    STANDARD: tl.constexpr, FFN: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Run all of it, from the rows x to the rows out; without STANDARD, normed, k and v are not used."""
    if STANDARD:
        norm(x, norm1_w, norm1_b, None, None, None, normed, size, tokens, width, eps, BD)
        linear(normed, size, 1, qkv_w, width, 1, qkv_b, None, q, size, tokens, width, 3 * width, BN)
        attend(q, k, v, weights, attended, size, tokens, heads, depth, scale, BT)
    else:
        linear(x, size, 1, qkv_w, width, 1, qkv_b, None, q, size, tokens, width, width, BN)
        attend(q, x, x, weights, attended, size, tokens, heads, depth, scale, BT)
    linear(attended, size, 1, proj_w, width, 1, proj_b, x, sum1, size, tokens, width, width, BN)
    if STANDARD:
        norm(sum1, norm2_w, norm2_b, None, None, None, second, size, tokens, width, eps, BD)
    elif FFN:
        norm(sum1, norm1_w, norm1_b, None, None, None, second, size, tokens, width, eps, BD)
    else:
        norm(sum1, norm1_w, norm1_b, None, None, None, out, size, tokens, width, eps, BD)
    if FFN:
        linear(second, size, 1, fc1_w, width, 1, fc1_b, None, units, size, tokens, width, hidden, BN)
        gelu(units, active, None, size, tokens, hidden, BN)
        if STANDARD:
            linear(active, size, 1, fc2_w, hidden, 1, fc2_b, sum1, out, size, tokens, hidden, width, BN)
        else:
            linear(active, size, 1, fc2_w, hidden, 1, fc2_b, second, sum2, size, tokens, hidden, width, BN)
            norm(sum2, norm2_w, norm2_b, None, None, None, out, size, tokens, width, eps, BD)


# --- kernels -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*COUNTS, "in_b", "in_t"])
def forward_kernel(
    tokens_in, in_b, in_t, in_d, result,
    qkv_w, qkv_b, proj_w, proj_b, norm1_w, norm1_b, fc1_w, fc1_b, fc2_w, fc2_b, norm2_w, norm2_b,
    x, normed, q, k, v, weights, attended, sum1, second, units, active, sum2, out,
    size, tokens, width, hidden, heads, depth, scale, eps,
    STANDARD: tl.constexpr, FFN: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = b * tokens * size
    x, normed, q, k, v, weights = x + row, normed + row, q + row, k + row, v + row, weights + row
    attended, sum1, second, units = attended + row, sum1 + row, second + row, units + row
    active, sum2, out = active + row, sum2 + row, out + row
    copy(tokens_in + b * in_b, in_t, in_d, x, size, 1, tokens, width, BN)
    form(
        qkv_w, qkv_b, proj_w, proj_b, norm1_w, norm1_b, fc1_w, fc1_b, fc2_w, fc2_b, norm2_w, norm2_b,
        x, normed, q, k, v, weights, attended, sum1, second, units, active, sum2, out,
        size, tokens, width, hidden, heads, depth, scale, eps, STANDARD, FFN, BD, BN, BT,
    )  # fmt: skip
    copy(out, size, 1, result + b * tokens * width, width, 1, tokens, width, BN)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    given, result, qkv_w, proj_w, norm1_w, fc1_w, fc2_w, norm2_w,
    x, q, k, v, weights, sum1, second, units, sum2,
    grad, grad_sum2, norm2, grad_units, grad_second, norm1, grad_sum1, grad_attended, logits, grad_q, grad_k,
    grad_v, grad_normed, grad_x,
    size, tokens, width, hidden, heads, depth, scale, eps,
    STANDARD: tl.constexpr, FFN: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """From the rows that forward_kernel left, the gradients of all rows."""
    b = tl.program_id(0).to(tl.int64)
    row = b * tokens * size
    x, q, k, v, weights, sum1 = x + row, q + row, k + row, v + row, weights + row, sum1 + row
    second, units, sum2, grad, grad_sum2 = second + row, units + row, sum2 + row, grad + row, grad_sum2 + row
    norm2, grad_units, grad_second, norm1 = norm2 + row, grad_units + row, grad_second + row, norm1 + row
    grad_sum1, grad_attended, logits = grad_sum1 + row, grad_attended + row, logits + row
    grad_q, grad_k, grad_v, grad_normed = grad_q + row, grad_k + row, grad_v + row, grad_normed + row
    grad_x += row
    copy(given + b * tokens * width, width, 1, grad, size, 1, tokens, width, BN)
    if STANDARD:
        linear(grad, size, 1, fc2_w, 1, hidden, None, None, grad_units, size, tokens, width, hidden, BN)
        gelu(units, grad_units, grad_units, size, tokens, hidden, BN)
        linear(grad_units, size, 1, fc1_w, 1, width, None, None, grad_second, size, tokens, hidden, width, BN)
        norm(sum1, norm2_w, None, grad_second, grad, norm2, grad_sum1, size, tokens, width, eps, BD)
    elif FFN:
        norm(sum2, norm2_w, None, grad, None, norm2, grad_sum2, size, tokens, width, eps, BD)
        linear(grad_sum2, size, 1, fc2_w, 1, hidden, None, None, grad_units, size, tokens, width, hidden, BN)
        gelu(units, grad_units, grad_units, size, tokens, hidden, BN)
        linear(
            grad_units, size, 1, fc1_w, 1, width, None, grad_sum2, grad_second, size, tokens, hidden, width,
            BN,
        )  # fmt: skip
        norm(sum1, norm1_w, None, grad_second, None, norm1, grad_sum1, size, tokens, width, eps, BD)
    else:
        norm(sum1, norm1_w, None, grad, None, norm1, grad_sum1, size, tokens, width, eps, BD)
    linear(grad_sum1, size, 1, proj_w, 1, width, None, None, grad_attended, size, tokens, width, width, BN)
    if STANDARD:
        attend_gradient(
            q, k, v, weights, grad_attended, logits, grad_q, grad_k, grad_v, size, tokens, heads, depth,
            scale, BT,
        )  # fmt: skip
        linear(grad_q, size, 1, qkv_w, 1, width, None, None, grad_normed, size, tokens, 3 * width, width, BN)
        norm(x, norm1_w, None, grad_normed, grad_sum1, norm1, grad_x, size, tokens, width, eps, BD)
    else:
        attend_gradient(
            q, x, x, weights, grad_attended, logits, grad_q, grad_k, grad_v, size, tokens, heads, depth,
            scale, BT,
        )  # fmt: skip
        linear(grad_q, size, 1, qkv_w, 1, width, None, grad_sum1, grad_x, size, tokens, width, width, BN)
        # The tokens are keys and values, too.
        for first in range(0, tokens, 16):
            t, d = first + tl.arange(0, 16), tl.arange(0, BD)
            inside = (t < tokens)[:, None] & (d < width)[None, :]
            at = t[:, None] * size + d[None, :]
            both = tl.load(grad_k + at, inside, 0.0) + tl.load(grad_v + at, inside, 0.0)
            tl.store(grad_x + at, tl.load(grad_x + at, inside, 0.0) + both, inside)
        tl.debug_barrier()
    copy(grad_x, size, 1, result + b * tokens * width, width, 1, tokens, width, BN)


# --- calls -------------------------------------------------------------------------------------------------

_LAYERS = ("qkv", "proj", "norm1", "fc1", "fc2", "norm2")


class _Call:
    """The sizes of a call, its rows by name, and its launches."""

    def __init__(self, tokens: Tensor, arguments: tuple, gradients: bool) -> None:
        *parameters, self.heads, form, self.eps = arguments
        self.tokens, (self.batch, self.count, self.width) = tokens, tokens.shape
        parts = (p if p is None else p.contiguous() for p in parameters)
        self.parameters = {f"{layer}_{part}": next(parts) for layer in _LAYERS for part in "wb"}
        fc1 = self.parameters["fc1_w"]
        self.hidden = 0 if fc1 is None else fc1.shape[0]
        self.standard, self.ffn = form == "standard", fc1 is not None
        # Queries, keys and values follow one another, as their layer gives them.
        names = ("x", "normed", "q", "k", "v", "attended", "sum1", "second", "sum2", "out")
        sizes = dict.fromkeys(names, self.width) | dict(units=self.hidden, active=self.hidden)
        # So that rows of sixteens begin at sixteens, whatever the number of tokens.
        sizes["weights"] = -(-self.heads * self.count // 16) * 16
        if gradients:
            names = ("", "_sum2", "_second", "_sum1", "_attended", "_q", "_k", "_v", "_normed", "_x")
            sizes |= dict.fromkeys([f"grad{name}" for name in names] + ["norm1", "norm2"], self.width)
            sizes |= dict(grad_units=self.hidden, logits=sizes["weights"])
        shape = (self.batch, self.count, sum(sizes.values()))
        rows = torch.empty(shape, dtype=torch.float32, device=tokens.device)
        self.rows = dict(zip(sizes, rows.split(list(sizes.values()), 2), strict=True))

    def launch(self, kernel: Any, *first: Any, names: str, outputs: int) -> Tensor:
        """Launch `kernel` with `first`, the result, and the parameters and rows of these names.

        A program computes at most as many outputs of a layer at once as stay in registers.
        """
        result = torch.empty(self.tokens.shape, dtype=self.tokens.dtype, device=self.tokens.device)
        if result.numel() == 0:
            return result
        both = self.parameters | self.rows
        kernel[(self.batch,)](
            *first, result, *(both[name] for name in names.split()),
            self.rows["x"].stride(1), self.count, self.width, self.hidden, self.heads,
            self.width // self.heads, (self.width // self.heads) ** -0.5, self.eps,
            STANDARD=self.standard, FFN=self.ffn, BD=power(self.width, 16),
            BN=power(max(self.width, self.hidden), 32, outputs), BT=power(self.count, 16),
            num_warps=8, num_stages=3 if self.standard else 2,  # as ptxas does without spilling
        )  # fmt: skip
        return result

    def forward(self) -> Tensor:
        layers = " ".join(self.parameters)
        rows = "x normed q k v weights attended sum1 second units active sum2 out"
        return self.launch(
            forward_kernel, self.tokens, *self.tokens.stride(), names=f"{layers} {rows}", outputs=64
        )  # fmt: skip

    def backward(self, grad_out: Tensor) -> Tensor:
        return self.launch(
            backward_kernel, grad_out.contiguous(),
            names="qkv_w proj_w norm1_w fc1_w fc2_w norm2_w x q k v weights sum1 second units sum2 "
            "grad grad_sum2 norm2 grad_units grad_second norm1 grad_sum1 grad_attended logits grad_q grad_k "
            "grad_v grad_normed grad_x",
            outputs=128,
        )  # fmt: skip


def forward(tokens: Tensor, *arguments: Any) -> Tensor:
    return _Call(tokens, arguments, gradients=False).forward()


def backward(grad_out: Tensor, tokens: Tensor, *arguments: Any) -> list[Tensor]:
    call = _Call(tokens, arguments, gradients=True)
    call.forward()
    grad_tokens = call.backward(grad_out)
    rows = {name: value.flatten(0, 1) for name, value in call.rows.items()}
    if call.standard:
        q = torch.cat([rows["grad_q"], rows["grad_k"], rows["grad_v"]], 1)
        names = dict(norm1="grad_normed", norm2="grad_second", fc2="grad")
        pairs = dict(qkv=(q, rows["normed"]), fc2=(rows["grad"], rows["active"]))
    else:
        names = dict(norm1="grad_second" if call.ffn else "grad", norm2="grad")
        pairs = dict(qkv=(rows["grad_q"], rows["x"]), fc2=(rows["grad_sum2"], rows["active"]))
    pairs |= dict(proj=(rows["grad_sum1"], rows["attended"]), fc1=(rows["grad_units"], rows["second"]))
    grads = [grad_tokens]
    for layer in _LAYERS:
        # Sums over all rows: plain products, which the library does best.
        for part in "wb":
            like = call.parameters[f"{layer}_{part}"]
            if like is None:
                grads.append(tokens.new_empty(0))
            elif layer.startswith("norm"):
                summed = rows[layer] if part == "w" else rows[names[layer]]
                grads.append(summed.sum(0).to(like.dtype))
            else:
                g, x = pairs[layer]
                grads.append((g.t() @ x if part == "w" else g.sum(0)).to(like.dtype))
    return grads
