"""The merge of attention states by their log-sum-exp, in Triton.

What: for every row, a (query token, head) pair, lse = log of the sum of exp(lse_i) and out = sum of
exp(lse_i - lse) out_i over its states. Where: NVIDIA from capability 8.0 on, AMD CDNA3 and later,
Triton's interpreter.

Work: a program takes some whole rows and walks through their states, at most `MOST_APART` of them
at a time, whose loads come before anything is done with what was loaded. So many states have an
address each, wherever they lie; of a stack of more, each address but the first is that of every
seventh state. Every element is read once and written once, in accesses of 16 bytes a thread where
rows are aligned: the kernel is bound by memory, and needs many programs on an SM rather than large
ones.

Budget: no shared memory but for the exchange of a lse a row between warps; `ELEMENTS` elements of
each of the states in flight, and as many float32 sums, in the registers of `NUM_WARPS` warps.

In place: a program reads all states of a row before it writes the row, and no other program reads
it, so the result may lie where a state does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mla_triton.device import Device
from mla_triton.kernels.common.launch import TYPE_NAMES, Launch, Variant, emulates_bf16
from mla_triton.kernels.common.tiles import LOWEST, narrow
from mla_triton.plan import cdiv
from mla_triton.problem import MOST_APART, MergeLayout, MergeProblem

OP = "merge"
NAME = "portable"
MAX_VALUE_DIM = 4096
"""Columns of a row, which one program has to hold whole."""
ELEMENTS = 2048
"""Of one state in a program: 16 a thread, so that some ten programs share an SM and have some
hundred KiB in flight together."""
NUM_WARPS = 4
WARPS = (1, 2, 4, 8)
MAX_ROWS = 128
MAX_WORDS = 192
"""Registers of a thread for what is loaded and summed; the rest is for addresses."""

OTHERS = tuple(range(1, MOST_APART))
OUT_STEPS = ("first_out", "other_out", "out")
LSE_STEPS = ("first_lse", "other_lse", "mask", "lse")
ARGUMENTS = (
    ("first_out", "*FIRST"),
    *((f"out_{other}", "*OTHER") for other in OTHERS),
    ("first_lse", "*fp32"),
    *((f"lse_{other}", "*fp32") for other in OTHERS),
    ("mask", "*i1"),
    ("out", "*OUT"),
    ("lse", "*fp32"),
    *(
        (f"{name}_{dimension}", "i64")
        for name in (*OUT_STEPS, *LSE_STEPS)
        for dimension in ("outer", "middle", "inner")
    ),
    ("turn_out", "i64"),
    ("turn_lse", "i64"),
    ("middle", "i32"),
    ("inner", "i32"),
    ("rows", "i32"),
    ("others", "i32"),
)
ALIGNED = frozenset(
    name
    for name, kind in ARGUMENTS
    if kind in ("*FIRST", "*OTHER", "*OUT")
    or name == "turn_out"
    or (kind == "i64" and name.rpartition("_")[0] in OUT_STEPS)
)


class MergeTensors(NamedTuple):
    """What a launch reads and writes."""

    outs: Sequence[torch.Tensor]
    """`[..., heads, value_dim]` of each state, of the first `MOST_APART` where they are a stack."""
    lses: Sequence[torch.Tensor]
    """`[..., heads]` float32 of the same."""
    mask: torch.Tensor | None
    """`[...]` bool."""
    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class Config:
    """How rows are shared."""

    rows: int
    """Rows of a program."""
    num_warps: int


def why_not(problem: MergeProblem, device: Device) -> str | None:
    """The reason this implementation cannot take a problem, or None."""
    if not device.runs_triton:
        return "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1)"
    if device.capability is not None and device.capability < (8, 0):
        return f"it needs capability 8.0 or later, this card has {device.label}"
    if problem.value_dim > MAX_VALUE_DIM:
        return f"value_dim must be at most {MAX_VALUE_DIM}, got {problem.value_dim}"
    return None


def columns(problem: MergeProblem) -> int:
    """Columns of a tile: a power of two that holds a row."""
    return int(triton.next_power_of_2(problem.value_dim))


def words(config: Config, problem: MergeProblem, device: Device) -> int:
    """Registers of a thread that hold elements: as loaded, and the float32 sums of them."""
    threads = config.num_warps * (64 if device.backend == "hip" else 32)
    elements = cdiv(config.rows * columns(problem), threads)
    others = min(problem.states, MOST_APART) - 1
    loaded = problem.first_dtype.itemsize + others * problem.other_dtype.itemsize
    return cdiv(elements * (loaded + 4), 4)


def is_valid(
    config: Config, problem: MergeProblem, device: Device, rows: int | None = None
) -> tuple[bool, str]:
    """Whether a config can be compiled and launched, with the rule that decides it.

    `rows` is of no meaning here: a merge follows no plan.
    """
    if not 1 <= config.rows <= MAX_ROWS or config.rows & (config.rows - 1):
        return False, f"rows must be a power of two in [1, {MAX_ROWS}], got {config.rows}"
    if config.num_warps not in WARPS:
        return False, f"num_warps must be one of {WARPS}, got {config.num_warps}"
    needed = words(config, problem, device)
    if needed > MAX_WORDS:
        return False, f"needs {needed} registers a thread for elements, at most {MAX_WORDS} are"
    return True, f"takes {needed} registers a thread for elements"


def choose(problem: MergeProblem, device: Device, rows: int | None = None) -> tuple[Config, str]:
    """The config of a problem, with its reason; ValueError where none is valid."""
    if device.backend == "interpreter":
        return Config(16, 4), "the interpreter has neither warps nor registers"
    rows = min(MAX_ROWS, max(1, ELEMENTS // columns(problem)))
    refused = []
    for warps in (NUM_WARPS, 2 * NUM_WARPS):
        config = Config(rows, warps)
        valid, rule = is_valid(config, problem, device)
        if valid:
            return config, f"bound by memory: many small programs on an SM; {rule}"
        refused.append(f"{config}: {rule}")
    raise ValueError(f"problem must fit a config on {device.label}, got {problem}: {refused}")


def heuristic(problem: MergeProblem, device: Device, rows: int | None = None) -> Config:
    """The config: there are no tuned rows."""
    return choose(problem, device)[0]


def tuning_point(problem: MergeProblem, device: Device, rows: int | None = None) -> None:
    """None: there is nothing to look up, the heuristic serves every problem."""


@triton.jit
def row_offsets(
    row, middle, inner, outer_step, middle_step, inner_step,
    RANK: tl.constexpr,
):  # fmt: skip
    """Elements from a tensor's first row to those numbered `row`, in int64."""
    if RANK == 1:
        return row.to(tl.int64) * inner_step
    else:
        line = row // inner
        offsets = (row % inner).to(tl.int64) * inner_step
        if RANK == 2:
            return offsets + line.to(tl.int64) * middle_step
        else:
            offsets += (line % middle).to(tl.int64) * middle_step
            return offsets + (line // middle).to(tl.int64) * outer_step


@triton.jit
def weighted(values, lse, largest):
    """(weight `[ROWS]`, its product with the values `[ROWS, COLUMNS]`) of a state.

    Nothing of an empty state counts, whatever its values are.
    """
    weight = tl.exp(lse - largest)
    is_empty = (lse == float("-inf"))[:, None]
    return weight, weight[:, None] * tl.where(is_empty, 0.0, values.to(tl.float32))


@triton.jit
def load_states(
    outs, lses, out_offsets, lse_offsets, wanted, left, column,
    VALUE: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """(values, lses) of `OTHERS` states, each a tuple; of fewer, `left`, and empty states after."""
    values = ()
    found = ()
    for place in tl.static_range(OTHERS):
        is_there = wanted & (place < left)
        found += (  # type: ignore
            tl.load(lses[place] + lse_offsets, mask=is_there, other=float("-inf")),
        )
        values += (  # type: ignore
            tl.load(
                outs[place] + (out_offsets[:, None] + column[None, :]),
                mask=is_there[:, None] & (column < VALUE)[None, :],
                other=0.0,
            ),
        )
    return values, found


@triton.jit
def add_states(largest, total, accumulator, values, lses, OTHERS: tl.constexpr):
    """The running (maximum, sum, accumulator) with `OTHERS` more states."""
    new_largest = largest
    for place in tl.static_range(OTHERS):
        new_largest = tl.maximum(new_largest, lses[place])
    rescale = tl.exp(largest - new_largest)
    total *= rescale
    accumulator *= rescale[:, None]
    for place in tl.static_range(OTHERS):
        weight, term = weighted(values[place], lses[place], new_largest)
        total += weight
        accumulator += term
    return new_largest, total, accumulator


@triton.jit
def merge_kernel(
    first_out, out_1, out_2, out_3, out_4, out_5, out_6, out_7,
    first_lse, lse_1, lse_2, lse_3, lse_4, lse_5, lse_6, lse_7,
    mask, out, lse,
    first_out_outer, first_out_middle, first_out_inner,
    other_out_outer, other_out_middle, other_out_inner,
    out_outer, out_middle, out_inner,
    first_lse_outer, first_lse_middle, first_lse_inner,
    other_lse_outer, other_lse_middle, other_lse_inner,
    mask_outer, mask_middle, mask_inner,
    lse_outer, lse_middle, lse_inner,
    turn_out, turn_lse, middle, inner, rows, others,
    VALUE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr,
    TURNS: tl.constexpr, MASKED: tl.constexpr, RANK: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    tile_rows = tl.arange(0, ROWS)
    row = first_row + tile_rows
    is_row = tile_rows < rows - first_row
    column = tl.arange(0, COLUMNS)
    is_element = is_row[:, None] & (column < VALUE)[None, :]

    first_lses = tl.load(
        first_lse
        + row_offsets(row, middle, inner, first_lse_outer, first_lse_middle, first_lse_inner, RANK),
        mask=is_row,
        other=float("-inf"),
    )
    first_rows = row_offsets(
        row, middle, inner, first_out_outer, first_out_middle, first_out_inner, RANK
    )
    firsts = tl.load(
        first_out + (first_rows[:, None] + column[None, :]), mask=is_element, other=0.0
    )
    wanted = is_row
    if MASKED:
        masks = row_offsets(row, middle, inner, mask_outer, mask_middle, mask_inner, RANK)
        is_merged = tl.load(mask + masks, mask=is_row, other=0) != 0
        wanted = is_row & is_merged
    out_offsets = row_offsets(
        row, middle, inner, other_out_outer, other_out_middle, other_out_inner, RANK
    )
    lse_offsets = row_offsets(
        row, middle, inner, other_lse_outer, other_lse_middle, other_lse_inner, RANK
    )
    outs = (out_1, out_2, out_3, out_4, out_5, out_6, out_7)
    lses = (lse_1, lse_2, lse_3, lse_4, lse_5, lse_6, lse_7)

    # Before anything is done with what was loaded, so that all loads are in flight together.
    others_there = others if TURNS else OTHERS
    values, other_lses = load_states(
        outs, lses, out_offsets, lse_offsets, wanted, others_there, column, VALUE, OTHERS
    )
    # Not from -inf on, so that a row of empty states alone subtracts finite numbers.
    largest = tl.maximum(first_lses, LOWEST)
    total, accumulator = weighted(firsts, first_lses, largest)
    largest, total, accumulator = add_states(
        largest, total, accumulator, values, other_lses, OTHERS
    )
    if TURNS:
        for begun in range(OTHERS, others, OTHERS):
            out_offsets += turn_out
            lse_offsets += turn_lse
            values, other_lses = load_states(
                outs, lses, out_offsets, lse_offsets, wanted, others - begun, column, VALUE, OTHERS
            )
            largest, total, accumulator = add_states(
                largest, total, accumulator, values, other_lses, OTHERS
            )

    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    merged = accumulator * (1.0 / total)[:, None]
    merged_lse = tl.where(is_empty, float("-inf"), largest + tl.log(total))
    if MASKED:
        merged = tl.where(is_merged[:, None], merged, firsts.to(tl.float32))
        merged_lse = tl.where(is_merged, merged_lse, first_lses)
    # In place: every warp has read the lse of a row before one of them overwrites it.
    tl.debug_barrier()
    results = row_offsets(row, middle, inner, out_outer, out_middle, out_inner, RANK)
    tl.store(
        out + (results[:, None] + column[None, :]),
        narrow(merged, out.dtype.element_ty, EMULATE_BF16),
        mask=is_element,
    )
    tl.store(
        lse + row_offsets(row, middle, inner, lse_outer, lse_middle, lse_inner, RANK),
        merged_lse,
        mask=is_row,
    )


def variant(problem: MergeProblem, config: Config, device: Device) -> Variant:
    """The kernel for a problem: how many rows and, in a stack, states there are is not constant."""
    pointers = {
        "*FIRST": problem.first_dtype, "*OTHER": problem.other_dtype, "*OUT": problem.out_dtype
    }  # fmt: skip
    return Variant(
        merge_kernel,
        tuple(
            (name, f"*{TYPE_NAMES[pointers[kind]]}" if kind in pointers else kind)
            for name, kind in ARGUMENTS
        ),
        (
            ("VALUE", problem.value_dim),
            ("COLUMNS", columns(problem)),
            ("ROWS", config.rows),
            ("OTHERS", min(problem.states, MOST_APART) - 1),
            ("TURNS", problem.states > MOST_APART),
            ("MASKED", problem.masked),
            ("RANK", problem.rank),
            ("EMULATE_BF16", emulates_bf16(problem.out_dtype, device)),
        ),
        ALIGNED if problem.aligned else frozenset(),
        config.num_warps,
    )


def arguments(problem: MergeProblem, layout: MergeLayout, tensors: MergeTensors) -> list[Any]:
    """The run-time arguments, in the order of `ARGUMENTS`."""
    absent = [None] * (MOST_APART - len(tensors.outs))
    return [
        *tensors.outs,
        *absent,
        *tensors.lses,
        *absent,
        tensors.mask,
        tensors.out,
        tensors.lse,
        *layout.first_out,
        *layout.other_out,
        *layout.out,
        *layout.first_lse,
        *layout.other_lse,
        *layout.mask,
        *layout.lse,
        (MOST_APART - 1) * layout.next_out,
        (MOST_APART - 1) * layout.next_lse,
        layout.middle,
        layout.inner,
        problem.rows,
        problem.states - 1,
    ]


def compile(problem: MergeProblem, config: Config, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, config, device).compile(device)


def launch(
    launcher: Launch,
    problem: MergeProblem,
    config: Config,
    layout: MergeLayout,
    tensors: MergeTensors,
) -> None:
    """Writes `out` and `lse`."""
    grid = (cdiv(problem.rows, config.rows), 1, 1)
    launcher(grid, arguments(problem, layout, tensors))
