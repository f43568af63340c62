"""What of the timing can be seen without a GPU: how much is rotated, and that all is read."""

from __future__ import annotations

import torch

from mla_triton import timing


def test_rotation_outgrows_every_cache():
    for size in (0, 1, 10**6, 150 * 10**6, 10**9):
        copies = timing.cold_copies(size)
        assert copies >= 1
        assert copies * size >= timing.COLD_BYTES or size == 0
        assert (copies - 1) * size < timing.COLD_BYTES


def test_short_rotations_are_repeated_in_order():
    calls = [lambda: 0, lambda: 1, lambda: 2]
    fill = timing.MIN_GRAPH_MICROSECONDS
    said = [call() for call in timing.rotate(calls, fill / 5.5)]
    assert said == [0, 1, 2] * 6
    assert timing.rotate(calls, fill) == calls
    assert timing.rotate(calls, 100 * fill) == calls
    assert len(timing.rotate(calls, 0.0)) == 3 * fill


def test_reading_reads_every_element(device):
    source = torch.randint(1 << 10, (3 * timing.READ_BLOCK,), dtype=torch.int32, device=device)
    sums = torch.empty(3, dtype=torch.int32, device=device)
    timing.read(source, sums)
    assert sums.tolist() == source.view(3, -1).sum(1).tolist()
