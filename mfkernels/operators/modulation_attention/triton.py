"""Flash attention over the pixels of a window: logits are made tile by tile, forward and backward.

Channels are done in blocks, so that any head size fits the registers. In half precision tiles are multiplied
by tensor cores, and sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_map
from ..triton_maps import Map, add_to_mean, as_map, dot, place, power, rounded

# As COUNTS.
WINDOWS = ["WH", "columns", "windows"]


@triton.jit
def pixels_of(j, window, width, WH, WW, columns):
    """Return where pixel j of a window is in its map."""
    row = (window // columns) * WH + j // WW
    return (row * width + (window % columns) * WW + j % WW).to(tl.int64)


@triton.jit
def load_tile(base, c, channels, c_stride, p, inside_p, p_stride):
    """(channels, pixels), zero outside."""
    inside = (c < channels)[:, None] & inside_p[None, :]
    return tl.load(base + c.to(tl.int64)[:, None] * c_stride + p[None, :] * p_stride, inside, 0.0)


@triton.jit
def squashed(x, inside):
    """sigmoid(x) in x's dtype, zero outside."""
    return rounded(tl.where(inside, tl.sigmoid(x.to(tl.float32)), 0.0), x)


@triton.jit
def product(
    a, b, channels, a_c, a_p, b_c, b_p, at_a, at_b, inside_a, inside_b,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """sum_c a[c, at_a] b[c, at_b], (BA, BB); with LEFT of sigmoid(a), with RIGHT of sigmoid(b)."""
    sums = tl.zeros([BA, BB], tl.float32)
    for start in range(0, channels, BX):
        c = start + tl.arange(0, BX)
        left = load_tile(a, c, channels, a_c, at_a, inside_a, a_p)
        right = load_tile(b, c, channels, b_c, at_b, inside_b, b_p)
        if LEFT:
            left = squashed(left, (c < channels)[:, None])
        if RIGHT:
            right = squashed(right, (c < channels)[:, None])
        sums += dot(tl.trans(left), right)
    return sums


@triton.jit(do_not_specialize=WINDOWS)
def forward_kernel(
    q, k, v, gate, out, stats, scale, depth, channels, width, WH, WW, columns, windows,
    q_b, q_c, q_p, k_b, k_c, k_p, v_b, v_c, v_p, g_b, g_c, g_p, o_b, o_c, o_p,
    SIGMOID: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """Compute a block of channels of out (B, C, H, W).

    It is the result, or without a gate the context v P^T; stats (B, 2, H W) are the largest logit and the
    sum. One of them may be None.
    """
    pixels = WH * WW
    tile, block, both = place(tl.cdiv(pixels, BQ), 1 if out is None else tl.cdiv(channels, BC))
    j = tile * BQ + tl.arange(0, BQ)
    b, window = both // windows, (both % windows).to(tl.int32)
    inside_q = j < pixels
    at_q = pixels_of(j, window, width, WH, WW, columns)
    c = block * BC + tl.arange(0, BC)
    top = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    sums = tl.zeros([BQ, BC], tl.float32)
    for start in range(0, pixels, BK):
        i = start + tl.arange(0, BK)
        inside_k = i < pixels
        at_k = pixels_of(i, window, width, WH, WW, columns)
        logits = scale * product(
            q + b * q_b, k + b * k_b, depth, q_c, q_p, k_c, k_p, at_q, at_k, inside_q, inside_k,
            False, False, BQ, BK, BX,
        )  # fmt: skip
        logits = tl.where(inside_k[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - higher[:, None])
        rescale = tl.exp(top - higher)
        total = total * rescale + tl.sum(weights, 1)
        if out is not None:
            value = load_tile(v + b * v_b, c, channels, v_c, at_k, inside_k, v_p)
            if SIGMOID:
                value = squashed(value, inside_k[None, :])
            sums = sums * rescale[:, None] + dot(weights, tl.trans(value))
        top = higher
    if out is not None:
        result = sums / total[:, None]
        if gate is not None:
            if not SIGMOID:
                result = tl.sigmoid(result)
            own = load_tile(gate + b * g_b, c, channels, g_c, at_q, inside_q, g_p)
            result = result * tl.sigmoid(tl.trans(own.to(tl.float32)))
        to = out + b * o_b + c.to(tl.int64)[None, :] * o_c + at_q[:, None] * o_p
        tl.store(to, result.to(out.dtype.element_ty), inside_q[:, None] & (c < channels)[None, :])
    if stats is not None:
        size = pixels.to(tl.int64) * windows
        tl.store(stats + b * 2 * size + at_q, top, inside_q & (block == 0))
        tl.store(stats + (b * 2 + 1) * size + at_q, total, inside_q & (block == 0))


@triton.jit(do_not_specialize=WINDOWS)
def means_kernel(
    q, k, v, g, stats, means, scale, depth, channels, width, WH, WW, columns, windows,
    q_b, q_c, q_p, k_b, k_c, k_p, v_b, v_c, v_p, g_b, g_c, g_p,
    SIGMOID: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """Compute what a query's mean of the weights' gradients needs.

    With w the weights of a query and dP their gradients, means (B, 2, H W) are the dP of the largest w (the
    pivot), and the sum of w (dP - pivot), as for mobile_to_former_attention.
    """
    pixels = WH * WW
    tile, _, both = place(tl.cdiv(pixels, BQ), 1)
    j = tile * BQ + tl.arange(0, BQ)
    b, window = both // windows, (both % windows).to(tl.int32)
    inside_q = j < pixels
    at_q = pixels_of(j, window, width, WH, WW, columns)
    size = pixels.to(tl.int64) * windows
    top = tl.load(stats + b * 2 * size + at_q, inside_q, 0.0)
    total = tl.load(stats + (b * 2 + 1) * size + at_q, inside_q, 1.0)
    largest = tl.full([BQ], -1.0, tl.float32)
    pivot = tl.zeros([BQ], tl.float32)
    weight_sum = tl.zeros([BQ], tl.float32)
    sums = tl.zeros([BQ], tl.float32)
    for start in range(0, pixels, BK):
        i = start + tl.arange(0, BK)
        inside_k = i < pixels
        at_k = pixels_of(i, window, width, WH, WW, columns)
        logits = product(
            q + b * q_b, k + b * k_b, depth, q_c, q_p, k_c, k_p, at_q, at_k, inside_q, inside_k,
            False, False, BQ, BK, BX,
        )  # fmt: skip
        weights = tl.exp(logits * scale - top[:, None]) / total[:, None]
        weights = tl.where(inside_k[None, :], weights, 0.0)
        grads = product(
            g + b * g_b, v + b * v_b, channels, g_c, g_p, v_c, v_p, at_q, at_k, inside_q, inside_k,
            False, SIGMOID, BQ, BK, BX,
        )  # fmt: skip
        largest, pivot, weight_sum, sums = add_to_mean(weights, grads, largest, pivot, weight_sum, sums, BK)
    tl.store(means + b * 2 * size + at_q, pivot, inside_q)
    tl.store(means + (b * 2 + 1) * size + at_q, sums, inside_q)


@triton.jit(do_not_specialize=WINDOWS)
def backward_kernel(
    q, k, v, g, stats, means, out, scale, depth, channels, width, WH, WW, columns, windows,
    q_b, q_c, q_p, k_b, k_c, k_p, v_b, v_c, v_p, g_b, g_c, g_p, o_b, o_c, o_p,
    OF: tl.constexpr, SIGMOID: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of q, k or v, as OF says, for a block of pixels (BO) and channels (BD or BC).

    It is summed over all pixels that the block meets, BI at a time. g (B, C, H, W) is the gradient of v P^T.
    """
    pixels = WH * WW
    BOWN: tl.constexpr = BC if OF == "v" else BD
    tile, block, both = place(tl.cdiv(pixels, BO), tl.cdiv(channels if OF == "v" else depth, BOWN))
    own = tile * BO + tl.arange(0, BO)
    b, window = both // windows, (both % windows).to(tl.int32)
    inside_own = own < pixels
    at_own = pixels_of(own, window, width, WH, WW, columns)
    size = pixels.to(tl.int64) * windows
    c = block * BOWN + tl.arange(0, BOWN)
    sums = tl.zeros([BO, BOWN], tl.float32)
    for start in range(0, pixels, BI):
        other = start + tl.arange(0, BI)
        inside_other = other < pixels
        at_other = pixels_of(other, window, width, WH, WW, columns)
        # Rows are our pixels, columns the others.
        if OF == "q":
            logits = product(
                q + b * q_b, k + b * k_b, depth, q_c, q_p, k_c, k_p, at_own, at_other, inside_own,
                inside_other, False, False, BO, BI, BX,
            )  # fmt: skip
            at_query, inside_query = at_own, inside_own
        else:
            logits = product(
                k + b * k_b, q + b * q_b, depth, k_c, k_p, q_c, q_p, at_own, at_other, inside_own,
                inside_other, False, False, BO, BI, BX,
            )  # fmt: skip
            at_query, inside_query = at_other, inside_other
        top = tl.load(stats + b * 2 * size + at_query, inside_query, 0.0)
        total = tl.load(stats + (b * 2 + 1) * size + at_query, inside_query, 1.0)
        if OF == "q":
            weights = tl.exp(logits * scale - top[:, None]) / total[:, None]
        else:
            weights = tl.exp(logits * scale - top[None, :]) / total[None, :]
        weights = tl.where(inside_own[:, None] & inside_other[None, :], weights, 0.0)
        if OF == "v":
            right = load_tile(g + b * g_b, c, channels, g_c, at_other, inside_other, g_p)
            sums += dot(weights, tl.trans(right))
        else:
            pivot = tl.load(means + b * 2 * size + at_query, inside_query, 0.0)
            mean = tl.load(means + (b * 2 + 1) * size + at_query, inside_query, 0.0)
            if OF == "q":
                grads = product(
                    g + b * g_b, v + b * v_b, channels, g_c, g_p, v_c, v_p, at_own, at_other, inside_own,
                    inside_other, False, SIGMOID, BO, BI, BX,
                )  # fmt: skip
                logit = weights * (grads - pivot[:, None] - mean[:, None]) * scale
                right = load_tile(k + b * k_b, c, depth, k_c, at_other, inside_other, k_p)
            else:
                grads = product(
                    v + b * v_b, g + b * g_b, channels, v_c, v_p, g_c, g_p, at_own, at_other, inside_own,
                    inside_other, SIGMOID, False, BO, BI, BX,
                )  # fmt: skip
                logit = weights * (grads - pivot[None, :] - mean[None, :]) * scale
                right = load_tile(q + b * q_b, c, depth, q_c, at_other, inside_other, q_p)
            sums += dot(logit, tl.trans(right))
    limit = channels if OF == "v" else depth
    inside = inside_own[:, None] & (c < limit)[None, :]
    if OF == "v" and SIGMOID:
        value = load_tile(v + b * v_b, c, channels, v_c, at_own, inside_own, v_p)
        value = tl.sigmoid(tl.trans(value.to(tl.float32)))
        sums = sums * value * (1 - value)
    to = out + b * o_b + c.to(tl.int64)[None, :] * o_c + at_own[:, None] * o_p
    tl.store(to, sums.to(out.dtype.element_ty), inside)


class _Call:
    """The sizes of a call, and its launches."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, form: str, window_size: int | None
    ) -> None:
        batch, depth, height, width = q.shape
        self.q, self.k, self.v = as_map(q), as_map(k), as_map(v)
        self.channels, self.depth = v.shape[1], depth
        size = (height, width) if window_size is None else (window_size, window_size)
        columns = width // max(size[1], 1)
        self.windows = columns * (height // max(size[0], 1))
        scale = depth**-0.5 if scale is None else scale
        self.sizes = (scale, depth, self.channels, width, *size, columns, self.windows)
        self.pixels, self.batch = size[0] * size[1], batch
        self.sigmoid = form == "released"
        # Tensor cores want large tiles; float32 is multiplied in registers.
        half = v.dtype != torch.float32
        side, block, self.chunk = (64, 64, 32) if half else (32, 32, 16)
        self.queries, self.keys = power(self.pixels, 16, side), power(self.pixels, 16, 32)
        self.rows = power(self.pixels, 16, 32)  # of the backward pass, which has two products at a time
        self.block_d, self.block_c = power(depth, 16, block), power(self.channels, 16, block)

    def _grid(self, side: int, channels: int, block: int) -> tuple[int]:
        tiles = triton.cdiv(self.pixels, side) * triton.cdiv(channels, block)
        return (tiles * self.batch * self.windows,)

    def result(self, out: Tensor, gate: Tensor) -> Tensor:
        self._forward(out, None, as_map(gate))
        return out

    def context(self) -> Tensor | None:
        """Make `stats`, which gradients need; in the paper's form v P^T, too, (B, C, H, W) in float32."""
        shape, device = self.v.tensor.shape, self.v.tensor.device
        self.stats = torch.empty(shape[0], 2, shape[2] * shape[3], device=device)
        out = None if self.sigmoid else torch.empty(shape, device=device)
        self._forward(out, self.stats, None)
        return out

    def _forward(self, out: Tensor | None, stats: Tensor | None, gate: Map | None) -> None:
        if self.v.tensor.numel() == 0:
            return
        maps = (self.q, self.k, self.v, gate, None if out is None else as_map(out))
        channels = 1 if out is None else self.channels
        forward_kernel[self._grid(self.queries, channels, self.block_c)](
            *(None if m is None else m.tensor for m in maps), stats, *self.sizes,
            *(stride for m in maps for stride in ((0, 0, 0) if m is None else m.strides)),
            SIGMOID=self.sigmoid, BC=self.block_c, BQ=self.queries, BK=self.keys, BX=self.chunk,
        )  # fmt: skip

    def means(self, g: Map) -> Tensor:
        out = torch.empty_like(self.stats)
        maps = (self.q, self.k, self.v, g)
        means_kernel[self._grid(self.rows, 1, 1)](
            *(m.tensor for m in maps), self.stats, out, *self.sizes,
            *(stride for m in maps for stride in m.strides),
            SIGMOID=self.sigmoid, BQ=self.rows, BK=16, BX=self.chunk, num_stages=2,
        )  # fmt: skip
        return out

    def gradient(self, of: str, like: Tensor, g: Map, means: Tensor) -> Tensor:
        out = empty_map(like, like.shape)
        maps = (self.q, self.k, self.v, g)
        block = self.block_c if of == "v" else self.block_d
        backward_kernel[self._grid(self.rows, like.shape[1], block)](
            *(m.tensor for m in maps), self.stats, means, out, *self.sizes,
            *(stride for m in (*maps, as_map(out)) for stride in m.strides), of,
            SIGMOID=self.sigmoid, BD=self.block_d, BC=self.block_c,
            BO=self.rows, BI=16, BX=16, num_stages=2 if of == "q" else 3,  # as ptxas does without spilling
        )  # fmt: skip
        return out


def forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float | None = None, form: str = "released",
    window_size: int | None = None,
) -> Tensor:  # fmt: skip
    return _Call(q, k, v, scale, form, window_size).result(empty_map(v, v.shape), gate)


def backward(
    grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor,
    scale: float | None = None, form: str = "released", window_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if v.numel() == 0:
        return tuple(torch.zeros_like(x) for x in (q, k, v, gate))  # type: ignore[return-value]
    call = _Call(q, k, v, scale, form, window_size)
    context, s, g = call.context(), torch.sigmoid(gate.float()), grad_out.float()
    grad_gate = empty_map(gate, gate.shape).copy_(g * out * (1 - s))
    grad_context = g * s
    if context is not None:
        of_sigmoid = torch.sigmoid(context)
        grad_context *= of_sigmoid * (1 - of_sigmoid)
    given = as_map(grad_context.to(v.dtype).contiguous())
    means = call.means(given)
    grads = [call.gradient(of, like, given, means) for of, like in (("q", q), ("k", k), ("v", v))]
    return grads[0], grads[1], grads[2], grad_gate
