"""Attention of ragged sequences over their own keys and values, for Hopper, in Gluon.

What: as `mla_triton.kernels.portable.prefill`. Where: capability 9.0 exactly.

Work: a program has a whole SM and one tile: 128 query tokens of one sequence and one head. The
last tiles of a sequence see the most keys under a causal mask, and go first: what is left at the
end is short. A program has three partitions: two warpgroups with 64 queries each, and a warp that
loads queries, keys and values by TMA. Keys are taken from the last that a tile sees to the first,
so that only the first blocks need masks, and have loops of their own.

A warpgroup gives the matrix units two products at once, queries x the next keys and weights x these
values, and has the softmax of the former while the latter, or what the other warpgroup gave them,
is under way. Weights stay in registers.

Budget at 192 + 128 columns with blocks of 128 keys: queries 48 KiB, two blocks of keys and two of
values 160 KiB; 168 registers a thread as launched, 240 for a warpgroup (64 of output, 64 of scores,
32 of weights) and 24 for the loader once they are apart.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_triton.device import Device
from mla_triton.kernels.common.launch import TYPE_NAMES, Launch, Variant, View
from mla_triton.kernels.common.tensors import PrefillTensors
from mla_triton.kernels.common.tiles import LOG2_E
from mla_triton.kernels.sm90 import prefill_steps, prefill_work
from mla_triton.kernels.sm90.gluon import GluonASTSource, gl, gluon
from mla_triton.kernels.sm90.pieces import barriers
from mla_triton.kernels.sm90.prefill_config import (
    CHUNK,
    NAME,
    OP,
    WARPGROUP_ROWS,
    Config,
    choose,
    heads_abreast,
    heuristic,
    is_valid,
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

REGISTERS_AT_LAUNCH = 168
REGISTERS = gl.constexpr(240)
"""Of a thread of a warpgroup, once the loader has given its own away."""
LOADER_REGISTERS = gl.constexpr(24)
TILE = gl.NVMMASharedLayout(128, 16, 3)
"""How a box of 16-bit numbers lies in shared memory for TMA and wgmma: in 128-byte swizzles."""
ARGUMENTS = (
    ("cu_seqlens_q", "*i32"),
    ("cu_seqlens_k", "*i32"),
    ("out", "*T"),
    ("lse", "*fp32"),
    ("q_map", "map of queries"),
    ("q_rope_map", "map of queries"),
    ("k_map", "map of keys"),
    ("k_rope_map", "map of keys"),
    ("v_map", "map of values"),
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
    ("slots_each", "i32"),
    ("abreast", "i32"),
    ("scale_log2", "fp32"),
)
ALIGNED = frozenset({"out", "out_stride_t", "out_stride_h"})

_Shared, _Work = prefill_work.Shared, prefill_work.Work
_attend, _load_tile = prefill_steps.attend, prefill_steps.load_tile
ROWS = gl.constexpr(WARPGROUP_ROWS)
COLUMNS = gl.constexpr(CHUNK)


@gluon.jit
def prefill_kernel(
    cu_seqlens_q, cu_seqlens_k, out, lse, q_map, q_rope_map, k_map, k_rope_map, v_map,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    batch, queries, keys, heads, group, slots, slots_each, abreast, scale_log2,
    CHUNKS: gl.constexpr, Q_NOPE: gl.constexpr, K_NOPE: gl.constexpr, VALUE: gl.constexpr,
    CAUSAL: gl.constexpr, NEGATIVE_SCALE: gl.constexpr, BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = out.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    work = _Work(
        cu_seqlens_q, cu_seqlens_k, batch, queries, keys, heads, slots, slots_each, abreast,
        CAUSAL, BLOCK_N,
    )  # fmt: skip
    shared = _Shared(
        gl.allocate_shared_memory(dtype, [2 * CHUNKS, ROWS, 1, COLUMNS], LAYOUT),
        gl.allocate_shared_memory(dtype, [SLOTS * CHUNKS, BLOCK_N, 1, COLUMNS], LAYOUT),
        gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, 1, VALUE], LAYOUT),
        barriers(CHUNKS, 1), barriers(SLOTS, 1), barriers(SLOTS, 2), barriers(1, 2), barriers(1, 1),
        CHUNKS, SLOTS,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_attend, (
                work, shared, out, lse, scale_log2, out_stride_t, out_stride_h, lse_stride_t,
                lse_stride_h, 0, VALUE, NEGATIVE_SCALE,
            )),
            (_attend, (
                work, shared, out, lse, scale_log2, out_stride_t, out_stride_h, lse_stride_t,
                lse_stride_h, 1, VALUE, NEGATIVE_SCALE,
            )),
            (_load_tile, (
                work, shared, q_map, q_rope_map, k_map, k_rope_map, v_map, group, Q_NOPE, K_NOPE,
                VALUE,
            )),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def variant(problem: PrefillProblem, config: Config, device: Device) -> Variant:
    """The kernel for a problem: everything but sizes that change from step to step is constant."""
    kinds = {
        "*T": f"*{TYPE_NAMES[problem.dtype]}",
        "map of queries": map_type(problem.dtype, WARPGROUP_ROWS, CHUNK),
        "map of keys": map_type(problem.dtype, config.block_n, CHUNK),
        "map of values": map_type(problem.dtype, config.block_n, problem.value_dim),
    }
    return Variant(
        prefill_kernel,
        tuple((name, kinds.get(kind, kind)) for name, kind in ARGUMENTS),
        (
            ("CHUNKS", problem.qk_dim // CHUNK),
            ("Q_NOPE", problem.q_nope),
            ("K_NOPE", problem.k_nope),
            ("VALUE", problem.value_dim),
            ("CAUSAL", problem.causal),
            ("NEGATIVE_SCALE", problem.negative_scale),
            ("BLOCK_N", config.block_n),
            ("SLOTS", config.stages),
        ),
        ALIGNED,
        max_registers=REGISTERS_AT_LAUNCH,
        source=GluonASTSource,
    )


def map_type(dtype: torch.dtype, rows: int, columns: int) -> str:
    """What Triton calls a TMA descriptor of boxes of one head's rows."""
    return f"tensordesc<{TYPE_NAMES[dtype]}[{rows}, 1, {columns}],{TILE!r}>"


def view(tensor: torch.Tensor) -> View:
    """`[tokens, heads, columns]`, or `[tokens, columns]` of one head, as a descriptor sees it."""
    tokens, *heads, columns = tensor.shape
    head_count = heads[0] if heads else 1
    # The stride of a dimension of one may be anything, but not to a descriptor.
    token_stride = tensor.stride(0) if tokens > 1 else columns
    head_stride = tensor.stride(1) if head_count > 1 else columns
    return View(tensor, (tokens, head_count, columns), (token_stride, head_stride, 1))


def maps(tensors: PrefillTensors) -> list[View]:
    """Queries, keys and values. Where there are no keys at all, queries stand for them, unread."""
    t = tensors
    query = view(t.q)
    query_rope = query if t.q_rope is None else view(t.q_rope)
    if t.k.shape[0] == 0:
        return [query, query_rope, query, query, query]
    key = view(t.k)
    return [query, query_rope, key, key if t.k_rope is None else view(t.k_rope), view(t.v)]


def arguments(problem: PrefillProblem, tensors: PrefillTensors) -> list[Any]:
    """The run-time arguments, in the order of `ARGUMENTS`."""
    t = tensors
    return [
        t.cu_seqlens_q,
        t.cu_seqlens_k,
        t.out,
        t.lse,
        *maps(t),
        *t.out.stride()[:2],
        *t.lse.stride(),
        problem.batch,
        problem.queries,
        problem.keys,
        problem.heads,
        problem.group,
        *tile_slots(problem),
        heads_abreast(problem),
        abs(t.softmax_scale) * LOG2_E,
    ]


def compile(problem: PrefillProblem, config: Config, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, config, device).compile(device)


def launch(
    launcher: Launch, problem: PrefillProblem, config: Config, tensors: PrefillTensors
) -> None:
    """Writes `out` and `lse` of every row of the sequences."""
    launcher((tile_slots(problem)[0] * problem.heads, 1, 1), arguments(problem, tensors))
