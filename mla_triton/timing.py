"""How long GPU work takes, in the protocol of every figure this package prints.

The calls to be timed are captured into one CUDA graph, so that the host is out of the figure; each
call works on inputs of its own, together larger than any L2 cache, so that it finds them cold; the
graph is replayed, each replay timed by events, and the median replay is divided by the calls.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

COLD_BYTES = 200_000_000
"""Bytes to go through before an input is used again: more than three times a Hopper's L2."""
MIN_GRAPH_MICROSECONDS = 1000
"""What a graph takes at least, so that its own start weighs little."""
BURST_MICROSECONDS = 30_000
"""Replays go on for about so long: a longer load would make a card lower its clocks."""
GLANCES = 3
MIN_REPLAYS, MAX_REPLAYS = 5, 200
READ_BYTES = 8 << 30
READ_BLOCK = 16384
"""int32 elements of one program: 64 KiB, all of it in flight at once with 8 warps."""


def cold_copies(bytes_per_call: int) -> int:
    """How many copies of inputs of this size make a rotation that the L2 cannot hold."""
    return max(1, -(-COLD_BYTES // max(1, bytes_per_call)))


def rotate(
    calls: Sequence[Callable[[], object]], microseconds_once: float
) -> list[Callable[[], object]]:
    """The calls, which take so long together, repeated in order until they fill one graph."""
    return list(calls) * max(1, math.ceil(MIN_GRAPH_MICROSECONDS / max(microseconds_once, 1.0)))


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls; the first is called once before, to compile what they launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_microseconds(
    graph: torch.cuda.CUDAGraph, burst_microseconds: float = BURST_MICROSECONDS
) -> float:
    """Median time of one replay, over one burst of them."""
    (probe,) = _replay_times(graph, 1)
    wanted = int(burst_microseconds / max(probe, 1.0))
    return statistics.median(_replay_times(graph, min(max(wanted, MIN_REPLAYS), MAX_REPLAYS)))


def replay_mean_microseconds(graph: torch.cuda.CUDAGraph, seconds: float) -> float:
    """Mean time of a replay, over as many without a pause as take so long."""
    (probe,) = _replay_times(graph, 1)
    replays = max(1, round(seconds * 1e6 / max(probe, 1.0)))
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / replays


def _replay_times(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    graph.replay()
    events = []
    for _ in range(replays):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def glance_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """About the time of one call: of few replays, and of no more calls than are given."""
    return min(_replay_times(capture(calls), GLANCES)) / len(calls)


def graph_of(
    calls: Sequence[Callable[[], object]], microseconds_each: float
) -> tuple[torch.cuda.CUDAGraph, int]:
    """(a graph of the calls in rotation, how many calls that makes)."""
    many = rotate(calls, microseconds_each * len(calls))
    return capture(many), len(many)


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call; the calls must be enough to keep each other's inputs cold."""
    graph, count = graph_of(calls, glance_microseconds(calls))
    return replay_microseconds(graph) / count


@triton.jit
def _read(source, sums, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + program, tl.sum(tl.load(source + offsets), 0))


def read(source: torch.Tensor, sums: torch.Tensor) -> None:
    """Reads int32 `source` once: `sums[i]` is the sum of its i-th `READ_BLOCK` elements."""
    _read[(source.numel() // READ_BLOCK,)](source, sums, BLOCK=READ_BLOCK, num_warps=8)


def read_bandwidth(device: torch.device, size: int = READ_BYTES) -> float:
    """Measured bytes per second of reading and reducing a large buffer."""
    free, _ = torch.cuda.mem_get_info(device)
    programs = max(1, min(size, free // 2) // (4 * READ_BLOCK))
    source = torch.randint(1 << 30, (programs * READ_BLOCK,), dtype=torch.int32, device=device)
    sums = torch.empty(programs, dtype=torch.int32, device=device)
    return source.nbytes / (microseconds([lambda: read(source, sums)]) * 1e-6)
