"""What a cell is measured with: its inputs, the ceilings of the card, the clock of the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from cells import LATENT, ROPE, SOFTMAX_SCALE, SUSTAINED_SECONDS, Cell

from mla_triton import timing
from mla_triton.kernels.common.launch import Launcher
from mla_triton.ops import decode

COPY_BYTES = 4 << 30
MATMUL_SIZE = 8192
KERNEL_CALLS = 64
"""Launches of one short kernel in a graph."""


@dataclass(frozen=True)
class Inputs:
    """Everything one cell's calls read; what a baseline is given."""

    cell: Cell
    q: torch.Tensor
    """`[batch, s_q, heads, 576]`: latent part, then rope part."""
    caches: torch.Tensor
    """`[copies, pages, page_size, 576]`: each call works on one copy, so that it finds it cold."""
    page_table: torch.Tensor
    """`[batch, pages of the longest request]` int32, in random order; the same in every copy."""
    kv_lens: torch.Tensor
    """`[batch]` int32."""
    softmax_scale: float = SOFTMAX_SCALE
    latent: int = LATENT
    rope: int = ROPE

    @property
    def q_nope(self) -> torch.Tensor:
        return self.q[..., : self.latent]

    @property
    def q_rope(self) -> torch.Tensor:
        return self.q[..., self.latent :]


def make_inputs(cell: Cell, device: torch.device, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    pages_each = torch.tensor([-(-length // cell.page_size) for length in cell.lengths])
    pages = int(pages_each.sum())
    copies = timing.cold_copies(cell.cache_bytes)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    order = torch.randperm(pages, generator=generator, device=device).to(torch.int32)
    is_used = torch.arange(int(pages_each.max())) < pages_each[:, None]
    page_table = torch.zeros(is_used.shape, dtype=torch.int32, device=device)
    page_table[is_used.to(device)] = order
    return Inputs(
        cell,
        q=normal(cell.batch, cell.s_q, cell.heads, LATENT + ROPE),
        caches=normal(copies, pages, cell.page_size, LATENT + ROPE),
        page_table=page_table,
        kv_lens=torch.tensor(cell.lengths, dtype=torch.int32, device=device),
    )


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured limits of this card, in this run."""
    return {
        "read_gbps": timing.read_bandwidth(device) / 1e9,
        "copy_gbps": _copy_gbps(device),
        **_matmul_tflops(device),
    }


def _copy_gbps(device: torch.device) -> float:
    source = torch.randint(1 << 30, (COPY_BYTES // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    # A kernel: a plain copy inside a graph goes through the copy engine, which is slower.
    calls = [lambda: torch.bitwise_not(source, out=target)]
    return 2 * source.nbytes / timing.microseconds(calls) / 1e3


def _matmul_tflops(device: torch.device) -> dict[str, float]:
    """Of a burst, and of a load that goes on, at which a card is held to its power."""

    def operand() -> torch.Tensor:
        return torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=device)

    a, b, out = operand(), operand(), operand()
    calls = [lambda: torch.matmul(a, b, out=out)]
    flops = 2 * MATMUL_SIZE**3 / 1e6
    return {
        "matmul_tflops": flops / timing.microseconds(calls),
        "sustained_matmul_tflops": flops / sustained_microseconds(calls, SUSTAINED_SECONDS),
    }


def sustained_microseconds(calls: Sequence[Callable[[], object]], seconds: float) -> float:
    """Mean time of one call under a load that goes on for so long, at the clocks of then."""
    graph, count = timing.graph_of(calls, timing.glance_microseconds(calls))
    return timing.replay_mean_microseconds(graph, seconds) / count


def launches(call: Callable[[], object]) -> dict[str, Callable[[], None]]:
    """The kernels that a call launches, by name, each ready to be launched again on its own."""
    found: dict[str, Callable[[], None]] = {}
    launch = Launcher.__call__

    def record(launcher: Launcher, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        found[launcher.variant.function.__name__] = lambda: launch(launcher, grid, arguments)
        launch(launcher, grid, arguments)

    # A call that is recalled would not come by its launchers.
    decode.RECALLED.clear()
    with patch.object(Launcher, "__call__", record):
        call()
    return found


def kernel_microseconds(call: Callable[[], object], name: str) -> float:
    """Time of one kernel of a call, alone and back to back; 0 where the call does not launch it.

    It finds its inputs warm, as it does in a call: the kernel before it has just written them.
    """
    found = launches(call)
    return timing.microseconds([found[name]] * KERNEL_CALLS) if name in found else 0.0


def smallest_call(device: torch.device) -> Callable[[], object]:
    """One kernel through PyTorch's own dispatcher: what host times can be measured against."""
    number = torch.zeros(1, device=device)
    return lambda: number.add_(1)


def host_microseconds(call: Callable[[], object], calls: int = 400, group: int = 40) -> float:
    """Median host time of one call; the device is waited for only between groups, untimed."""
    times = []
    for i in range(calls):
        if i % group == 0:
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    torch.cuda.synchronize()
    return statistics.median(times) / 1e3
