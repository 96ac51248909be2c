"""Attention over pages, in Triton: rotate and write a step's rows, then attend them.

Scores, soft cap and softmax are float32; products have the type of the activations. Only positions
up to a row's own are read: what pages held before is never seen.

Legend: T rows of the batch, J items, H query heads, K key/value heads, G = H / K, X = (H + 2 K) D,
D head size, P tokens of a page, M rows of a tile (G heads of each of its batch rows), N positions
of a tile, S parts that a history is split into.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_rows(
    qkv_TX,
    qkv_stride,
    cos_TD,
    sin_TD,
    keys_NKDP,
    values_NKPD,
    targets_T,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One head of one row: rotates a query in place, puts a key or value on its page."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    low = tl.arange(0, BLOCK_HALF)
    inside = low < HALF
    head_ptr = qkv_TX + row * qkv_stride + head * HEAD_DIM
    first = tl.load(head_ptr + low, mask=inside, other=0.0)
    second = tl.load(head_ptr + HALF + low, mask=inside, other=0.0)
    target = tl.load(targets_T + row).to(tl.int64)
    page, offset = target // PAGE_TOKENS, target % PAGE_TOKENS
    if head < NUM_HEADS + NUM_KV_HEADS:
        angle = row * HEAD_DIM + low
        cos_low = tl.load(cos_TD + angle, mask=inside, other=0.0)
        cos_high = tl.load(cos_TD + HALF + angle, mask=inside, other=0.0)
        sin_low = tl.load(sin_TD + angle, mask=inside, other=0.0)
        sin_high = tl.load(sin_TD + HALF + angle, mask=inside, other=0.0)
        low_x, high_x = first.to(tl.float32), second.to(tl.float32)
        first = (low_x * cos_low - high_x * sin_low).to(first.dtype)
        second = (high_x * cos_high + low_x * sin_high).to(second.dtype)
        if head < NUM_HEADS:
            tl.store(head_ptr + low, first, mask=inside)
            tl.store(head_ptr + HALF + low, second, mask=inside)
        else:
            lies = (page * NUM_KV_HEADS + head - NUM_HEADS) * HEAD_DIM
            key_ptr = keys_NKDP + lies * PAGE_TOKENS + offset
            tl.store(key_ptr + low * PAGE_TOKENS, first, mask=inside)
            tl.store(key_ptr + (HALF + low) * PAGE_TOKENS, second, mask=inside)
    else:
        lies = (page * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * PAGE_TOKENS + offset
        value_ptr = values_NKPD + lies * HEAD_DIM
        tl.store(value_ptr + low, first, mask=inside)
        tl.store(value_ptr + HALF + low, second, mask=inside)


@triton.jit
def attend_items(
    qkv_TX,
    qkv_stride,
    keys_NKDP,
    values_NKPD,
    items_J4,
    pages_N,
    out_TX,
    out_stride,
    part_THSD,
    sums_THS2,
    scaling,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """A tile of an item's rows under one key/value head; or, of a row, a part of its history."""
    item, kv_head = tl.program_id(0), tl.program_id(1)
    TILE_ROWS: tl.constexpr = BLOCK_M // GROUP
    if NUM_PARTS > 1:
        part, skipped = tl.program_id(2), 0
    else:
        part, skipped = 0, tl.program_id(2) * TILE_ROWS
    item_ptr = items_J4 + item * 4
    num_rows = tl.load(item_ptr + 1)
    if skipped >= num_rows:
        return
    first_row = tl.load(item_ptr).to(tl.int64) + skipped
    start = tl.load(item_ptr + 2) + skipped
    page_ptr = pages_N + tl.load(item_ptr + 3)
    num_rows = tl.minimum(num_rows - skipped, TILE_ROWS)

    in_tile = tl.arange(0, BLOCK_M)
    row_M, dims = in_tile // GROUP, tl.arange(0, BLOCK_D)
    head_M = kv_head * GROUP + in_tile % GROUP
    is_row, is_dim = row_M < num_rows, dims < HEAD_DIM
    tile_mask = is_row[:, None] & is_dim[None, :]
    at_M = start + row_M
    query_ptr = qkv_TX + (first_row + row_M) * qkv_stride + head_M * HEAD_DIM
    query_MD = tl.load(query_ptr[:, None] + dims[None, :], mask=tile_mask, other=0.0)

    end = start + num_rows
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, start - WINDOW + 1) // BLOCK_N * BLOCK_N
    if NUM_PARTS > 1:
        width = tl.cdiv(tl.cdiv(end - first, BLOCK_N), NUM_PARTS) * BLOCK_N
        first += part * width
        end = tl.minimum(end, first + width)

    highest_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    total_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for position in range(first, end, BLOCK_N):
        seen_N = position + tl.arange(0, BLOCK_N)
        is_written = seen_N < end
        page_N = tl.load(page_ptr + seen_N // PAGE_TOKENS, mask=is_written, other=0).to(tl.int64)
        offset_N = seen_N % PAGE_TOKENS
        lies_N = (page_N * NUM_KV_HEADS + kv_head) * (PAGE_TOKENS * HEAD_DIM)
        key_ptr = keys_NKDP + (lies_N + offset_N)[None, :] + dims[:, None] * PAGE_TOKENS
        block_mask = is_written[None, :] & is_dim[:, None]
        key_DN = tl.load(key_ptr, mask=block_mask, other=0.0)
        score_MN = tl.dot(query_MD, key_DN, input_precision="ieee") * scaling
        if SOFTCAP > 0.0:
            fallen = tl.exp(-2.0 * tl.abs(score_MN / SOFTCAP))
            capped = SOFTCAP * (1.0 - fallen) / (1.0 + fallen)
            score_MN = tl.where(score_MN < 0.0, -capped, capped)
        visible = is_written[None, :] & (seen_N[None, :] <= at_M[:, None])
        if WINDOW > 0:
            visible &= seen_N[None, :] > at_M[:, None] - WINDOW
        score_MN = tl.where(visible, score_MN, float("-inf"))
        above_M = tl.maximum(highest_M, tl.max(score_MN, axis=1))
        # A row that sees nothing yet has no highest score to subtract.
        base_M = tl.where(above_M == float("-inf"), 0.0, above_M)
        weight_MN = tl.exp(score_MN - base_M[:, None])
        shrink_M = tl.exp(highest_M - base_M)
        sum_M = sum_M * shrink_M + tl.sum(weight_MN, axis=1)
        value_ptr = values_NKPD + (lies_N + offset_N * HEAD_DIM)[:, None] + dims[None, :]
        value_mask = is_written[:, None] & is_dim[None, :]
        value_ND = tl.load(value_ptr, mask=value_mask, other=0.0)
        added_MD = tl.dot(weight_MN.to(value_ND.dtype), value_ND, input_precision="ieee")
        total_MD = total_MD * shrink_M[:, None] + added_MD
        highest_M = above_M

    if NUM_PARTS == 1:
        # Rows of a tile that no batch row fills see nothing.
        out_MD = total_MD / tl.where(is_row, sum_M, 1.0)[:, None]
        out_ptr = out_TX + (first_row + row_M) * out_stride + head_M * HEAD_DIM
        tl.store(
            out_ptr[:, None] + dims[None, :], out_MD.to(out_TX.dtype.element_ty), mask=tile_mask
        )
    else:
        place_M = ((first_row + row_M) * (NUM_KV_HEADS * GROUP) + head_M) * NUM_PARTS + part
        tl.store(part_THSD + place_M[:, None] * HEAD_DIM + dims[None, :], total_MD, mask=tile_mask)
        tl.store(sums_THS2 + place_M * 2, highest_M, mask=is_row)
        tl.store(sums_THS2 + place_M * 2 + 1, sum_M, mask=is_row)


@triton.jit
def join_parts(
    part_THSD,
    sums_THS2,
    out_TX,
    out_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """One head of one row: the parts of its history, each weighed by its share of the softmax."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place_S = (row * tl.num_programs(1) + head) * NUM_PARTS + tl.arange(0, NUM_PARTS)
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    highest_S = tl.load(sums_THS2 + place_S * 2)
    sum_S = tl.load(sums_THS2 + place_S * 2 + 1)
    # The first part is never empty; others may be, and have no highest score.
    share_S = tl.exp(highest_S - tl.max(highest_S, axis=0))
    part_ptr = part_THSD + place_S[:, None] * HEAD_DIM + dims[None, :]
    part_SD = tl.load(part_ptr, mask=is_dim[None, :], other=0.0)
    total_D = tl.sum(part_SD * share_S[:, None], axis=0) / tl.sum(sum_S * share_S, axis=0)
    out_ptr = out_TX + row * out_stride + head * HEAD_DIM + dims
    tl.store(out_ptr, total_D.to(out_TX.dtype.element_ty), mask=is_dim)
