"""Split-KV absorbed attention over a paged cache of e4m3 numbers, for Hopper, in Gluon.

What: as `mla_triton.kernels.sm90.decode`, over a cache with one scale for all latents and one for
all rotary keys; or (`GROUPS`) with a scale for each 128 columns of a token's latent, and rotary
keys of 16 bits. Where: capability 9.0 exactly.

Work: program (lane, part) walks the groups of its part, with a tile of 16, 32 or 64 rows. Up to 32
rows it has two partitions (`quantised_steps.py`): one or two warpgroups that take a block of 64 or
128 keys together, and one warp that loads bytes by TMA. Of one warpgroup an SM has two programs.
With 64 rows a program has an SM, blocks of 64 keys, and three partitions (`quantised_apart.py`):
one warpgroup that makes weights of a block, two that make the output of them, and the loader.
`quantised_scores.py` and `quantised_output.py` are what both have in common, the two products;
`quantised_operands.py` says how bytes become operands, and `quantised_groups.py` what is otherwise
with scales of groups. Lanes of a part run side by side and share its keys through the L2.

Budget at latent 512 + rope 64 and one warpgroup: queries 1.125 KiB a row, weights 0.125, two blocks
of latents of 32 KiB and of rotary keys of 4: 92 KiB for 16 rows, 113 for 32. Registers: 128 a
thread as launched, 232 for the warpgroup (4 of output a row, half of one of scores) and 24 for the
loader once they are apart. With two warpgroups twice the keys, half the output a thread: 167 and
190 KiB, 168 registers as launched and 240. With scales of groups: 101 KiB for 16 rows, and with two
warpgroups 182 and 217. With 64 rows three blocks, or two with scales of groups, and weights of two:
207 KiB, and 221; 128 registers as launched, then 176 for the output (128 of them accumulators), or
168, and 136 for the weights, or 152.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_triton.device import Device
from mla_triton.kernels.common.launch import TYPE_NAMES, Launch, Variant
from mla_triton.kernels.common.tensors import DecodeTensors
from mla_triton.kernels.sm90 import quantised_apart, quantised_operands, quantised_steps
from mla_triton.kernels.sm90.decode_config import BLOCK, Config, programs
from mla_triton.kernels.sm90.gluon import GluonASTSource, gl, gluon
from mla_triton.kernels.sm90.pieces import Call, barriers
from mla_triton.kernels.sm90.views import maps, row_strides, scale_map, sizes
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem

LOADER_REGISTERS = gl.constexpr(24)


@dataclass(frozen=True)
class Form:
    """How a program goes about its tile, by the rows of it and its warps."""

    registers: int
    """Of a thread, at launch: what the partitions have is shared out of that."""
    slots: int
    """Blocks of keys in shared memory: one in hand, the others on their way."""
    step: int
    """Keys of an operand of the second product. With longer ones than these registers are short,
    and the compiler has every product wait for the one before it."""
    ready: int
    """Such operands that are made before the weights are there. With scales of groups and two
    warpgroups, 389 us with two, 396 with four and 399 with none, at 16 heads and 128 requests of
    16384 keys on an H200."""
    maker_registers: int = 0
    """Of a thread of the warpgroup that makes weights, where that is a partition of its own."""


FORMS = {
    (16, 4): Form(registers=128, slots=2, step=64, ready=0),
    (32, 4): Form(registers=128, slots=2, step=32, ready=0),
    (16, 8): Form(registers=168, slots=2, step=64, ready=2),
    (32, 8): Form(registers=168, slots=2, step=64, ready=2),
    (64, 8): Form(registers=128, slots=3, step=16, ready=0, maker_registers=136),
}
GROUPED_FORMS = {
    (16, 4): Form(registers=128, slots=2, step=64, ready=1),
    (16, 8): Form(registers=168, slots=2, step=64, ready=2),
    (32, 8): Form(registers=168, slots=2, step=64, ready=2),
    (64, 8): Form(registers=128, slots=2, step=16, ready=0, maker_registers=152),
}
"""With scales of groups."""
ARGUMENTS = (
    ("q_nope", "*T"),
    ("q_rope", "*T"),
    ("scales", "*fp32"),
    ("pages", "*i32"),
    ("indptr", "*i32"),
    ("kv_lens", "*i32"),
    ("cu_seqlens_q", "*i32"),
    ("schedule", "*i32"),
    ("partial_out", "*fp32"),
    ("partial_lse", "*fp32"),
    ("out", "*T"),
    ("lse", "*fp32"),
    ("latent_map", "map of latents"),
    ("rope_map", "map of rotary keys"),
    ("scale_map", "map of scales"),
    ("q_nope_stride_b", "i64"),
    ("q_nope_stride_s", "i64"),
    ("q_nope_stride_h", "i64"),
    ("q_rope_stride_b", "i64"),
    ("q_rope_stride_s", "i64"),
    ("q_rope_stride_h", "i64"),
    ("out_stride_b", "i64"),
    ("out_stride_s", "i64"),
    ("out_stride_h", "i64"),
    ("lse_stride_b", "i64"),
    ("lse_stride_s", "i64"),
    ("lse_stride_h", "i64"),
    ("table_size", "i64"),
    ("page_rows", "i32"),
    ("rope_column", "i32"),
    ("batch", "i32"),
    ("s_q", "i32"),
    ("queries", "i32"),
    ("heads", "i32"),
    ("max_kv_len", "i32"),
    ("planned_kv_len", "i32"),
    ("num_pages", "i32"),
    ("parts", "i32"),
    ("scale_log2", "fp32"),
)
ALIGNED = frozenset(
    name
    for name, _ in ARGUMENTS
    if name in ("q_nope", "q_rope", "out", "partial_out", "rope_column")
    or (name.startswith(("q_", "out_")) and "_stride_" in name)
)
CHUNK = quantised_operands.CHUNK.value
_WARP_KEYS = quantised_operands.WARP_KEYS
_CHUNK = quantised_operands.CHUNK
_Shared, _attend, _load_bytes = (
    quantised_steps.Shared,
    quantised_steps.attend,
    quantised_steps.load_bytes,
)
_Handover, _make_weights, _average, _MAKERS = (
    quantised_apart.Handover,
    quantised_apart.make_weights,
    quantised_apart.average,
    quantised_apart.MAKERS,
)


@gluon.jit
def quantised_kernel(
    q_nope, q_rope, scales, pages, indptr, kv_lens, cu_seqlens_q, schedule,
    partial_out, partial_lse, out, lse, latent_map, rope_map, scale_map,
    q_nope_stride_b, q_nope_stride_s, q_nope_stride_h,
    q_rope_stride_b, q_rope_stride_s, q_rope_stride_h,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    table_size, page_rows, rope_column, batch, s_q, queries, heads, max_kv_len, planned_kv_len,
    num_pages, parts, scale_log2,
    VALUE: gl.constexpr, TAIL: gl.constexpr, PAGE_SIZE: gl.constexpr, CSR: gl.constexpr,
    RAGGED: gl.constexpr, CAUSAL: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr,
    GROUPS: gl.constexpr, WARPS: gl.constexpr, SLOTS: gl.constexpr, READY: gl.constexpr,
    STEP: gl.constexpr, MAKER_REGISTERS: gl.constexpr,
):  # fmt: skip
    APART: gl.constexpr = MAKER_REGISTERS > 0
    KEYS: gl.constexpr = _WARP_KEYS * (_MAKERS if APART else WARPS)
    PLACES: gl.constexpr = 2 if APART else 1
    BYTES: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    QUERY: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(2 * ROWS, 16, 2)
    E4M3: gl.constexpr = latent_map.dtype
    call = Call(
        pages, indptr, kv_lens, cu_seqlens_q, schedule, table_size, batch, s_q, queries, heads,
        max_kv_len, planned_kv_len, parts, PAGE_SIZE, CSR, RAGGED, CAUSAL, False, ROWS, TILE,
    )  # fmt: skip
    query = gl.allocate_shared_memory(gl.float16, [VALUE // _CHUNK, ROWS, _CHUNK], QUERY)
    latent = gl.allocate_shared_memory(E4M3, [SLOTS, KEYS, VALUE], BYTES)
    if GROUPS > 0:
        PLAIN: gl.constexpr = gl.NVMMASharedLayout(0, 32, 2)
        query_rope = gl.allocate_shared_memory(rope_map.dtype, [1, ROWS, TAIL], QUERY)
        rope = gl.allocate_shared_memory(rope_map.dtype, [1, KEYS, TAIL], QUERY)
        key_scales = gl.allocate_shared_memory(gl.float32, [SLOTS, KEYS, GROUPS], PLAIN)
        words = latent._reinterpret(gl.int16, [SLOTS, KEYS, VALUE // 2], QUERY)
        weights = gl.allocate_shared_memory(gl.bfloat16, [PLACES, GROUPS * KEYS, ROWS], WEIGHTS)
    elif TAIL > 0:
        ROPE_BYTES: gl.constexpr = gl.NVMMASharedLayout(TAIL, 8, 2)
        query_rope = gl.allocate_shared_memory(gl.float16, [1, ROWS, TAIL], QUERY)
        rope = gl.allocate_shared_memory(E4M3, [SLOTS, KEYS, TAIL], ROPE_BYTES)
    else:
        query_rope = query
        rope = latent
    if GROUPS == 0:
        key_scales = latent
        words = latent
        weights = gl.allocate_shared_memory(gl.float16, [PLACES, KEYS, ROWS], WEIGHTS)
    LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    exchange = gl.allocate_shared_memory(gl.float32, [KEYS // _WARP_KEYS, ROWS], LINES)
    full, empty = barriers(SLOTS, 1), barriers(SLOTS, 2 if APART else 1)
    if GROUPS > 0:
        rope_full, rope_empty = barriers(1, 1), barriers(1, 1)
    else:
        rope_full = full
        rope_empty = empty
    shared = _Shared(
        query, query_rope, latent, words, rope, key_scales, weights, exchange,
        full, empty, rope_full, rope_empty,
    )  # fmt: skip
    if APART:
        OF_ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        factors = gl.allocate_shared_memory(gl.float32, [PLACES, ROWS], OF_ROWS)
        maxima = gl.allocate_shared_memory(gl.float32, [1, ROWS], OF_ROWS)
        sums = gl.allocate_shared_memory(gl.float32, [1, 2 * ROWS, 16], LINES)
        ready, free = barriers(PLACES, 1), barriers(PLACES, 1)
        handover = _Handover(factors, ready, free, maxima, sums)
        gl.warp_specialize(
            [
                (_average, (
                    call, shared, handover, out, partial_out,
                    out_stride_b, out_stride_s, out_stride_h, VALUE, GROUPS, SLOTS, STEP,
                )),
                (_make_weights, (
                    call, shared, handover, q_nope, q_rope, scales, lse, partial_lse, scale_log2,
                    q_nope_stride_b, q_nope_stride_s, q_nope_stride_h,
                    q_rope_stride_b, q_rope_stride_s, q_rope_stride_h,
                    lse_stride_b, lse_stride_s, lse_stride_h, VALUE, TAIL, GROUPS, SLOTS,
                )),
                (_load_bytes, (
                    call, shared, latent_map, rope_map, scale_map, rope_column, page_rows,
                    num_pages, VALUE, TAIL, GROUPS, _MAKERS, SLOTS,
                )),
            ],
            [_MAKERS, 1],
            [MAKER_REGISTERS, LOADER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    call, shared, q_nope, q_rope, scales, out, lse, partial_out, partial_lse,
                    scale_log2, q_nope_stride_b, q_nope_stride_s, q_nope_stride_h,
                    q_rope_stride_b, q_rope_stride_s, q_rope_stride_h,
                    out_stride_b, out_stride_s, out_stride_h,
                    lse_stride_b, lse_stride_s, lse_stride_h, VALUE, TAIL, GROUPS,
                    WARPS, SLOTS, READY, STEP,
                )),
                (_load_bytes, (
                    call, shared, latent_map, rope_map, scale_map, rope_column, page_rows,
                    num_pages, VALUE, TAIL, GROUPS, WARPS, SLOTS,
                )),
            ],
            [1],
            [LOADER_REGISTERS],
        )  # fmt: skip


def variant(problem: DecodeProblem, config: Config, geometry: Geometry, device: Device) -> Variant:
    """The kernel for a problem: everything but sizes that change from step to step is constant."""
    box = min(BLOCK, problem.page_size, geometry.kv_tile)
    tail, groups = problem.key_tail, groups_of(problem)
    rows, warps = geometry.row_tile, warps_of(problem, geometry, device)
    form = (GROUPED_FORMS if groups else FORMS)[rows, warps]
    rope = map_type("fp8e4nv", box, tail or CHUNK, tail or CHUNK)
    if groups:
        rope = map_type(TYPE_NAMES[problem.dtype], box, tail, 2 * tail)
    kinds = {
        "*T": f"*{TYPE_NAMES[problem.dtype]}",
        "map of latents": map_type("fp8e4nv", box, problem.value_dim, CHUNK),
        "map of rotary keys": rope,
        "map of scales": map_type("fp32", box, groups, 0) if groups else rope,
    }
    return Variant(
        quantised_kernel,
        tuple((name, kinds.get(kind, kind)) for name, kind in ARGUMENTS),
        (
            ("VALUE", problem.value_dim),
            ("TAIL", tail),
            ("PAGE_SIZE", problem.page_size),
            ("CSR", problem.csr),
            ("RAGGED", problem.ragged),
            ("CAUSAL", problem.causal),
            ("ROWS", rows),
            ("TILE", geometry.kv_tile),
            ("GROUPS", groups),
            ("WARPS", warps),
            ("SLOTS", form.slots),
            ("READY", form.ready),
            ("STEP", form.step),
            ("MAKER_REGISTERS", form.maker_registers),
        ),
        ALIGNED,
        num_warps=warps,
        programmatic=True,
        max_registers=form.registers,
        source=GluonASTSource,
    )


def groups_of(problem: DecodeProblem) -> int:
    """Scales of a latent; 0 where one is for all latents."""
    assert problem.storage is not None
    return problem.value_dim // problem.storage.group if problem.storage.group else 0


def warps_of(problem: DecodeProblem, geometry: Geometry, device: Device) -> int:
    """Warps of a program that make its output: four, of which an SM has two programs, or eight.

    A plan that was made for another cache may have one program for each SM, which is then to be of
    eight; not where its results must not depend on how many there are.
    """
    is_one = geometry.lanes * geometry.parts <= device.sm_count and not geometry.fixed
    is_paired = programs(problem, geometry.row_tile) == 2
    return 4 if is_paired and not is_one else 8


def map_type(kind: str, rows: int, columns: int, swizzle: int) -> str:
    """What Triton calls a TMA descriptor of boxes of numbers of a kind."""
    bits = {"fp8e4nv": 8, "fp32": 32}.get(kind, 16)
    layout = gl.NVMMASharedLayout(swizzle, bits, 2)
    return f"tensordesc<{kind}[{rows}, {columns}],{layout!r}>"


def arguments(problem: DecodeProblem, geometry: Geometry, tensors: DecodeTensors) -> list[Any]:
    """The run-time arguments, in the order of `ARGUMENTS`."""
    t = tensors
    latents, rope = maps(problem, t)
    return [
        t.q_nope,
        t.q_rope,
        t.scales,
        t.pages,
        t.indptr,
        t.kv_lens,
        t.cu_seqlens_q,
        t.schedule,
        t.partial_out,
        t.partial_lse,
        t.out,
        t.lse,
        latents,
        rope,
        scale_map(problem, t) if groups_of(problem) else rope,
        *row_strides(problem, t),
        t.pages.shape[0] if problem.csr else t.pages.stride(0),
        problem.page_slots,
        problem.value_dim if problem.fused else 0,
        *sizes(problem, geometry, t),
    ]


def launch(
    launcher: Launch, problem: DecodeProblem, geometry: Geometry, tensors: DecodeTensors
) -> None:
    """Writes `out` and `lse`, or partial results where the schedule cuts a group."""
    launcher((geometry.lanes, geometry.parts, 1), arguments(problem, geometry, tensors))
