"""Products with compressed deltas, in Triton: decoded where they are multiplied.

`linker_core.residency.coding` says how codes lie. Levels times scales are rounded to the type of
the activations, as a weight is; sums are float32.

Every program works on one matrix of several, each with rows of its own. A job is 9 integers: the
addresses of codes and scales; where its y begins and how many elements apart y's rows are; O; its
first place in `rows`, and its number of rows; its first column of t; R.

Legend: J jobs, T rows of the batch, I input features, O output features, R rank, M, N, K sizes of a
tile: rows, outputs, inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_tile(
    codes,
    scales,
    levels,
    rows,
    columns,
    inside,
    WIDTH,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Returns elements of a coded matrix, float32; zeros where they are not `inside`.

    Args:
        codes: Where the matrix's codes lie, as bytes; as words for 16 bits.
        scales: Where its scales lie.
        levels: A table of at least 2**BITS.
        rows: Of the elements.
        columns: Of the elements.
        inside: Which of them there are.
        WIDTH: Of the matrix.
        BITS: Of a code.
        GROUP: Elements of a row that share a scale; 0 where all do.
    """
    if BITS == 16:
        return tl.load(codes + rows * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    if BITS == 8:
        row_bytes = (WIDTH + 15) // 16 * 16
        words = tl.load(codes + rows * row_bytes + columns, mask=inside, other=0)
        values = words.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        runs, within = columns // 128, columns % 128
        row_ptr = codes + rows * ((WIDTH + 127) // 128 * 16 * BITS) + runs * (16 * BITS)
        LOW: tl.constexpr = 2 if BITS == 3 else BITS  # bits that lie together
        EACH: tl.constexpr = 128 // LOW  # weights of a chunk
        place = within // EACH * 16 + within % 16
        numbers = tl.load(row_ptr + place, mask=inside, other=0).to(tl.int32)
        numbers = (numbers >> (within % EACH // 16 * LOW)) & ((1 << LOW) - 1)
        if BITS == 3:
            high = tl.load(row_ptr + 32 + within % 16, mask=inside, other=0).to(tl.int32)
            numbers = numbers | (((high >> (within // 16)) & 1) << 2)
        values = tl.load(levels + numbers)
    num_scales = 1
    groups = columns * 0
    if GROUP:
        num_scales = (WIDTH + GROUP - 1) // GROUP
        groups = columns // GROUP
    scale = tl.load(scales + rows * num_scales + groups, mask=inside, other=0.0)
    return values * scale.to(tl.float32)


@triton.jit
def multiply_coded(
    x_TI,
    x_stride,
    y_base,
    rows,
    jobs_J9,
    levels,
    width,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ADDS: tl.constexpr,
    CODE_TYPE: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of one job's rows and outputs: y += x Dᵀ, or y = x Dᵀ."""
    job_ptr = jobs_J9 + tl.program_id(0) * 9
    num_out, num_rows = tl.load(job_ptr + 4), tl.load(job_ptr + 6)
    first_m, first_n = tl.program_id(2) * BLOCK_M, tl.program_id(1) * BLOCK_N
    if (first_m < num_rows) & (first_n < num_out):
        codes = tl.load(job_ptr).to(tl.pointer_type(CODE_TYPE))
        scales = tl.load(job_ptr + 1).to(tl.pointer_type(SCALE_TYPE))
        places_M = first_m + tl.arange(0, BLOCK_M)
        outs_N = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        row_here = places_M < num_rows
        out_here = outs_N < num_out
        rows_M = tl.load(rows + tl.load(job_ptr + 5) + places_M, mask=row_here, other=0)
        y_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first_k in range(0, width, BLOCK_K):
            ins_K = first_k + tl.arange(0, BLOCK_K)
            in_here = ins_K < width
            x_MK = tl.load(
                x_TI + rows_M[:, None] * x_stride + ins_K[None, :],
                mask=row_here[:, None] & in_here[None, :],
                other=0.0,
            )
            delta_NK = decode_tile(
                *(codes, scales, levels, outs_N[:, None], ins_K[None, :]),
                *(out_here[:, None] & in_here[None, :], width),
                BITS=BITS,
                GROUP=GROUP,
            )
            delta_KN = tl.trans(delta_NK.to(x_MK.dtype))
            y_MN = tl.dot(x_MK, delta_KN, y_MN, input_precision="ieee")
        y_ptr = y_base + tl.load(job_ptr + 2) + rows_M[:, None] * tl.load(job_ptr + 3)
        here = row_here[:, None] & out_here[None, :]
        if ADDS:
            y_MN += tl.load(y_ptr + outs_N[None, :], mask=here, other=0.0).to(tl.float32)
        tl.store(y_ptr + outs_N[None, :], y_MN.to(y_base.dtype.element_ty), mask=here)


@triton.jit
def expand_coded(
    t_TR,
    t_stride,
    y_base,
    rows,
    jobs_J9,
    levels,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CODE_TYPE: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of one job's rows and outputs: y += t U."""
    job_ptr = jobs_J9 + tl.program_id(0) * 9
    num_out, num_rows = tl.load(job_ptr + 4).to(tl.int32), tl.load(job_ptr + 6)
    first_m, first_n = tl.program_id(2) * BLOCK_M, tl.program_id(1) * BLOCK_N
    if (first_m < num_rows) & (first_n < num_out):
        codes = tl.load(job_ptr).to(tl.pointer_type(CODE_TYPE))
        scales = tl.load(job_ptr + 1).to(tl.pointer_type(SCALE_TYPE))
        t_ptr, rank = t_TR + tl.load(job_ptr + 7), tl.load(job_ptr + 8).to(tl.int32)
        places_M = first_m + tl.arange(0, BLOCK_M)
        outs_N = first_n + tl.arange(0, BLOCK_N)
        row_here = places_M < num_rows
        out_here = outs_N < num_out
        rows_M = tl.load(rows + tl.load(job_ptr + 5) + places_M, mask=row_here, other=0)
        y_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first_k in range(0, rank, BLOCK_K):
            ranks_K = (first_k + tl.arange(0, BLOCK_K)).to(tl.int64)
            rank_here = ranks_K < rank
            t_MK = tl.load(
                t_ptr + rows_M[:, None] * t_stride + ranks_K[None, :],
                mask=row_here[:, None] & rank_here[None, :],
                other=0.0,
            )
            up_KN = decode_tile(
                *(codes, scales, levels, ranks_K[:, None], outs_N[None, :]),
                *(rank_here[:, None] & out_here[None, :], num_out),
                BITS=BITS,
                GROUP=GROUP,
            )
            y_MN = tl.dot(t_MK, up_KN, y_MN, input_precision="ieee")
        y_ptr = y_base + tl.load(job_ptr + 2) + rows_M[:, None] * tl.load(job_ptr + 3)
        here = row_here[:, None] & out_here[None, :]
        y_MN += tl.load(y_ptr + outs_N[None, :], mask=here, other=0.0).to(tl.float32)
        tl.store(y_ptr + outs_N[None, :], y_MN.to(y_base.dtype.element_ty), mask=here)
