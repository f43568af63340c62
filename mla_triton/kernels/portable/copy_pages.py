"""Whole pages of a cache into other pages, of it or of another, in Triton.

What: page `sources[n]` of every tensor of a cache goes to page `targets[n]`, byte for byte. Where:
NVIDIA from capability 8.0 on, AMD CDNA3 and later, Triton's interpreter. A pair of which either
number is negative or behind the last page is left out.

Work: a program copies a piece of one page: `WORDS` words of 4 bytes, or bytes where pages do not
lie at multiples of 16. Every byte is read once and written once, in accesses of 16 bytes a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mla_triton.device import Device
from mla_triton.kernels.common.launch import Launch, Variant
from mla_triton.kernels.common.slots import pointer_type, row_pointers, why_not_card
from mla_triton.plan import cdiv
from mla_triton.problem_cache import CopyProblem

OP = "copy_pages"
NAME = "portable"
MOST_PARTS = 3
WORDS = 2048
"""Of a piece: 16 a thread, 8 KiB, where words have 4 bytes."""
PIECES = (512, 1024, 2048, 4096, 8192)
WARPS = (1, 2, 4, 8)
PARTS = range(MOST_PARTS)


class CopyTensors(NamedTuple):
    """What a launch reads and writes: up to `MOST_PARTS` tensors `[pages, ...]` of each cache."""

    read: Sequence[torch.Tensor]
    written: Sequence[torch.Tensor]
    sources: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Config:
    """How a page is shared."""

    words: int
    """Of a program."""
    num_warps: int


def why_not(problem: CopyProblem, device: Device) -> str | None:
    """The reason this implementation cannot take a problem, or None."""
    return why_not_card(device)


def is_valid(
    config: Config, problem: CopyProblem, device: Device, rows: int | None = None
) -> tuple[bool, str]:
    """Whether a config can be compiled and launched, with the rule that decides it."""
    if config.words not in PIECES:
        return False, f"words must be one of {PIECES}, got {config.words}"
    if config.num_warps not in WARPS:
        return False, f"num_warps must be one of {WARPS}, got {config.num_warps}"
    return True, f"{config.words * problem.word_bytes} bytes a program"


def choose(problem: CopyProblem, device: Device, rows: int | None = None) -> tuple[Config, str]:
    """The config of a problem, with its reason."""
    config = Config(WORDS, 4)
    return config, f"bound by memory: many small programs; {is_valid(config, problem, device)[1]}"


def heuristic(problem: CopyProblem, device: Device, rows: int | None = None) -> Config:
    """The config: there are no tuned rows."""
    return choose(problem, device)[0]


def tuning_point(problem: CopyProblem, device: Device, rows: int | None = None) -> None:
    """None: there is nothing to look up, the heuristic serves every problem."""


@triton.jit
def copy_kernel(
    read_0, read_1, read_2, written_0, written_1, written_2, sources, targets,
    read_page_0, read_page_1, read_page_2, written_page_0, written_page_1, written_page_2,
    source_pages, target_pages,
    SIZES: tl.constexpr, FIRSTS: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    piece = tl.program_id(1)
    source = tl.load(sources + pair).to(tl.int64)
    target = tl.load(targets + pair).to(tl.int64)
    is_copied = (source >= 0) & (source < source_pages) & (target >= 0) & (target < target_pages)
    read = (read_0, read_1, read_2)
    written = (written_0, written_1, written_2)
    read_pages = (read_page_0, read_page_1, read_page_2)
    written_pages = (written_page_0, written_page_1, written_page_2)
    for part in tl.static_range(PARTS):
        if (piece >= FIRSTS[part]) & (piece < FIRSTS[part + 1]) & is_copied:
            word = (piece - FIRSTS[part]) * WORDS + tl.arange(0, WORDS)
            is_word = word < SIZES[part]
            values = tl.load(
                row_pointers(read[part], source, read_pages[part], ALIGNED) + word, mask=is_word
            )
            tl.store(
                row_pointers(written[part], target, written_pages[part], ALIGNED) + word,
                values,
                mask=is_word,
            )


def pieces(problem: CopyProblem, config: Config) -> tuple[int, ...]:
    """The first piece of each part in a page, and the number of all."""
    return tuple(accumulate((cdiv(words, config.words) for words in problem.words), initial=0))


def variant(problem: CopyProblem, config: Config, device: Device) -> Variant:
    """The kernel for a problem: how many pages there are is not constant."""
    word = pointer_type(torch.int32 if problem.word_bytes == 4 else torch.uint8)
    tensors = [f"{kind}_{part}" for kind in ("read", "written") for part in PARTS]
    steps = [f"{kind}_page_{part}" for kind in ("read", "written") for part in PARTS]
    return Variant(
        copy_kernel,
        (
            *((name, word) for name in tensors),
            *((name, pointer_type(problem.id_dtype)) for name in ("sources", "targets")),
            *((name, "i64") for name in (*steps, "source_pages", "target_pages")),
        ),
        (
            ("SIZES", problem.words),
            ("FIRSTS", pieces(problem, config)),
            ("PARTS", len(problem.words)),
            ("WORDS", config.words),
            ("ALIGNED", problem.word_bytes == 4),
        ),
        frozenset(tensors) if problem.word_bytes == 4 else frozenset(),
        config.num_warps,
    )


def compile(problem: CopyProblem, config: Config, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, config, device).compile(device)


def launch(launcher: Launch, problem: CopyProblem, config: Config, tensors: CopyTensors) -> None:
    """Copies the pages."""
    steps = [
        [tensor.stride(0) * tensor.element_size() // problem.word_bytes for tensor in cache]
        for cache in (tensors.read, tensors.written)
    ]
    read, written = tensors.read, tensors.written
    if tensors.sources.device.type == "cpu":
        read, written = (
            [_words(tensor, problem.words[part], problem.word_bytes) for part, tensor in
             enumerate(cache)] for cache in (read, written)
        )  # fmt: skip
    absent = MOST_PARTS - len(problem.words)
    launcher(
        (problem.pages, pieces(problem, config)[-1], 1),
        [
            *read,
            *[None] * absent,
            *written,
            *[None] * absent,
            tensors.sources,
            tensors.targets,
            *steps[0],
            *[0] * absent,
            *steps[1],
            *[0] * absent,
            tensors.read[0].shape[0],
            tensors.written[0].shape[0],
        ],
    )


def _words(tensor: torch.Tensor, words: int, size: int) -> torch.Tensor:
    """The same memory as `[pages, words]` of so many bytes, as the interpreter wants it."""
    kind = torch.int32 if size == 4 else torch.uint8
    first = tensor.storage_offset() * tensor.element_size() // size
    step = tensor.stride(0) * tensor.element_size() // size
    made = torch.empty(0, dtype=kind)
    return made.set_(tensor.untyped_storage(), first, (tensor.shape[0], words), (step, 1))
