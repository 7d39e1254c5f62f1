"""Multiply a few rows, in the Triton kernels of the tokens' operators."""

import triton
import triton.language as tl


@triton.jit
def product(
    a, a_row, a_k, row, inside_row, b, b_col, b_k, col, inside_col, inner, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """sum_k a[row, k] b[col, k], (BR, BC), in float32."""
    sums = tl.zeros([BR, BC], tl.float32)
    for start in range(0, inner, 16):
        k = start + tl.arange(0, 16)
        inside = k < inner
        left = tl.load(
            a + row[:, None] * a_row + k[None, :] * a_k, inside_row[:, None] & inside[None, :], 0.0
        )
        right = tl.load(
            b + k[:, None] * b_k + col[None, :] * b_col, inside[:, None] & inside_col[None, :], 0.0
        )
        sums += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return sums
