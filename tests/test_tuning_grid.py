"""Which points and configs the tuner would try: a list that needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import CARD

from mla_triton import configs
from mla_triton.kernels.sm90 import decode as sm90
from mla_triton.tuning import tuner
from mla_triton.tuning.tuner import list_work

SMALL: dict[str, Any] = {"heads": 16, "max_batch": 4, "max_len": 2048}
POINTS = 4
"""Of `SMALL`, in one dtype and form."""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No rows of this machine."""
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path))
    configs.forget()
    yield
    configs.forget()


def work(**changes: Any) -> tuple[list[tuner.Work], int]:
    return list_work(device=CARD, **SMALL | changes)


def grid(**changes: Any) -> set[tuple[int, int]]:
    return {(each.point.batch, each.point.length) for each in work(**changes)[0]}


def test_the_grid_is_powers_of_four_and_the_largest():
    assert grid() == {(1, 512), (1, 2048), (4, 512), (4, 2048)}
    batches = {batch for batch, _ in grid(max_batch=100)}
    assert batches == {1, 4, 16, 64, 100}
    lengths = {length for _, length in grid(max_len=100_000)}
    assert lengths == {512, 2048, 8192, 32768, 131072}
    assert grid(max_batch=1, max_len=100) == {(1, 128)}


def test_a_grid_of_ones_own():
    assert grid(batches=[3, 3, 7], lengths=[1, 1000, 1024, 1025]) == {
        (batch, length) for batch in (3, 7) for length in (1, 1024, 2048)
    }
    assert grid(batches=[512], lengths=[8192]) == {(512, 8192)}


@pytest.mark.parametrize("name", ["batches", "lengths"])
@pytest.mark.parametrize("size", [0, -1, 1.5, "4", True, None])
def test_sizes_that_are_none(name, size):
    with pytest.raises(ValueError, match=f"^{name} must be positive whole numbers, got {size!r}$"):
        work(**{name: [1, size]})


def test_points_are_distinct_and_the_largest_come_first():
    found, _ = work(dtype=["float16", "bfloat16"], page_size=[64, 128, 16], s_q=[1, 2, 5, 6])
    points = [each.point for each in found]
    assert len(points) == len(set(points)) == 2 * 2 * 3 * POINTS
    for dtype in (torch.float16, torch.bfloat16):
        sizes = [tuner.decode.bytes_of(e.problem) for e in found if e.problem.dtype == dtype]
        assert sizes == sorted(sizes, reverse=True)
    dtypes = [each.problem.dtype for each in found]
    assert dtypes == sorted(dtypes, key=str), "memory of one dtype is made once"
    for each in found:
        key, batch, length = each.implementation.tuning_point(each.problem, CARD)
        assert each.point == ("decode", each.implementation.NAME, key, batch, length)
    assert {each.point.impl for each in found} == {"portable", "sm90"}


@pytest.mark.parametrize("label", ["8.0", "8.9", "9.0", "12.0", "gfx942"])
def test_candidates_are_valid_and_the_pruned_are_not(label):
    device = tuner.card_of(label)
    found, _ = list_work(
        device=label, heads=128, s_q=[1, 2], page_size=[1, 64], max_batch=16, max_len=512
    )
    assert found
    for each in found:
        for config in each.candidates:
            assert each.implementation.is_valid(config, each.problem, device)[0]
        for config, why in each.pruned:
            assert each.implementation.is_valid(config, each.problem, device) == (False, why)
            assert "bytes of shared memory" in why or each.implementation is sm90
        space = set(each.implementation.search_space(each.problem, device))
        tried = set(each.candidates) | {config for config, _ in each.pruned}
        assert tried == space | {each.heuristic, each.incumbent}
        assert each.candidates[0] == each.heuristic
        assert len(tried) == len(each.candidates) + len(each.pruned)
    assert label == "9.0" or any(each.pruned for each in found)
