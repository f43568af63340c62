"""The cache operators of `mla_triton.compat.vllm`, bit for bit: each token by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from mla_triton.cache import FP8_DS_MLA
from mla_triton.cache.quantise import pack, to_e4m3, unpack
from mla_triton.compat import vllm

LATENT, ROPE, PAGE_SIZE, PAGES = 128, 32, 16, 9
WIDTH = LATENT + ROPE
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HALVES = DTYPES[:2]
OLD = 0xA5
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def random_bytes(*shape: int, device: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)


def int32(values: Any, device: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def normal(*shape: int, dtype: torch.dtype, device: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


# -- tokens into the cache

SLOTS = [40, 3, -1, 143, 0, PAGES * PAGE_SIZE]


def rows_left(cache: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A cache in bytes, once tokens (bytes, too) are in their slots."""
    expected = torch.full_like(cache, OLD)
    for slot, token in zip(SLOTS, tokens, strict=True):
        if 0 <= slot < PAGES * PAGE_SIZE:
            expected[slot // PAGE_SIZE, slot % PAGE_SIZE] = token
    return expected


@by_dtype
@pytest.mark.parametrize("kind", ["fp8", "fp8_e4m3"])
@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("has_rope", [True, False])
def test_concat_with_one_scale(has_rope, stored, kind, dtype, device):
    """Some values are too large for the scale; there are rows behind the last slot."""
    rows = normal(len(SLOTS) + 2, WIDTH, dtype=dtype, device=device) * 10
    kv_c, k_pe = rows[:, :LATENT], rows[:, LATENT:]
    if not has_rope:
        kv_c, k_pe = rows, rows[:, WIDTH:]
    scale = torch.tensor(0.0421, device=device)
    cache = torch.full((PAGES, PAGE_SIZE, WIDTH), OLD, dtype=torch.uint8, device=device)
    slots = torch.tensor(SLOTS, device=device)
    assert vllm.concat_and_cache_mla(kv_c, k_pe, cache.view(stored), slots, kind, scale) is None
    numbers = to_e4m3(rows.float() * scale.reciprocal())
    assert (numbers.float().abs() == 448).any()
    expected = rows_left(cache, numbers[: len(SLOTS)].view(torch.uint8))
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("has_rope", [True, False])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_concat_into_656_bytes(slot_dtype, has_rope, device):
    """Scales are powers of two; without rotary keys theirs are zeros."""
    bfloat16 = {"dtype": torch.bfloat16, "device": device}
    kv_c = normal(len(SLOTS), 512, **bfloat16)
    k_pe = normal(len(SLOTS), 64 if has_rope else 0, seed=1, **bfloat16)
    cache = torch.full((PAGES, PAGE_SIZE, 656), OLD, dtype=torch.uint8, device=device)
    slots = torch.tensor(SLOTS, dtype=slot_dtype, device=device)
    scale = torch.tensor(0.5, device=device)
    vllm.concat_and_cache_mla(kv_c, k_pe, cache, slots, "fp8_ds_mla", scale)
    keys = k_pe if has_rope else torch.zeros(len(SLOTS), 64, **bfloat16)
    tokens = pack(FP8_DS_MLA, kv_c[:, None], keys[:, None])
    assert torch.equal(cache, rows_left(cache, tokens))
    scales = cache[0, 3, 512:528].cpu().view(torch.float32)
    largest = kv_c[1].cpu().float().unflatten(-1, (4, 128)).abs().amax(-1)
    assert torch.equal(scales, (largest / 448).log2().ceil().exp2())


def test_concat_of_a_cache_without_rotary_keys(device):
    kv_c = normal(len(SLOTS), WIDTH, dtype=torch.bfloat16, device=device)
    cache = torch.full((PAGES, PAGE_SIZE, 2 * WIDTH), OLD, dtype=torch.uint8, device=device)
    slots = torch.tensor(SLOTS, device=device)
    vllm.concat_and_cache_mla(
        kv_c, kv_c[:, :0], cache.view(torch.bfloat16), slots, "auto", torch.ones(1, device=device)
    )
    assert torch.equal(cache, rows_left(cache, kv_c.view(torch.uint8)))


# -- tokens out of the cache

LENGTHS = [20, 0, 1, 37]
STARTS = [3, 17, 5, 30]
SPARE = 3
Gather = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], None]


def check_gather(
    gather: Gather, tokens: torch.Tensor, dst: torch.Tensor, starts: Sequence[int] | None
) -> None:
    """Calls with a table that ends before the last request's keys, and has a page that is none.

    `tokens` are those of all slots, `[pages, page_size, columns]`, as they are to be in `dst`.
    """
    device = dst.device
    table = int32([[7, 2, 2**31 - 1], [0, 0, 0], [4, 5, 6], [1, 8, 3]], device)
    bounds = [0, *(sum(LENGTHS[: n + 1]) for n in range(len(LENGTHS)))]
    before = dst.clone().view(torch.uint8)
    assert len(dst) == bounds[-1] + SPARE
    gather(dst, table, int32(bounds, device), None if starts is None else int32(starts, device))
    got, of_slots = dst.view(torch.uint8), tokens.contiguous().view(torch.uint8)
    for request, (first, end) in enumerate(pairwise(bounds)):
        for row in range(first, end):
            key = row - first + (0 if starts is None else starts[request])
            page = int(table[request, key // PAGE_SIZE]) if key < 3 * PAGE_SIZE else -1
            if 0 <= page < PAGES:
                assert torch.equal(got[row], of_slots[page, key % PAGE_SIZE])
            else:
                assert (got[row] == 0).all()
    assert torch.equal(got[bounds[-1] :], before[bounds[-1] :])


by_starts = pytest.mark.parametrize("starts", [None, STARTS])


def rows_for(columns: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
    rows = sum(LENGTHS) + SPARE
    return random_bytes(rows, columns * dtype.itemsize, device=device, seed=3).view(dtype)


def finite_e4m3(*shape: int, device: Any) -> torch.Tensor:
    drawn = random_bytes(*shape, device=device)
    return drawn.masked_fill(drawn & 0x7F == 0x7F, 0)


@by_dtype
@by_starts
@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e4m3fn], ids=str)
def test_gather_with_one_scale(stored, starts, dtype, device):
    source = finite_e4m3(PAGES, PAGE_SIZE, WIDTH, device=device)
    scale = torch.tensor([0.0421], device=device)
    right = (source.view(torch.float8_e4m3fn).float() * scale).to(dtype)

    def gather(dst: torch.Tensor, table: Any, bounds: Any, firsts: Any) -> None:
        vllm.gather_and_maybe_dequant_cache(
            source.view(stored), dst, table, bounds, None, len(dst), "fp8", scale, firsts
        )

    check_gather(gather, right, rows_for(WIDTH, dtype, device), starts)


@by_dtype
@by_starts
def test_gather_of_what_is_not_quantised(starts, dtype, device):
    """The number of rows is a tensor, as vLLM's tests have it; NaN keep their bits."""
    source = random_bytes(PAGES, PAGE_SIZE, WIDTH * dtype.itemsize, device=device).view(dtype)
    count = torch.tensor(sum(LENGTHS), device=device)

    def gather(dst: torch.Tensor, table: Any, bounds: Any, firsts: Any) -> None:
        vllm.gather_and_maybe_dequant_cache(
            source, dst, table, bounds, table, count, "auto", None, firsts
        )

    check_gather(gather, source, rows_for(WIDTH, dtype, device), starts)


def packed_pages(device: Any) -> torch.Tensor:
    latent = normal(PAGES, PAGE_SIZE, 512, dtype=torch.float32, device=device)
    rope = normal(PAGES, PAGE_SIZE, 64, dtype=torch.float32, device=device, seed=1)
    pages = pack(FP8_DS_MLA, latent, rope, power_of_two=False)
    return pages.view(PAGES, PAGE_SIZE, 656)


@by_dtype
@by_starts
@pytest.mark.parametrize("name", ["gather_and_maybe_dequant_cache", "upconvert"])
def test_gather_of_656_bytes(name, starts, dtype, device):
    source = packed_pages(device)
    latent, rope = unpack(FP8_DS_MLA, source.flatten(1), PAGE_SIZE, dtype)
    assert rope is not None

    def gather(dst: torch.Tensor, table: Any, bounds: Any, firsts: Any) -> None:
        if name == "upconvert":
            # Its last request has all rows to the end.
            vllm.cp_gather_and_upconvert_fp8_kv_cache(
                source, dst[:-SPARE], table, bounds[:-1], len(table), firsts
            )
        else:
            vllm.gather_and_maybe_dequant_cache(
                source, dst, table, bounds, None, len(dst), "fp8_ds_mla", None, firsts
            )

    check_gather(gather, torch.cat([latent, rope], -1), rows_for(576, dtype, device), starts)


def test_gather_writes_no_more_rows_than_it_is_told(device):
    cache = normal(2, PAGE_SIZE, WIDTH, dtype=torch.bfloat16, device=device)
    dst = torch.full((9, WIDTH), 7.0, dtype=torch.bfloat16, device=device)
    table, bounds = int32([[1]], device), int32([0, 9], device)
    vllm.gather_and_maybe_dequant_cache(cache, dst, table, bounds, None, 4, "auto", None)
    assert torch.equal(dst[:4], cache[1, :4])
    assert (dst[4:] == 7.0).all()


@by_starts
@pytest.mark.parametrize(
    ("stored", "columns"),
    [(dtype, WIDTH) for dtype in (*DTYPES, torch.uint8, torch.float8_e4m3fn)]
    + [(torch.uint8, 656)],
    ids=str,
)
def test_gather_as_it_is(columns, stored, starts, device):
    """Any bits, in slots that are apart; tables and offsets of more requests than are asked for."""
    size = columns * stored.itemsize
    source = random_bytes(PAGES, PAGE_SIZE, size + 8, device=device)[..., 8:].view(stored)

    def gather(dst: torch.Tensor, table: Any, bounds: Any, firsts: Any) -> None:
        more = torch.cat([table, table])
        offsets = torch.cat([bounds, bounds + 10**6])
        if firsts is not None:
            firsts = torch.cat([firsts, firsts])
        vllm.cp_gather_cache(source, dst, more, offsets, len(table), firsts)

    check_gather(gather, source, rows_for(columns, stored, device), starts)


# -- in a compiled function


def test_compiled(device):
    """Into caches and out of them again, in one graph."""

    def step(kv_c: Any, k_pe: Any, fp8: Any, packed: Any, slots: Any, scale: Any, table: Any):
        bounds = torch.tensor([0, 5], dtype=torch.int32, device=device)
        rows = torch.zeros(2, 5, 576, dtype=torch.bfloat16, device=device)
        vllm.concat_and_cache_mla(kv_c, k_pe, fp8, slots, "fp8", scale)
        vllm.concat_and_cache_mla(kv_c, k_pe, packed, slots, "fp8_ds_mla", scale)
        vllm.gather_and_maybe_dequant_cache(fp8, rows[0], table, bounds, None, 5, "fp8", scale)
        vllm.cp_gather_and_upconvert_fp8_kv_cache(packed, rows[1], table, bounds, 1)
        return rows

    def given() -> tuple[torch.Tensor, ...]:
        return (
            normal(3, 512, dtype=torch.bfloat16, device=device),
            normal(3, 64, dtype=torch.bfloat16, device=device, seed=1),
            torch.zeros(2, 4, 576, dtype=torch.uint8, device=device),
            torch.zeros(2, 4, 656, dtype=torch.uint8, device=device),
            torch.tensor([0, 4, -1], device=device),
            torch.tensor(0.05, device=device),
            int32([[0, 1]], device),
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    rows = compiled(*given())
    assert torch.equal(rows, step(*given()))
    written = rows.any(-1)
    assert written.tolist() == [[True, False, False, False, True]] * 2


# -- pages


@by_half
@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_swap_blocks(index_dtype, gap, dtype, device):
    """Between two caches, and within one; the mapping is on the CPU."""
    shape = (PAGES, PAGE_SIZE + gap, WIDTH * dtype.itemsize)
    whole = [random_bytes(*shape, device=device, seed=seed) for seed in (0, 1)]
    kept = [one.clone() for one in whole]
    src, dst = (one.view(dtype)[:, :PAGE_SIZE] for one in whole)
    size = src.stride(0) * dtype.itemsize
    mapping = torch.tensor([[7, 0], [2, 8], [4, 4]], dtype=index_dtype)
    assert vllm.swap_blocks(src, dst, size, mapping) is None
    for source, target in mapping.tolist():
        kept[1][target, :PAGE_SIZE] = kept[0][source, :PAGE_SIZE]
    vllm.swap_blocks(src, src, size, mapping[:2])
    for source, target in mapping[:2].tolist():
        kept[0][target, :PAGE_SIZE] = kept[0][source, :PAGE_SIZE]
    assert torch.equal(whole[0], kept[0])
    assert torch.equal(whole[1], kept[1])


# -- what is refused

BYTES = torch.zeros(2, PAGE_SIZE, WIDTH, dtype=torch.uint8)
PACKED = torch.zeros(2, PAGE_SIZE, 656, dtype=torch.uint8)
ONE = torch.ones(())


def refused(function: Callable[..., None], given: dict[str, Any]) -> tuple[type, str]:
    with pytest.raises((NotImplementedError, TypeError, ValueError)) as raised:
        function(**given)
    return raised.type, str(raised.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            NotImplementedError,
            "kv_cache_dtype must be auto or fp8 or fp8_e4m3 or fp8_ds_mla, got fp8_e5m2",
        ),
        (
            {"kv_cache": BYTES, "kv_cache_dtype": "auto"},
            TypeError,
            "kv_cache must have kv_c's dtype torch.float16 where kv_cache_dtype is auto, "
            "got torch.uint8",
        ),
        (
            {"kv_cache": torch.zeros(2, PAGE_SIZE, WIDTH)},
            TypeError,
            "kv_cache must be uint8 or float8_e4m3fn where kv_cache_dtype is fp8, "
            "got torch.float32",
        ),
        (
            {"kv_cache": BYTES.flatten(1)},
            ValueError,
            "kv_cache must be [pages, page_size, columns], got shape (2, 2560)",
        ),
        ({"scale": None}, TypeError, "scale must be a torch.Tensor, got NoneType"),
        (
            {"scale": torch.ones(2)},
            ValueError,
            "scale must be one float32 number on kv_cache's device cpu, "
            "got torch.float32 of shape (2,) on cpu",
        ),
        (
            {"scale": torch.ones((), dtype=torch.float64)},
            ValueError,
            "scale must be one float32 number on kv_cache's device cpu, "
            "got torch.float64 of shape () on cpu",
        ),
        (
            {"kv_cache_dtype": "fp8_ds_mla"},
            ValueError,
            "kv_cache must be [pages, page_size, 656] with contiguous pages where kv_cache_dtype "
            "is fp8_ds_mla, got shape (2, 16, 160) and strides (2560, 160, 1)",
        ),
        (
            {"kv_cache_dtype": "fp8_ds_mla", "kv_cache": PACKED[:, ::2]},
            ValueError,
            "kv_cache must be [pages, page_size, 656] with contiguous pages where kv_cache_dtype "
            "is fp8_ds_mla, got shape (2, 8, 656) and strides (10496, 1312, 1)",
        ),
        (
            {"kv_cache_dtype": "fp8_ds_mla", "kv_cache": PACKED},
            NotImplementedError,
            "kv_c must be bfloat16, as the rotary keys of fp8_ds_mla, got torch.float16",
        ),
        ({"kv_c": None}, TypeError, "kv_c must be a torch.Tensor, got NoneType"),
    ],
)
def test_what_concat_refuses(changes, error, message):
    given = {
        "kv_c": torch.zeros(1, LATENT, dtype=torch.float16),
        "k_pe": torch.zeros(1, ROPE, dtype=torch.float16),
        "kv_cache": BYTES,
        "slot_mapping": torch.tensor([3]),
        "kv_cache_dtype": "fp8",
        "scale": ONE,
    }
    assert refused(vllm.concat_and_cache_mla, given | changes) == (error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_tokens": 6}, ValueError, "num_tokens must be 0 to 5, the rows of dst, got 6"),
        ({"num_tokens": -1}, ValueError, "num_tokens must be 0 to 5, the rows of dst, got -1"),
        ({"num_tokens": 2.0}, TypeError, "num_tokens must be an integer, got float"),
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            NotImplementedError,
            "kv_cache_dtype must be auto or fp8 or fp8_e4m3 or fp8_ds_mla, got fp8_e5m2",
        ),
        (
            {"kv_cache_dtype": "auto"},
            TypeError,
            "src_cache must have dst's dtype torch.bfloat16 where kv_cache_dtype is auto, "
            "got torch.uint8",
        ),
        (
            {"dst": torch.zeros(5)},
            ValueError,
            "dst must be [rows, columns], got shape (5,)",
        ),
    ],
)
def test_what_gather_refuses(changes, error, message):
    given = {
        "src_cache": BYTES,
        "dst": torch.zeros(5, WIDTH, dtype=torch.bfloat16),
        "block_table": int32([[1]], "cpu"),
        "cu_seq_lens": int32([0, 5], "cpu"),
        "token_to_seq": None,
        "num_tokens": 5,
        "kv_cache_dtype": "fp8",
        "scale": ONE,
    }
    assert refused(vllm.gather_and_maybe_dequant_cache, given | changes) == (error, message)


@pytest.mark.parametrize(
    ("src_cache", "dst", "error", "message"),
    [
        (
            BYTES,
            torch.zeros(5, WIDTH),
            TypeError,
            "dst must have src_cache's dtype torch.uint8, got torch.float32",
        ),
        (
            BYTES[..., :-1],
            BYTES[0, :, :-1],
            NotImplementedError,
            "src_cache must have tokens of an even number of bytes at even addresses, "
            "got shape (2, 16, 159) and strides (2560, 160, 1) from byte 0 on",
        ),
        (
            BYTES[..., 2:],
            BYTES[0, :, 1:-1],
            NotImplementedError,
            "dst must have tokens of an even number of bytes at even addresses, "
            "got shape (16, 158) and strides (160, 1) from byte 1 on",
        ),
    ],
)
def test_what_the_gather_as_it_is_refuses(src_cache, dst, error, message):
    given = {
        "src_cache": src_cache,
        "dst": dst,
        "block_table": int32([[1]], "cpu"),
        "cu_seq_lens": int32([0, 5], "cpu"),
        "batch_size": 1,
    }
    assert refused(vllm.cp_gather_cache, given) == (error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"batch_size": 2},
            ValueError,
            "batch_size must be 0 to 1, as tables and offsets are long, got 2",
        ),
        (
            {"batch_size": -1},
            ValueError,
            "batch_size must be 0 to 1, as tables and offsets are long, got -1",
        ),
        (
            {"block_table": int32([1], "cpu")},
            ValueError,
            "block_table must be [batch_size, max_pages], got shape (1,)",
        ),
    ],
)
@pytest.mark.parametrize("name", ["cp_gather_cache", "cp_gather_and_upconvert_fp8_kv_cache"])
def test_more_requests_than_there_are_are_refused(name, changes, error, message):
    """Of the one there are two rows in the table, of the other as many offsets too many."""
    given = {
        "src_cache": PACKED,
        "dst": torch.zeros(5, 656, dtype=torch.uint8),
        "block_table": int32([[1], [0]], "cpu"),
        "cu_seq_lens": int32([0, 5], "cpu"),
        "batch_size": 1,
    }
    if name != "cp_gather_cache":
        given["dst"] = torch.zeros(5, 576)
        given["block_table"] = int32([[1]], "cpu")
        del given["cu_seq_lens"]
        given["workspace_starts"] = int32([0, 3, 4], "cpu")
    assert refused(getattr(vllm, name), given | changes) == (error, message)


@pytest.mark.parametrize("name", ["host_cache", "host_row_ids", "device_row_ids"])
def test_keys_in_the_host_s_memory_are_refused(name):
    given = {
        "src_cache": PACKED,
        "dst": torch.zeros(5, 576, dtype=torch.bfloat16),
        "block_table": int32([[1]], "cpu"),
        "workspace_starts": int32([0], "cpu"),
        "batch_size": 1,
        name: PACKED,
    }
    expected = NotImplementedError, f"{name} must be None, got a tensor"
    assert refused(vllm.cp_gather_and_upconvert_fp8_kv_cache, given) == expected


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"dst": BYTES.to("meta")},
            NotImplementedError,
            "dst must be on src's device cpu, got meta",
        ),
        (
            {"block_size_in_bytes": 160},
            ValueError,
            "block_size_in_bytes must be that of src, 2560, got 160",
        ),
        (
            {"block_mapping": torch.tensor([0, 1])},
            ValueError,
            "block_mapping must be [pages to copy, 2], got shape (2,)",
        ),
    ],
)
def test_what_swap_blocks_refuses(changes, error, message):
    given = {
        "src": BYTES,
        "dst": BYTES,
        "block_size_in_bytes": PAGE_SIZE * WIDTH,
        "block_mapping": torch.tensor([[0, 1]]),
    }
    assert refused(vllm.swap_blocks, given | changes) == (error, message)
