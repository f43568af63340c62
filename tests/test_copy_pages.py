"""Copy of pages: whole pages and no others, of every form of cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_operators import fixed, launchers_made, needs_compiler, needs_kernels, no_waiting
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_triton
from mla_triton import LatentCache
from mla_triton import device as devices
from mla_triton.cache import FP8_V4
from mla_triton.kernels.common.launch import Launcher
from mla_triton.kernels.portable import copy_pages as portable
from mla_triton.ops import copy_pages as operation
from mla_triton.validate_copy import CopyCall, copy_of

KINDS = ("one tensor", "pair", "groups", "bytes", "odd bytes", "pages apart")


def made(kind: str, pages: int, page_size: int, seed: int = 0, device: Any = "cpu") -> Any:
    """A cache of random bytes."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(columns: int, dtype: torch.dtype, gap: int = 0) -> torch.Tensor:
        shape = (pages, page_size + gap, columns * dtype.itemsize)
        values = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return values.to(device).view(dtype)[:, :page_size]

    if kind == "one tensor":
        return tensor(96, torch.bfloat16)
    if kind == "pair":
        return LatentCache(tensor(64, torch.float32), tensor(16, torch.float32))
    if kind == "groups":
        parts = tensor(64, torch.uint8), tensor(16, torch.bfloat16), tensor(2, torch.float32)
        return LatentCache(parts[0].view(torch.float8_e4m3fn), *parts[1:])
    if kind == "bytes":
        return tensor(FP8_V4.page_bytes(page_size) // page_size // 16 * 16, torch.uint8)
    if kind == "odd bytes":
        return tensor(13, torch.uint8)
    return tensor(96, torch.bfloat16, gap=1)


def parts_of(cache: Any) -> list[torch.Tensor]:
    parts = [cache] if isinstance(cache, torch.Tensor) else [p for p in cache if p is not None]
    return [part.view(torch.uint8) for part in parts]


def clone(cache: Any) -> Any:
    """With what lies between pages."""
    if isinstance(cache, LatentCache):
        return LatentCache(*(None if part is None else clone(part) for part in cache))
    whole = torch.empty(0, dtype=cache.dtype, device=cache.device)
    whole = whole.set_(cache.untyped_storage()).clone()
    return whole.as_strided(cache.shape, cache.stride(), cache.storage_offset())


def storage(tensor: torch.Tensor) -> torch.Tensor:
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage())


@settings(max_examples=80)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1, 2, 5]),
    st.lists(st.tuples(st.integers(-2, 8), st.integers(-2, 8)), max_size=8),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([None, "reference"]),
)
def test_copies_are_a_loop_over_pairs(kind, pages, others, page_size, pairs, id_dtype, impl):
    targets = [target for _, target in pairs]
    pairs = [pair for n, pair in enumerate(pairs) if pair[1] not in targets[:n]]
    source, target = made(kind, pages, page_size), made(kind, others, page_size, seed=1)
    before = clone(target)
    ids = [torch.tensor([pair[n] for pair in pairs], dtype=id_dtype) for n in (0, 1)]
    mla_triton.copy_pages(source, target, *ids, impl=impl)
    for one, other, was in zip(*map(parts_of, (source, target, before)), strict=True):
        expected = was.clone()
        for from_page, to_page in pairs:
            if 0 <= from_page < pages and 0 <= to_page < others:
                expected[to_page] = one[from_page]
        assert torch.equal(other, expected)
        # What lies between the pages, too.
        inside = torch.zeros_like(storage(other))
        inside.as_strided(other.shape, other.stride(), other.storage_offset()).fill_(1)
        assert torch.equal(storage(other)[inside == 0], storage(was)[inside == 0])


@pytest.mark.parametrize("kind", KINDS)
def test_pages_of_one_cache(kind, device):
    """A request that branches: its pages to free ones, and a page onto itself."""
    cache = made(kind, 6, 4, device=device)
    before = clone(cache)
    source = torch.tensor([0, 2, 5], device=device)
    target = torch.tensor([1, 4, 5], device=device)
    mla_triton.copy_pages(cache, cache, source, target)
    for got, was in zip(parts_of(cache), parts_of(before), strict=True):
        assert torch.equal(got, was[[0, 0, 2, 3, 2, 5]])


@pytest.mark.parametrize("impl", [None, "reference"])
def test_numbers_outside_the_caches_are_left_out(impl, device):
    cache, other = (made("pair", 3, 2, seed, device) for seed in (0, 1))
    before = clone(other)
    for wrong in (-1, 3, 2**31, 2**62, -(2**63)):
        for source, target in ((wrong, 0), (0, wrong), (wrong, wrong)):
            ids = torch.tensor([[source], [target]], device=device)
            mla_triton.copy_pages(cache, other, ids[0], ids[1], impl=impl)
    for got, was in zip(parts_of(other), parts_of(before), strict=True):
        assert torch.equal(got, was)


def test_two_for_one_target_leave_one_of_them_in_each_piece(device):
    """And no other page is touched; the reference keeps the last."""
    cache = torch.arange(4, dtype=torch.int32, device=device).view(4, 1, 1).repeat(1, 64, 144)
    other = torch.full_like(cache, 9)
    source = torch.tensor([0, 1, 2], device=device)
    mla_triton.copy_pages(cache, other, source, torch.full_like(source, 3))
    assert other[3].unique().tolist() in [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]]
    assert (other[:3] == 9).all()
    mla_triton.copy_pages(cache, other, source, torch.full_like(source, 3), impl="reference")
    assert (other[3] == 2).all()


def test_two_scales_of_a_whole_cache_are_no_part_of_a_page(device):
    stored = torch.randint(255, (3, 2, 64), dtype=torch.uint8, device=device)
    scales = torch.tensor([1.0, 2.0], device=device)
    cache = LatentCache(stored.view(torch.float8_e4m3fn), None, scales)
    source, target = torch.tensor([0], device=device), torch.tensor([2], device=device)
    mla_triton.copy_pages(cache, cache, source, target)
    assert torch.equal(stored[2], stored[0])
    assert scales.tolist() == [1.0, 2.0]


def test_packed_pages_are_copied_with_their_scales(device):
    pages = torch.randint(256, (4, FP8_V4.page_bytes(8)), dtype=torch.uint8, device=device)
    expected = pages.clone()
    expected[3] = pages[1]
    source, target = torch.tensor([1], device=device), torch.tensor([3], device=device)
    mla_triton.copy_pages(pages, pages, source, target)
    assert torch.equal(pages, expected)


def test_configs_that_cannot_be_are_refused():
    device = devices.from_label("9.0")
    page, ids = torch.empty(2, 8, 64), torch.empty(3, dtype=torch.int64)
    known = [(t.dtype, t.device, t.shape, t.stride()) for t in (page, ids)]
    problem = copy_of(CopyCall((known[0],), (known[0],), ("",), known[1], known[1], True)).problem
    config, reason = portable.choose(problem, device)
    assert portable.is_valid(config, problem, device) == (True, "8192 bytes a program")
    assert reason.endswith("8192 bytes a program")
    for wrong, rule in (
        (portable.Config(3, 4), "words must be one of (512, 1024, 2048, 4096, 8192), got 3"),
        (portable.Config(2048, 3), "num_warps must be one of (1, 2, 4, 8), got 3"),
    ):
        assert portable.is_valid(wrong, problem, device) == (False, rule)


# -- as an operator


@needs_compiler
def test_opcheck(device):
    read, written = (made("one tensor", 3, 2, seed, device).view(torch.int16) for seed in (0, 1))
    ids = torch.tensor([1], device=device), torch.tensor([2], device=device)
    torch.library.opcheck(
        torch.ops.mla_triton.copy_pages.default, ([""], [read], [written], *ids, None)
    )


@needs_compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, device):
    cache = torch.randn(4, 2, 32, device=device)
    ids = torch.tensor([1], device=device), torch.tensor([2], device=device)

    def step(cache, source, target):
        before = cache.sum()
        mla_triton.copy_pages(cache, cache, source, target)
        return before, cache + 1

    expected, got = cache.clone(), cache.clone()
    results = step(expected, *ids), fixed(step, backend)(got, *ids)
    assert torch.equal(got, expected)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_memory(kind):
    cache = made(kind, 3, 2)
    ids = torch.tensor([1]), torch.tensor([2])
    with FakeTensorMode(allow_non_fake_inputs=True):
        mla_triton.copy_pages(cache, cache, *ids)
    if isinstance(cache, torch.Tensor):
        mla_triton.copy_pages(*(t.to("meta") for t in (cache, cache, *ids)))


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind, device, monkeypatch):
    cache, launched = made(kind, 3, 2, device=device), []
    ids = torch.tensor([1], device=device), torch.tensor([2], device=device)
    monkeypatch.setattr(Launcher, "__call__", lambda self, *_: launched.append(self))
    with monkeypatch.context() as patch:
        no_waiting(patch)
        mla_triton.copy_pages(cache, cache, *ids)
    assert len(launched) == 1


@needs_kernels
def test_calls_that_differ_in_size_share_their_kernels(device, monkeypatch):
    found = launchers_made(monkeypatch)
    operation.prepare.cache_clear()
    for count, pages in ((1, 3), (2, 4), (3, 9)):
        cache = made("pair", pages, 2, device=device)
        ids = torch.zeros(count, dtype=torch.int64, device=device)
        mla_triton.copy_pages(cache, made("pair", pages, 2, 1, device), ids, ids)
        if count == 1:
            found.clear()
    assert found == []
