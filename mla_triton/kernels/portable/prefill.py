"""Attention of ragged sequences over their own keys and values, in Triton.

What: multi-head attention in MLA's expanded form, where a query and a key are wider than a value,
and where the rotary part of a key may be one for all heads: it is then read as such, never copied
to them. Where: NVIDIA from capability 8.0 on, AMD CDNA3 and later, Triton's interpreter.

Work: a program has `block_m` query tokens of one sequence and one head, and goes through all keys
they see. How many tiles the sequences have is known on the device alone, so the grid has as many
programs as there may be, and each finds its tile from the offsets. The last tiles of a sequence
see the most keys under a causal mask, and go first: what is left at the end is short. Programs of
few heads run side by side, so that a head's keys are read from memory once.

Keys that all of a tile's queries see are taken without a mask; the steps on the diagonal and at the
sequence's end come after them, with masks.

Budget at 192 + 128 columns, 16 bit: keys and values of a step are `block_n` x 320 x 2 bytes, times
`num_stages` with wgmma, one less with mma.sync; queries are `block_m` x 192 x 2 bytes, in registers
or in shared memory. The accumulator takes `block_m` x 128 float32 registers over the program's
threads, the scores `block_m` x `block_n`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mla_triton.device import Device
from mla_triton.kernels.common.launch import TYPE_NAMES, Launch, Variant, emulates_bf16
from mla_triton.kernels.common.rows import request_queries
from mla_triton.kernels.common.tensors import PrefillTensors
from mla_triton.kernels.common.tiles import (
    LN_2,
    LOG2_E,
    LOWEST,
    dot,
    finish_softmax,
    narrow,
    online_softmax_update,
)
from mla_triton.kernels.portable.prefill_config import (
    NAME,
    OP,
    Config,
    choose,
    heads_abreast,
    heuristic,
    is_valid,
    parts_of,
    search_space,
    tile_slots,
    tuning_point,
    why_not,
)
from mla_triton.problem import PrefillProblem

__all__ = [
    "NAME",
    "OP",
    "Config",
    "choose",
    "compile",
    "heuristic",
    "is_valid",
    "launch",
    "search_space",
    "tuning_point",
    "variant",
    "why_not",
]

SEQUENCES = tl.constexpr(256)
"""Sequences that the search for a program's tile looks at in one step."""

ARGUMENTS = (
    ("q", "*T"),
    ("q_rope", "*T"),
    ("k", "*T"),
    ("k_rope", "*T"),
    ("v", "*T"),
    ("cu_seqlens_q", "*i32"),
    ("cu_seqlens_k", "*i32"),
    ("out", "*T"),
    ("lse", "*fp32"),
    ("q_stride_t", "i64"),
    ("q_stride_h", "i64"),
    ("q_rope_stride_t", "i64"),
    ("q_rope_stride_h", "i64"),
    ("k_stride_t", "i64"),
    ("k_stride_h", "i64"),
    ("k_rope_stride_t", "i64"),
    ("v_stride_t", "i64"),
    ("v_stride_h", "i64"),
    ("out_stride_t", "i64"),
    ("out_stride_h", "i64"),
    ("lse_stride_t", "i64"),
    ("lse_stride_h", "i64"),
    ("batch", "i32"),
    ("queries", "i32"),
    ("keys", "i32"),
    ("heads", "i32"),
    ("group", "i32"),
    ("slots", "i32"),
    ("abreast", "i32"),
    ("scale_log2", "fp32"),
)
ALIGNED = frozenset(
    name
    for name, _ in ARGUMENTS
    if name in ("q", "q_rope", "k", "k_rope", "v", "out")
    or ("_stride_" in name and not name.startswith("lse"))
)


@triton.jit
def find_tile(cu_seqlens_q, slot, batch, queries, BLOCK_M: tl.constexpr):
    """(sequence, tile in it) of a slot, where the sequences' tiles stand one behind the other.

    The sequence is `batch` for a slot behind the last tile. A step counts the sequences that end
    at or before the slot, and the tiles they have.
    """
    sequence = slot * 0
    tiles_before = slot * 0
    tiles_seen = slot * 0
    for begin in tl.range(0, batch, SEQUENCES):
        index = begin + tl.arange(0, SEQUENCES)
        inside = index < batch
        first = tl.load(cu_seqlens_q + index, mask=inside, other=0)
        end = tl.load(cu_seqlens_q + index + 1, mask=inside, other=0)
        first = tl.minimum(tl.maximum(first, 0), queries)
        end = tl.minimum(tl.maximum(end, first), queries)
        tiles = tl.cdiv(end - first, BLOCK_M)
        ends = tiles_seen + tl.cumsum(tiles, 0)
        is_before = inside & (ends <= slot)
        sequence += tl.sum(is_before.to(tl.int32), 0)
        tiles_before += tl.sum(tl.where(is_before, tiles, 0), 0)
        tiles_seen += tl.sum(tiles, 0)
    return sequence, slot - tiles_before


@triton.jit
def load_columns(
    nope_rows, rope_rows, mask,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, NOPE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Columns `[FIRST, FIRST + WIDTH)` of rows whose columns from `NOPE` on lie elsewhere.

    Where both kinds are asked for, one load goes to either address: two, and a choice between what
    they load, would leave the result in registers.
    """
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH <= NOPE:
        address = nope_rows[:, None] + columns
    elif FIRST >= NOPE:
        address = rope_rows[:, None] + (columns - NOPE)
    else:
        in_nope = columns < NOPE
        address = tl.where(
            in_nope, nope_rows[:, None] + columns, rope_rows[:, None] + (columns - NOPE)
        )
    if MASKED:
        return tl.load(address, mask=mask[:, None], other=0.0)
    else:
        return tl.load(address)


@triton.jit
def softmax_of_products(
    products, scale_log2, running_max, running_sum, NEGATIVE_SCALE: tl.constexpr
):
    """`online_softmax_update` of products that are still to be scaled, none of them hidden.

    The largest is scaled alone, and the others in the same instruction that subtracts it.
    """
    if NEGATIVE_SCALE:
        largest = tl.min(products, 1)
    else:
        largest = tl.max(products, 1)
    new_max = tl.maximum(running_max, largest * scale_log2)
    rescale = tl.exp2(running_max - new_max)
    probabilities = tl.exp2(products * scale_log2 - new_max[:, None])
    running_sum = running_sum * rescale + tl.sum(probabilities, 1)
    return new_max, running_sum, rescale, probabilities


@triton.jit
def settled(accumulator):
    """The same, waited for here: an instruction that is none, but reads and writes it.

    wgmma that is in flight from one step of a loop to the next has its registers moved under it,
    and ptxas then serialises every wgmma of the kernel (its remark C7515).
    """
    return tl.inline_asm_elementwise(
        "", "=f,0", [accumulator], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def attend(
    q_first, q_rest, running_max, running_sum, accumulator,
    k_rows, k_rope_rows, v_rows, keys_left, visible_end, scale_log2,
    FIRST: tl.constexpr, REST: tl.constexpr, K_NOPE: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, SETTLE: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """The online softmax over one step of keys: its new (maximum, sum, accumulator).

    `keys_left` and `visible_end` count from the step's first key: where the sequence ends, and
    where the keys end that a row sees. Without `MASKED` every row sees every key of the step.
    """
    step_keys = tl.arange(0, BLOCK_N)
    is_key = step_keys < keys_left
    k_first = load_columns(k_rows, k_rope_rows, is_key, 0, FIRST, K_NOPE, MASKED)
    products = dot(
        q_first,
        tl.trans(k_first),
        tl.zeros([q_first.shape[0], BLOCK_N], tl.float32),
        PRECISION,
        EMULATE_BF16,
    )
    if REST > 0:
        k_rest = load_columns(k_rows, k_rope_rows, is_key, FIRST, REST, K_NOPE, MASKED)
        products = dot(q_rest, tl.trans(k_rest), products, PRECISION, EMULATE_BF16)
    if MASKED:
        visible = is_key[None, :]
        if CAUSAL:
            visible = visible & (step_keys[None, :] < visible_end[:, None])
        scores = tl.where(visible, products * scale_log2, float("-inf"))
        running_max, running_sum, rescale, probabilities = online_softmax_update(
            scores, running_max, running_sum
        )
    else:
        running_max, running_sum, rescale, probabilities = softmax_of_products(
            products, scale_log2, running_max, running_sum, NEGATIVE_SCALE
        )
    # Values past the end are zero, not weighted with zero alone: 0 x NaN would reach the sum.
    values = load_columns(v_rows, v_rows, is_key, 0, VALUE, VALUE, MASKED)
    accumulator = dot(
        narrow(probabilities, values.dtype, EMULATE_BF16),
        values,
        accumulator * rescale[:, None],
        PRECISION,
        EMULATE_BF16,
    )
    if SETTLE:
        accumulator = settled(accumulator)
    return running_max, running_sum, accumulator


@triton.jit
def prefill_kernel(
    q, q_rope, k, k_rope, v, cu_seqlens_q, cu_seqlens_k, out, lse,
    q_stride_t, q_stride_h, q_rope_stride_t, q_rope_stride_h,
    k_stride_t, k_stride_h, k_rope_stride_t, v_stride_t, v_stride_h,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    batch, queries, keys, heads, group, slots, abreast, scale_log2,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr,
    Q_NOPE: tl.constexpr, K_NOPE: tl.constexpr, CAUSAL: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, SETTLE: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    QK: tl.constexpr = FIRST + REST
    # `abreast` heads take turns, tile after tile from the last one on; then come the next heads.
    program = tl.program_id(0)
    first_head = program // (abreast * slots) * abreast
    abreast_here = tl.minimum(abreast, heads - first_head)
    place = program - first_head * slots
    head = first_head + place % abreast_here
    slot = slots - 1 - place // abreast_here
    sequence, tile = find_tile(cu_seqlens_q, slot, batch, queries, BLOCK_M)
    if sequence >= batch:
        return
    first_query, query_count = request_queries(cu_seqlens_q, sequence, 0, queries, True)
    first_key, key_count = request_queries(cu_seqlens_k, sequence, 0, keys, True)
    first_row = tile * BLOCK_M
    # Of offsets that decrease the count of tiles is one of overlapping sequences.
    if (first_row < 0) | (first_row >= query_count):
        return

    tile_rows = tl.arange(0, BLOCK_M)
    row_inside = tile_rows < query_count - first_row
    token = (first_query + first_row).to(tl.int64)
    long_rows = tile_rows.to(tl.int64)
    q_rows = q + (token * q_stride_t + head.to(tl.int64) * q_stride_h) + long_rows * q_stride_t
    q_rope_rows = q_rows
    if Q_NOPE < QK:
        q_rope_rows = q_rope + (token * q_rope_stride_t + head.to(tl.int64) * q_rope_stride_h)
        q_rope_rows += long_rows * q_rope_stride_t
    q_first = load_columns(q_rows, q_rope_rows, row_inside, 0, FIRST, Q_NOPE, True)
    q_rest = q_first
    if REST > 0:
        q_rest = load_columns(q_rows, q_rope_rows, row_inside, FIRST, REST, Q_NOPE, True)

    # Bottom-right: the last query sees every key. `seen_end` is where the keys end that all rows
    # of the tile see.
    seen_end = key_count
    end_key = key_count
    row_end = key_count - query_count + 1 + first_row + tile_rows
    if CAUSAL:
        first_row_end = key_count - query_count + 1 + first_row
        last_row = tl.minimum(BLOCK_M, query_count - first_row) - 1
        seen_end = tl.minimum(tl.maximum(first_row_end, 0), key_count)
        end_key = tl.minimum(tl.maximum(first_row_end + last_row, 0), key_count)
    whole_end = seen_end // BLOCK_N * BLOCK_N

    long_keys = tl.arange(0, BLOCK_N).to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    token = first_key.to(tl.int64)
    k_rows = k + kv_head * k_stride_h + long_keys * k_stride_t
    k_rope_rows = k_rows
    if K_NOPE < QK:
        k_rope_rows = k_rope + long_keys * k_rope_stride_t
    v_rows = v + kv_head * v_stride_h + long_keys * v_stride_t

    running_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, VALUE], tl.float32)
    for block in tl.range(0, whole_end, BLOCK_N, num_stages=STAGES):
        step = token + block
        running_max, running_sum, accumulator = attend(
            q_first, q_rest, running_max, running_sum, accumulator,
            k_rows + step * k_stride_t, k_rope_rows + step * k_rope_stride_t,
            v_rows + step * v_stride_t, key_count - block, row_end - block, scale_log2,
            FIRST, REST, K_NOPE, VALUE, BLOCK_N, False, CAUSAL, NEGATIVE_SCALE, SETTLE,
            PRECISION, EMULATE_BF16,
        )  # fmt: skip
    for block in tl.range(whole_end, end_key, BLOCK_N, num_stages=STAGES):
        step = token + block
        running_max, running_sum, accumulator = attend(
            q_first, q_rest, running_max, running_sum, accumulator,
            k_rows + step * k_stride_t, k_rope_rows + step * k_rope_stride_t,
            v_rows + step * v_stride_t, key_count - block, row_end - block, scale_log2,
            FIRST, REST, K_NOPE, VALUE, BLOCK_N, True, CAUSAL, NEGATIVE_SCALE, SETTLE,
            PRECISION, EMULATE_BF16,
        )  # fmt: skip

    result, lse_log2 = finish_softmax(accumulator, running_max, running_sum)
    token = (first_query + first_row).to(tl.int64)
    out_rows = out + (token * out_stride_t + head.to(tl.int64) * out_stride_h)
    lse_rows = lse + (token * lse_stride_t + head.to(tl.int64) * lse_stride_h)
    value_columns = tl.arange(0, VALUE)[None, :]
    tl.store(
        (out_rows + long_rows * out_stride_t)[:, None] + value_columns,
        narrow(result, out.dtype.element_ty, EMULATE_BF16),
        mask=row_inside[:, None],
    )
    tl.store(lse_rows + long_rows * lse_stride_t, lse_log2 * LN_2, mask=row_inside)


def variant(problem: PrefillProblem, config: Config, device: Device) -> Variant:
    """The kernel for a problem: everything but sizes that change from step to step is constant."""
    pointer = f"*{TYPE_NAMES[problem.dtype]}"
    first, rest = parts_of(problem.qk_dim)
    return Variant(
        prefill_kernel,
        tuple((name, pointer if kind == "*T" else kind) for name, kind in ARGUMENTS),
        (
            ("FIRST", first),
            ("REST", rest),
            ("VALUE", problem.value_dim),
            ("Q_NOPE", problem.q_nope),
            ("K_NOPE", problem.k_nope),
            ("CAUSAL", problem.causal),
            ("NEGATIVE_SCALE", problem.negative_scale),
            ("BLOCK_M", config.block_m),
            ("BLOCK_N", config.block_n),
            ("STAGES", config.num_stages),
            ("SETTLE", device.has_wgmma and problem.dtype != torch.float32),
            ("PRECISION", "ieee"),
            ("EMULATE_BF16", emulates_bf16(problem.dtype, device)),
        ),
        ALIGNED if problem.aligned else frozenset(),
        config.num_warps,
        config.num_stages,
    )


def arguments(problem: PrefillProblem, config: Config, tensors: PrefillTensors) -> list[Any]:
    """The run-time arguments, in the order of `ARGUMENTS`."""
    t = tensors
    return [
        t.q,
        t.q_rope,
        t.k,
        t.k_rope,
        t.v,
        t.cu_seqlens_q,
        t.cu_seqlens_k,
        t.out,
        t.lse,
        *t.q.stride()[:2],
        *((0, 0) if t.q_rope is None else t.q_rope.stride()[:2]),
        *t.k.stride()[:2],
        0 if t.k_rope is None else t.k_rope.stride(0),
        *t.v.stride()[:2],
        *t.out.stride()[:2],
        *t.lse.stride(),
        problem.batch,
        problem.queries,
        problem.keys,
        problem.heads,
        problem.group,
        tile_slots(problem, config),
        heads_abreast(problem),
        t.softmax_scale * LOG2_E,
    ]


def compile(problem: PrefillProblem, config: Config, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, config, device).compile(device)


def launch(
    launcher: Launch, problem: PrefillProblem, config: Config, tensors: PrefillTensors
) -> None:
    """Writes `out` and `lse` of every row of the sequences."""
    programs = tile_slots(problem, config) * problem.heads
    launcher((programs, 1, 1), arguments(problem, config, tensors))
