"""The low-rank part of an adapted linear, one identity a sample: ``y += scale (x A^T) B^T``.

    forward    s = x A^T     y = base + scale s B^T
    backward   u = g B      dx = base + scale u A      dA = scale u^T x      dB = scale s^T g

Two pairs of one form: ``low_rank_kernel`` goes down to r numbers a token and up again, with A and
B in the roles that their strides give them; ``outer_kernel`` sums coefficient x feature over the
tokens of a sample in parts, which ``gather_kernel`` adds an adapter at a time in one order.
x W^T and the gradient of W's side are not computed here; dW is never formed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _basis
from ._basis import dot, rounded

_PROGRAMS = 264  # two a multiprocessor of the largest GPUs
_TOKENS_A_PART = 256  # of a gradient's sum over tokens


@triton.jit
def low_rank_kernel(
    p_base, p_x, p_down, p_up, p_index, p_scale, scale, p_out, p_s,
    tokens, n_in, n_out, columns,
    stride_base_b, stride_base_t, stride_x_b, stride_x_t, stride_out_b, stride_out_t,
    stride_down_a, stride_down_r, stride_down_i, stride_up_a, stride_up_n, stride_up_r,
    SHARED: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_T tokens of a sample, ``columns`` columns of the output; s by the first.

    The down product is cheap enough to be repeated by the programs of other columns.
    """
    first = tl.program_id(1) * columns
    b = tl.program_id(2).to(tl.int64)
    a = b
    if SHARED:
        a = b * 0
    if p_index is not None:
        a = tl.load(p_index + b)
    b_ts = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    b_rs = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    here = (b_ts < tokens)[:, None]
    p_xs = p_x + b * stride_x_b + b_ts[:, None] * stride_x_t  # [BLOCK_T, 1]
    p_down += a * stride_down_a
    p_up += a * stride_up_a

    if R == 1:
        b_sums = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
        for start in range(0, n_in, BLOCK_I):
            b_is = start + tl.arange(0, BLOCK_I)  # [BLOCK_I]
            b_x = tl.load(p_xs + b_is[None, :], here & (b_is < n_in)[None, :], other=0.0)
            b_a = tl.load(p_down + b_is * stride_down_i, b_is < n_in, other=0.0)
            b_sums += b_x.to(tl.float32) * b_a.to(tl.float32)[None, :]
        b_s = tl.sum(b_sums, 1)[:, None]  # [BLOCK_T, 1]
    else:
        b_s = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for start in range(0, n_in, BLOCK_I):
            b_is = start + tl.arange(0, BLOCK_I)  # [BLOCK_I]
            b_x = tl.load(p_xs + b_is[None, :], here & (b_is < n_in)[None, :], other=0.0)
            p_as = p_down + b_is[:, None] * stride_down_i + b_rs[None, :] * stride_down_r
            mask = (b_is < n_in)[:, None] & (b_rs < R)[None, :]
            b_a = tl.load(p_as, mask, other=0.0)  # [BLOCK_I, BLOCK_R]
            b_s = dot(b_x, b_a, b_s)
    if first == 0:
        p_ss = p_s + (b * tokens + b_ts[:, None]) * R + b_rs[None, :]  # [BLOCK_T, BLOCK_R]
        tl.store(p_ss, b_s, here & (b_rs < R)[None, :])

    if p_out is not None:
        if p_scale is not None:
            scale = tl.load(p_scale + b).to(tl.float32)
        b_s *= scale
        for start in range(first, tl.minimum(first + columns, n_out), BLOCK_N):
            b_ns = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            p_bs = p_up + b_rs[:, None] * stride_up_r + b_ns[None, :] * stride_up_n
            mask = (b_rs < R)[:, None] & (b_ns < n_out)[None, :]
            b_b = tl.load(p_bs, mask, other=0.0)  # [BLOCK_R, BLOCK_N]
            mask = here & (b_ns < n_out)[None, :]
            b_y = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            if p_base is not None:
                p_bases = p_base + b * stride_base_b + b_ts[:, None] * stride_base_t
                b_y += tl.load(p_bases + b_ns[None, :], mask, other=0.0).to(tl.float32)
            if R == 1:
                b_y += b_s * b_b.to(tl.float32)
            else:
                b_y = dot(b_s, b_b, b_y)
            p_outs = p_out + b * stride_out_b + b_ts[:, None] * stride_out_t + b_ns[None, :]
            tl.store(p_outs, rounded(b_y, p_out.dtype.element_ty), mask)


@triton.jit
def outer_kernel(
    p_coefficient, p_feature, p_parts,
    tokens, n, tokens_a_part, stride_feature_b, stride_feature_t,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """parts[sample, part, r, n] = the sum of coefficient [t, r] feature [t, n] over a part."""
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b_ns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b_rs = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    if R == 1:
        b_acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    else:
        b_acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, tokens_a_part, BLOCK_T):
        b_ts = part.to(tl.int64) * tokens_a_part + start + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        here = b_ts < tokens
        p_features = p_feature + b * stride_feature_b + b_ts[:, None] * stride_feature_t
        mask = here[:, None] & (b_ns < n)[None, :]
        b_feature = tl.load(p_features + b_ns[None, :], mask, other=0.0)  # [BLOCK_T, BLOCK_N]
        p_coefficients = p_coefficient + (b * tokens + b_ts) * R  # [BLOCK_T]
        if R == 1:
            b_c = tl.load(p_coefficients, here, other=0.0)
            b_acc += b_c[:, None] * b_feature.to(tl.float32)
        else:
            mask = (b_rs < R)[:, None] & here[None, :]
            b_c = tl.load(p_coefficients[None, :] + b_rs[:, None], mask, other=0.0)
            b_acc = dot(b_c, b_feature, b_acc)
    b_sum = tl.sum(b_acc, 0)[None, :] if R == 1 else b_acc  # [BLOCK_R, BLOCK_N]
    p_sums = p_parts + ((b * tl.num_programs(1) + part) * R + b_rs[:, None]) * n + b_ns[None, :]
    tl.store(p_sums, b_sum, (b_rs < R)[:, None] & (b_ns < n)[None, :])


@triton.jit
def gather_kernel(
    p_parts, p_index, p_scale, scale, p_out,
    samples, parts, n, stride_out_a, stride_out_r, stride_out_n,
    SHARED: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[adapter, r, n] = the sum of its samples' parts, times each sample's scale, in order."""
    a = tl.program_id(1).to(tl.int64)
    b_es = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N], entries of r x n
    b_acc = tl.zeros([BLOCK_N], tl.float32)
    first, last = a, a + 1
    if SHARED or p_index is not None:
        first, last = a * 0, a * 0 + samples
    for b in range(first, last):
        mine = b >= 0
        if p_index is not None:
            mine = tl.load(p_index + b) == a
        if mine:
            b_sum = tl.zeros([BLOCK_N], tl.float32)
            for start in range(0, parts, BLOCK_P):
                b_ps = start + tl.arange(0, BLOCK_P)  # [BLOCK_P]
                offsets = (b * parts + b_ps[:, None]) * (n * R) + b_es[None, :]
                mask = (b_ps < parts)[:, None] & (b_es < n * R)[None, :]
                b_sum += tl.sum(tl.load(p_parts + offsets, mask, other=0.0), 0)
            if p_scale is not None:
                scale = tl.load(p_scale + b).to(tl.float32)
            b_acc += scale * b_sum
    p_outs = p_out + a * stride_out_a + b_es // n * stride_out_r + b_es % n * stride_out_n
    tl.store(p_outs, rounded(b_acc, p_out.dtype.element_ty), b_es < n * R)


def low_rank(
    base: Tensor | None,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    index: Tensor | None,
    scale: float | Tensor,
    out: Tensor | None,
    s: Tensor,
) -> None:
    """s = x down^T and out = base + scale s up^T, as ``ops/_native.py`` says of every backend.

    x ``[b, t, in]``, down ``[a, r, in]`` and up ``[a, n, r]`` of any strides; out may be base.
    """
    (b, t, n_in), r = x.shape, s.shape[2]
    n_out = 0 if out is None else out.shape[2]
    block_t, block_i, block_n = (16, 256, 128) if r == 1 else (32, 64, 64)
    programs = b * triton.cdiv(t, block_t)
    columns = triton.cdiv(triton.cdiv(n_out, triton.cdiv(_PROGRAMS, programs)), block_n) * block_n
    parts = triton.cdiv(n_out, columns) if n_out else 1
    numbers, number = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    with _basis.on(x):
        low_rank_kernel[(triton.cdiv(t, block_t), parts, b)](
            base, x, down, up, index, numbers, number, out, s,
            t, n_in, n_out, columns,
            *((0, 0) if base is None else base.stride()[:2]), *x.stride()[:2],
            *((0, 0) if out is None else out.stride()[:2]), *down.stride(), *up.stride(),
            down.shape[0] == 1, r, 1 if r == 1 else 16, block_t, block_i, block_n, num_warps=4,
        )  # fmt: skip


def outer(
    coefficient: Tensor, feature: Tensor, index: Tensor | None, scale: float | Tensor, out: Tensor
) -> None:
    """out ``[a, r, n]``, any strides = each adapter's sum of scale coefficient^T feature.

    coefficient ``[b, t, r]`` float32, feature ``[b, t, n]``. Equal calls give equal bits.
    """
    (b, t, n), (a, r, _) = feature.shape, out.shape
    parts = triton.cdiv(t, _TOKENS_A_PART)
    sums = feature.new_empty(b, parts, r, n, dtype=torch.float32)
    block_r, block_t, block_n = (1, 32, 128) if r == 1 else (16, 32, 64)
    numbers, number = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    with _basis.on(feature):
        outer_kernel[(triton.cdiv(n, block_n), parts, b)](
            coefficient, feature, sums, t, n, _TOKENS_A_PART, *feature.stride()[:2],
            r, block_r, block_t, block_n, num_warps=4,
        )  # fmt: skip
        gather_kernel[(triton.cdiv(r * n, 256), a)](
            sums, index, numbers, number, out, b, parts, n, *out.stride(),
            a == 1, r, min(16, triton.next_power_of_2(parts)), 256, num_warps=4,
        )  # fmt: skip
