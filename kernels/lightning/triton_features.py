"""The feature map of queries and keys inside the scan: the activation, and LRPE's cosine and sine.

An angle theta t splits as theta (C n + i) + theta t0: position i of chunk n of a document that begins at t0. The three
parts have tables of their own, made once a call with angles reduced in fp64, and meet by the addition theorems in fp32:
no sine is taken in the scan, and a long position is as exact as a short one.
"""

import triton
import triton.language as tl

ACTIVATIONS = {"none": 0, "silu": 1, "1+elu": 2}
NONE = tl.constexpr(0)
SILU = tl.constexpr(1)
ONE_PLUS_ELU = tl.constexpr(2)


@triton.jit
def sigmoid(x, QUICK: tl.constexpr):
    if QUICK:  # one instruction, right to 2^-11: enough for a factor that is rounded to bf16
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * half + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACT: tl.constexpr, QUICK: tl.constexpr):
    """The activation of x, fp32."""
    if ACT == SILU:
        return x * sigmoid(x, QUICK)
    elif ACT == ONE_PLUS_ELU:
        return tl.where(x > 0, 1.0 + x, tl.exp(tl.minimum(x, 0.0)))
    else:
        return x


@triton.jit
def slope(x, ACT: tl.constexpr, QUICK: tl.constexpr):
    """The activation's derivative at x, fp32."""
    if ACT == SILU:
        s = sigmoid(x, QUICK)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == ONE_PLUS_ELU:
        return tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        return x * 0.0 + 1.0


@triton.jit
def table_row(pointer, head, rows, row, columns, width):
    """cos and sin of row `row`, fp32, from a table [heads, rows, 2, width]; columns past the width are zero."""
    at = pointer + ((head * rows + row).to(tl.int64) * 2) * width + columns
    cos = tl.load(at, mask=columns < width, other=0.0).to(tl.float32)
    sin = tl.load(at + width, mask=columns < width, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def turned(cos, sin, by_cos, by_sin):
    """cos and sin of the sum of two angles."""
    return cos * by_cos - sin * by_sin, sin * by_cos + cos * by_sin


@triton.jit
def phases_kernel(
    theta_pointer,  # [heads, width]
    steps_pointer,  # [rows], integers, or None: row r then stands for r * step
    rows_pointer,  # [rows], the index into steps_pointer's values, or None: r itself
    table_pointer,  # [heads, rows, 2, width]
    rows,
    width,
    step,
    steps_stride,
    last_step,  # the greatest index into steps
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """cos and sin of theta times an integer. In turns and fp64, whose fraction is what counts."""
    head = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    held = row < rows
    if steps_pointer is not None:
        index = row
        if rows_pointer is not None:
            index = tl.minimum(tl.load(rows_pointer + row, mask=held, other=0).to(tl.int32), last_step)
        count = tl.load(steps_pointer + index.to(tl.int64) * steps_stride, mask=held, other=0).to(tl.float64)
    else:
        count = (row * step).to(tl.float64)
    theta = tl.load(theta_pointer + head * width + column, mask=column < width, other=0.0).to(tl.float64)
    turns = count[:, None] * (theta * 0.15915494309189535)[None, :]
    turns -= tl.floor(turns + 0.5)
    angle = (turns * 6.283185307179586).to(tl.float32)
    at = ((head * rows + row).to(tl.int64)[:, None] * 2) * width + column[None, :]
    mask = held[:, None] & (column < width)[None, :]
    dtype = table_pointer.dtype.element_ty
    tl.store(table_pointer + at, tl.cos(angle).to(dtype), mask=mask)
    tl.store(table_pointer + at + width, tl.sin(angle).to(dtype), mask=mask)
