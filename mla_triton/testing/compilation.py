"""Every kernel variant that the heuristics can choose, compiled for its card without having it.

`cases` are those of decode, in both forms of the Hopper kernel, of its schedule and its combine,
and of merge; `mla_triton.testing.prefill_compilation` has those of prefill, and
`mla_triton.testing.cache_compilation` those of append, gather and copy_pages.

`compile_all` runs in processes of its own: a process in which Triton interprets cannot compile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch

from mla_triton import device as devices
from mla_triton.cache import named
from mla_triton.device import Device
from mla_triton.kernels.sm90 import decode_config as sm90_config
from mla_triton.problem import (
    MOST_APART,
    DecodeProblem,
    MergeProblem,
    PrefillProblem,
    RowSteps,
    Storage,
)
from mla_triton.problem_cache import AppendProblem, CopyProblem, GatherProblem
from mla_triton.testing import resources
from mla_triton.testing.resources import Resources

LABELS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "gfx942", "gfx950")
OfCache = AppendProblem | GatherProblem | CopyProblem
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEADS = (16, 32, 128)
"""One head count for each row tile that the heuristics know."""
PAGE_SIZES = (1, 16, 32, 64, 128, 48)
DIMENSIONS = ((512, 64, 512), (512, 0, 512), (256, 64, 256), (256, 32, 256), (128, 32, 128))
ROPE_INSIDE = (448, 64, 512)
QUANTISED_LABELS = ("8.0", "8.9", "9.0", "10.0")
"""e4m3 by arithmetic; by conversion; beside wgmma; beside tcgen05."""
MANY_ROWS = ("fp8", "fp8_ds_mla")
"""Forms of a quantised cache that are compiled for more than 16 rows, too."""


@dataclass(frozen=True)
class Case:
    """One problem on one card."""

    label: str
    kernel: str
    """"portable" or "sm90" of what computes attention; "combine", "schedule" or "merge"; of a
    cache's tokens "append", "gather" or "copy_pages"."""
    problem: DecodeProblem | PrefillProblem | MergeProblem | OfCache
    config: Any = None
    """None for the heuristic's."""

    @property
    def is_attention(self) -> bool:
        return self.kernel in ("portable", "sm90")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case."""

    case: Case
    row_tile: int
    """Rows of a program."""
    config: str
    limit: int
    """Bytes of shared memory a program may take on the card."""
    estimate: int
    """What `shared_memory` of the portable kernels of attention expected; 0 for the others."""
    resources: Resources


def problem(
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 16,
    page_size: int = 64,
    dimensions: tuple[int, int, int] = DIMENSIONS[0],
) -> DecodeProblem:
    """A batch of 64 requests, one query each, over a fused and aligned cache."""
    latent, rope, value_dim = dimensions
    return DecodeProblem(
        dtype=dtype,
        batch=64,
        s_q=1,
        queries=64,
        heads=heads,
        latent=latent,
        rope=rope,
        value_dim=value_dim,
        page_size=page_size,
        csr=False,
        causal=False,
        fused=True,
        ckv_stride_slot=latent + rope,
        kpe_stride_slot=0,
        page_slots=page_size,
        row_steps=RowSteps(latent + rope, latent + rope if rope else 0, value_dim, 1),
    )


def quantised_problems(
    dtype: torch.dtype = torch.bfloat16, heads: int = 16
) -> dict[str, DecodeProblem]:
    """The same batch over each form of a quantised cache, by name."""
    plain, inside = problem(dtype, heads), problem(dtype, heads, dimensions=ROPE_INSIDE)
    pair = replace(plain, fused=False, ckv_stride_slot=512, kpe_stride_slot=64)
    rope_numbers = Storage(torch.float8_e4m3fn, 0, torch.float32, 0)
    return {
        "fp8": named.over(plain, "fp8"),
        "fp8 pair": replace(pair, storage=rope_numbers),
        "fp8 rope inside": named.over(inside, "fp8"),
        "groups": replace(pair, storage=Storage(dtype, 128, torch.float32, 4)),
        "fp8_v41": named.over(inside, "fp8_v41"),
    } | (
        {"fp8_ds_mla": named.over(plain, "fp8_ds_mla"), "fp8_v4": named.over(inside, "fp8_v4")}
        if dtype == torch.bfloat16
        else {}
    )


def cases() -> Iterator[Case]:
    """All cases: page sizes, then model dimensions, then the forms of a call, on every card."""
    for label in LABELS:
        for dtype in DTYPES:
            for heads in HEADS if dtype != torch.float32 else HEADS[:1]:
                for page_size in PAGE_SIZES:
                    yield Case(label, "portable", problem(dtype, heads, page_size))
        for dimensions in (*DIMENSIONS[1:], ROPE_INSIDE):
            for heads in HEADS:
                yield Case(label, "portable", problem(heads=heads, dimensions=dimensions))
            yield Case(label, "portable", problem(torch.float32, dimensions=dimensions))
        plain = problem()
        ragged = replace(plain, s_q=None, causal=True)
        pair = replace(plain, fused=False, ckv_stride_slot=512, kpe_stride_slot=64)
        yield Case(label, "portable", replace(plain, s_q=2, queries=128, causal=True))
        yield Case(label, "portable", ragged)
        yield Case(label, "portable", replace(plain, csr=True))
        yield Case(label, "portable", pair)
        yield Case(label, "portable", replace(plain, aligned=False))
        yield Case(label, "portable", replace(plain, heads=128, row_steps=RowSteps()))
        yield Case(label, "portable", replace(plain, dtype=torch.float32, allow_tf32=True))
        for dtype in DTYPES:
            yield Case(label, "combine", replace(plain, dtype=dtype))
        for dimensions in DIMENSIONS[2::2]:
            yield Case(label, "combine", problem(dimensions=dimensions))
        yield Case(label, "combine", ragged)
        for batch in (1, 4, 16):
            yield Case(label, "combine", replace(plain, batch=batch, queries=batch))
        for batch in (64, 1000):
            yield Case(label, "schedule", replace(plain, batch=batch))
            yield Case(label, "schedule", replace(ragged, batch=batch))
        yield from _quantised_cases(label)
        yield from _sm90_cases(label)
        yield from (Case(label, "merge", merge) for merge in merges())


def _quantised_cases(label: str) -> Iterator[Case]:
    """Each form of a quantised cache, on a card of each way to convert and multiply."""
    if label not in QUANTISED_LABELS:
        return
    for heads, forms in ((16, ("fp8", "fp8_ds_mla", "fp8_v4", "fp8_v41")), (128, MANY_ROWS)):
        known = quantised_problems(heads=heads)
        for form in forms:
            yield Case(label, "portable", known[form])
    one_scale = quantised_problems(torch.float16)["fp8 pair"]
    yield Case(label, "portable", replace(one_scale, page_size=1))
    yield Case(label, "portable", replace(quantised_problems()["groups"], aligned=False))


def merges() -> Iterator[MergeProblem]:
    """Forms of a merge: dtypes and numbers of states, then widths, then layouts."""
    plain = MergeProblem(
        first_dtype=torch.bfloat16,
        other_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
        states=2,
        value_dim=512,
        masked=False,
        rank=1,
        aligned=True,
        rows=1024 * 128,
    )
    for dtype in DTYPES:
        same = replace(plain, first_dtype=dtype, other_dtype=dtype, out_dtype=dtype)
        for states in (2, MOST_APART, MOST_APART + 1):
            yield replace(same, states=states)
    yield replace(plain, first_dtype=torch.float32, out_dtype=torch.float32)
    for value_dim in (64, 96, 128, 192, 256):
        yield replace(plain, value_dim=value_dim)
    yield replace(plain, masked=True, rank=2)
    yield replace(plain, masked=True, rank=3, aligned=False)


def _sm90_cases(label: str) -> Iterator[Case]:
    """Both forms of the Hopper kernel, where the card and the problem have them."""
    device = devices.from_label(label)
    plain = problem(heads=128)
    forms = [
        problem(dtype, 128, page_size)
        for dtype in (torch.float16, torch.bfloat16)
        for page_size in (1, 16, 32, 64, 128)
    ]
    forms += [
        problem(heads=128, dimensions=DIMENSIONS[1]),
        problem(heads=128, dimensions=DIMENSIONS[2]),
        replace(plain, s_q=2, queries=128, causal=True),
        replace(plain, s_q=None, causal=True, csr=True),
        replace(plain, fused=False, ckv_stride_slot=512, kpe_stride_slot=64),
    ]
    for form in forms:
        for config in sm90_config.search_space(form, device):
            if sm90_config.is_valid(config, form, device)[0]:
                yield Case(label, "sm90", form, config)


def compile_case(case: Case) -> Compiled:
    """Compiles one case in this process; Triton must not be interpreting.

    Raises RuntimeError, with the compiler's words, naming the case that does not compile.
    """
    try:
        return _compile(case)
    except Exception as error:
        raise RuntimeError(f"{case} does not compile: {error}") from error


def _compile(case: Case) -> Compiled:
    from mla_triton.kernels.common import combine, schedule
    from mla_triton.kernels.portable import decode as portable
    from mla_triton.kernels.portable import decode_config

    device = devices.from_label(case.label)
    if isinstance(case.problem, OfCache):
        return _compile_of_cache(case, device)
    if isinstance(case.problem, MergeProblem):
        return _compile_merge(case, case.problem, device)
    if isinstance(case.problem, PrefillProblem):
        return _compile_prefill(case, case.problem, device)
    if case.kernel == "sm90":
        return _compile_sm90(case, case.problem, device)
    config = portable.heuristic(case.problem, device)
    geometry = portable.geometry(case.problem, device)
    estimate = 0
    text = str(config)
    if case.kernel == "portable":
        tf32 = decode_config.precision(case.problem, device) == "tf32"
        seen = replace(case.problem, allow_tf32=tf32)
        estimate = decode_config.shared_memory(config, seen, device, geometry.row_tile)
        compiled = portable.compile(case.problem, config, geometry, device)
    elif case.kernel == "combine":
        merge = combine.heuristic(case.problem, geometry, device)
        text = f"{merge.pieces} pieces in a turn"
        compiled = combine.compile(case.problem, merge, device)
    else:
        text = f"block of {schedule.block_of(case.problem.batch)} requests"
        batch, ragged = case.problem.batch, case.problem.ragged
        compiled = schedule.variant(batch, ragged, geometry.kv_tile, device).compile(device)
    return _made(case, device, geometry.row_tile, text, estimate, compiled)


def _compile_merge(case: Case, problem: MergeProblem, device: Device) -> Compiled:
    from mla_triton.kernels.portable import merge

    config = merge.heuristic(problem, device)
    compiled = merge.compile(problem, config, device)
    return _made(case, device, config.rows, str(config), 0, compiled)


def _compile_of_cache(case: Case, device: Device) -> Compiled:
    kernel = import_module(f"mla_triton.kernels.portable.{case.kernel}")
    config = kernel.heuristic(case.problem, device)
    compiled = kernel.compile(case.problem, config, device)
    return _made(case, device, getattr(config, "rows", 1), str(config), 0, compiled)


def _compile_prefill(case: Case, problem: PrefillProblem, device: Device) -> Compiled:
    kernels = f"mla_triton.kernels.{case.kernel}"
    prefill = import_module(f"{kernels}.prefill")
    config = prefill.heuristic(problem, device)
    estimate = import_module(f"{kernels}.prefill_config").shared_memory(config, problem, device)
    compiled = prefill.compile(problem, config, device)
    return _made(case, device, config.block_m, str(config), estimate, compiled)


def _compile_sm90(case: Case, problem: DecodeProblem, device: Device) -> Compiled:
    from mla_triton.kernels.sm90 import decode

    geometry = decode.geometry(problem, device)
    compiled = decode.compile(problem, case.config, geometry, device)
    return _made(case, device, geometry.row_tile, str(case.config), 0, compiled)


def _made(
    case: Case, device: Device, row_tile: int, text: str, estimate: int, compiled: Any
) -> Compiled:
    return Compiled(case, row_tile, text, device.shared_memory, estimate, resources.read(compiled))


def compile_all(wanted: Sequence[Case], processes: int | None = None) -> list[Compiled]:
    """Compiles cases side by side, by default one process a core."""
    return side_by_side(compile_case, wanted, processes)


def side_by_side(
    compile_one: Callable[[Any], Any], wanted: Sequence[Any], processes: int | None = None
) -> list[Any]:
    """What a function of a module makes of each, in processes in which Triton compiles."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        workers = processes or os.cpu_count() or 1
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            return list(pool.map(compile_one, wanted, chunksize=4))
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
