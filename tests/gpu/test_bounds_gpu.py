"""Caches, strides, rows and lengths past what 31 and 32 bits can count, on the GPU in this machine.

What lies past the bound is small and known: pages behind gigabytes that hold NaN, which no kernel
may read and none may write. The result has to be, bit for bit, that over the same pages alone. A
test has at most about 20 GB of GPU memory, and most have 5 to 9.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from quantised_forms import FORMS
from ways import WAYS, is_refused, run

import mla_triton
from mla_triton import AttentionState, select
from mla_triton import device as devices
from mla_triton.cache import FP8_DS_MLA, CSRPageTable, LatentCache
from mla_triton.cache.formats import E4M3
from mla_triton.cache.quantise import pack, quantise
from mla_triton.testing import (
    DecodeInputs,
    PrefillInputs,
    append_inputs,
    assert_same_bits,
    assert_within_budget,
    decode_budget,
    decode_inputs,
    gather_inputs,
    problem_of,
    same_bits,
)
from mla_triton.testing.caches import FORMS as CACHE_FORMS

GIGABYTE = 2**30
BYTES, ELEMENTS = 2**32, 2**31
BF16, F16 = torch.bfloat16, torch.float16
LENGTH = 1_000_000


def needs(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * GIGABYTE:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def untouched(memory: torch.Tensor) -> bool:
    """Whether all of these bytes are still what `far` has put there."""
    words = memory[: len(memory) // 8 * 8].view(torch.int64)
    return all(bool((part == -1).all()) for part in words.split(2**27))


class Far:
    """The pages of a cache behind so many others that the first of them begins past 2**32 bytes,
    and past 2**31 elements, of its latents. What is before them is NaN in every dtype."""

    def __init__(self, cache: torch.Tensor | LatentCache) -> None:
        parts = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
        ckv = parts.ckv
        step = ckv.stride(0) * ckv.element_size()
        elements = max(ELEMENTS, BYTES // ckv.element_size())
        self.first = 16 * (elements // (16 * ckv.stride(0)) + 1)
        assert self.first * step > BYTES
        self.memories: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        moved = LatentCache(*map(self._moved, parts))
        self.cache = moved.ckv if isinstance(cache, torch.Tensor) else moved

    def _moved(self, tensor: torch.Tensor | None) -> Any:
        if tensor is None or tensor.dim() == 1:
            return tensor
        storage = tensor.untyped_storage()
        before = self.first * tensor.stride(0) * tensor.element_size()
        if storage.data_ptr() not in self.memories:
            near = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            far = torch.full((before + len(near),), 255, dtype=torch.uint8, device=tensor.device)
            far[before:] = near
            self.memories[storage.data_ptr()] = (far[:before], far)
        _, far = self.memories[storage.data_ptr()]
        shape = (self.first + len(tensor), *tensor.shape[1:])
        # It need not be a whole number of elements, which a view of its bytes would have to be.
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        whole = whole.set_(far.untyped_storage())
        return whole.as_strided(shape, tensor.stride(), tensor.storage_offset())

    def pages(self, table: Any, count: int) -> Any:
        """A page table of the near cache, which has so many pages."""
        if isinstance(table, CSRPageTable):
            return table._replace(indices=self.pages(table.indices, count))
        inside = (table >= 0) & (table <= count)
        return torch.where(inside, table + self.first, table)

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was written before the pages."""
        return all(untouched(before) for before, _ in self.memories.values())

    def behind(self, storage: torch.Tensor) -> torch.Tensor:
        """The bytes that were those of a near tensor."""
        before, far = self.memories[storage.untyped_storage().data_ptr()]
        return far[len(before) :]


def page_count(cache: torch.Tensor | LatentCache) -> int:
    return len(cache if isinstance(cache, torch.Tensor) else cache.ckv)


def same_in(inputs: DecodeInputs, *others: DecodeInputs) -> int:
    """Each way decodes them to the same bits, within the budget; how many ways took them."""
    took = 0
    for way in WAYS:
        if is_refused(inputs, way):
            continue
        expected = run(inputs, way, **inputs.output_buffers())
        assert_within_budget(expected, inputs)
        for other in others:
            assert not is_refused(other, way)
            assert_same_bits(expected, run(other, way, **other.output_buffers()))
        took += 1
    return took


def only_portable(inputs: DecodeInputs, *others: DecodeInputs) -> int:
    """`same_in` for problems that another kernel may be right to refuse, or to compute by other
    steps: by the portable one to the same bits, by others within the budget."""
    took = 0
    for way in WAYS:
        for other in others:
            if is_refused(other, way):
                continue
            state = run(other, way, **other.output_buffers())
            assert_within_budget(state, inputs)
            if way.impl == "portable":
                assert_same_bits(run(inputs, way, **inputs.output_buffers()), state)
            took += 1
    return took


# -- far pages


@pytest.mark.parametrize(
    "recipe",
    [
        {"layout": "pair"},
        {"layout": "pair", "dtype": F16, "page_size": 1},
        {"table": "csr", "page_size": 16},
        *FORMS.values(),
        {"stored": "fp8", "page_size": 16, "table": "csr"},
    ],
    ids=str,
)
def test_decode_from_pages_past_two_to_the_32_bytes(recipe):
    """Of pages of 16 bits in one tensor: `test_a_cache_of_more_than_2_to_the_31_elements`."""
    needs(8)
    for heads in (16, 128):
        inputs = decode_inputs(kv_lens=[700, 0, 65], heads=heads, device="cuda", **recipe)
        far = Far(inputs.cache)
        table = far.pages(inputs.page_table, page_count(inputs.cache))
        moved = replace(inputs, cache=far.cache, page_table=table)
        assert same_in(inputs, moved) >= 1
        del far, moved


@pytest.mark.parametrize("form", CACHE_FORMS)
def test_append_to_pages_past_two_to_the_32_bytes(form):
    """Byte for byte what is appended to the same pages alone, and nothing before them."""
    needs(8)
    page_size = 64
    for tokens, more in ((30, {}), (300, {"norm": BF16, "rotation": "half"})):
        inputs = append_inputs(
            form=form, tokens=tokens, page_size=page_size, pages=6, device="cuda", **more
        )
        far, near = Far(inputs.memory.cache), inputs.fresh()
        slots = inputs.slots
        inside = (slots >= 0) & (slots <= inputs.memory.capacity)
        slots = torch.where(inside, slots + far.first * page_size, slots)
        mla_triton.append(far.cache, inputs.latent, inputs.rope, slots, **inputs.options)
        arguments, options = near.call_arguments()
        mla_triton.append(*arguments, **options)
        for storage, expected in zip(inputs.memory.buffers, near.memory.buffers, strict=True):
            assert torch.equal(far.behind(storage), expected)
        assert far.is_untouched
        del far


@pytest.mark.parametrize("form", CACHE_FORMS)
def test_gather_from_pages_past_two_to_the_32_bytes(form):
    needs(8)
    for csr in (False, True):
        inputs = gather_inputs(
            form=form, csr=csr, lengths=(300, 0, 64, 1), page_size=64, device="cuda"
        )
        far = Far(inputs.cache)
        table = far.pages(inputs.table, page_count(inputs.cache))
        moved = inputs._replace(cache=far.cache, table=table)
        assert same_bits(moved.call(), inputs.call())
        del far, moved


def test_copy_of_pages_past_two_to_the_32_bytes():
    """Both ways, and within the far end."""
    needs(8)
    size = FP8_DS_MLA.page_bytes(64)
    count = BYTES // size + 40
    pages = torch.full((count, size), 255, dtype=torch.uint8, device="cuda")
    expected = torch.randint(255, (6, size), dtype=torch.uint8, device="cuda")
    pages[-3:], pages[:3] = expected[3:], expected[:3]
    source = torch.tensor([count - 1, 0, count - 2, count, -1], device="cuda")
    target = torch.tensor([4, count - 9, count - 20, 5, 6], device="cuda")
    mla_triton.copy_pages(pages, pages, source, target)
    for source_page, target_page in ((count - 1, 4), (0, count - 9), (count - 2, count - 20)):
        assert torch.equal(pages[target_page], pages[source_page])
    assert torch.equal(torch.cat([pages[:3], pages[-3:]]), expected)
    pages[[4, count - 9, count - 20]] = 255
    assert untouched(pages[3:-3].flatten())


# -- pages, slots and rows that are far apart


def apart(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same values so far apart, with NaN between them; the last dimension stays together."""
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, strides, strict=True)) + 1
    size = tensor.element_size()
    memory = torch.full((reach * size,), 255, dtype=torch.uint8, device=tensor.device)
    # Row by row and as bytes: not everything copies tensors of such strides, or of e4m3.
    for place in product(*map(range, tensor.shape[:-1])):
        first = size * sum(n * step for n, step in zip(place, strides[:-1], strict=True))
        row = tensor[place].contiguous().view(torch.uint8)
        memory[first : first + len(row)] = row
    return memory.view(tensor.dtype).as_strided(tensor.shape, strides)


def in_two_pages(tensor: torch.Tensor, place: int, step: int) -> torch.Tensor:
    """A page as the second of two that are so many elements apart; the first is NaN."""
    pages = torch.full_like(tensor[:2].view(torch.uint8), 255).view(tensor.dtype)
    pages.view(torch.uint8)[1] = tensor[place].view(torch.uint8)
    return apart(pages, (step, tensor.shape[2], 1))


def one_page(**recipe: Any) -> tuple[DecodeInputs, int]:
    """A request of the keys of one page, and which page that is."""
    inputs = decode_inputs(kv_lens=[100], page_size=128, device="cuda", **recipe)
    return inputs, int(inputs.page_table[0, 0])


def in_second_page(inputs: DecodeInputs, cache: torch.Tensor | LatentCache) -> DecodeInputs:
    table = torch.full_like(inputs.page_table, 2**31 - 1)
    table[0, 0] = 1
    return replace(inputs, cache=cache, page_table=table)


@pytest.mark.parametrize("heads", [16, 40])
def test_pages_more_than_two_to_the_31_elements_apart(heads):
    """A whole number of slots, and 16 bytes more than that, which is none: the Hopper kernel then
    copies row by row."""
    needs(10)
    inputs, place = one_page(heads=heads)
    step = 576 * (ELEMENTS // 576 + 1)
    for more in (0, 8):
        cache = in_two_pages(inputs.cache, place, step + more)
        judge = only_portable if more else same_in
        assert judge(inputs, in_second_page(inputs, cache)) >= 1
        del cache


@pytest.mark.parametrize("recipe", [{"dtype": F16}, {"stored": "fp8"}], ids=str)
def test_pages_of_a_pair_more_than_two_to_the_31_elements_apart(recipe):
    """Latents alone as slots lie, and both past the bound, which is no one row of slots."""
    needs(14)
    inputs, place = one_page(heads=40, layout="pair", **recipe)
    slots = ELEMENTS // 512 + 1
    ckv = in_two_pages(inputs.cache.ckv, place, 512 * slots)
    for kpe_step in (64 * slots, ELEMENTS + 64):
        kpe = in_two_pages(inputs.cache.kpe, place, kpe_step)
        moved = in_second_page(inputs, inputs.cache._replace(ckv=ckv, kpe=kpe))
        judge = same_in if kpe_step < ELEMENTS else only_portable
        assert judge(inputs, moved) >= 1
        del kpe, moved


@pytest.mark.parametrize(
    ("recipe", "page_size"), [({"stored": "fp8"}, 128), ({"dtype": F16}, 80)], ids=str
)
def test_slots_of_a_page_past_two_to_the_31_elements(recipe, page_size):
    needs(8)
    inputs = decode_inputs(
        kv_lens=[page_size], heads=20, page_size=page_size, device="cuda", **recipe
    )
    place, step = int(inputs.page_table[0, 0]), 2**25
    assert (page_size - 1) * step > ELEMENTS
    parts = LatentCache(inputs.cache) if isinstance(inputs.cache, torch.Tensor) else inputs.cache
    page = parts.ckv[place : place + 1]
    ckv = apart(page, (page_size * step, step, 1))
    table = torch.zeros_like(inputs.page_table)
    cache = ckv if parts.scales is None else parts._replace(ckv=ckv)
    assert only_portable(inputs, replace(inputs, cache=cache, page_table=table)) >= 1


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["requests", "tokens", "heads"])
def test_queries_and_results_more_than_two_to_the_31_elements_apart(axis):
    needs(14)
    inputs = decode_inputs(kv_lens=[100, 70], s_q=2, heads=2, page_size=64, device="cuda")
    strides = [4 * 512, 2 * 512, 512, 1]
    strides[axis] = ELEMENTS + 512
    moved = replace(inputs, q_nope=apart(inputs.q_nope, tuple(strides)))
    out = apart(torch.full_like(inputs.q_nope, float("nan")), tuple(strides))
    lse = torch.empty(2, 2, 2, device="cuda")
    for way in WAYS:
        if is_refused(inputs, way):
            continue
        expected = run(inputs, way)
        out.fill_(float("nan"))
        state = run(moved, way, out=out, lse=lse)
        assert_within_budget(expected, inputs)
        assert_within_budget(AttentionState(state.out.clone(), state.lse), inputs)


def test_rows_of_a_page_table_more_than_two_to_the_31_elements_apart():
    needs(10)
    inputs = decode_inputs(kv_lens=[100, 700], heads=40, page_size=64, device="cuda")
    table = apart(inputs.page_table, (ELEMENTS + 64, 1))
    assert same_in(inputs, replace(inputs, page_table=table)) >= 1


# -- as many rows and keys


def counted(first: int, count: int, columns: int) -> torch.Tensor:
    """bfloat16 `[count, columns]`: small whole numbers that tell rows apart."""
    rows = torch.arange(first, first + count, device="cuda")[:, None]
    return ((rows * 31 + torch.arange(columns, device="cuda") * 7) % 251).to(BF16)


def test_gather_and_append_of_more_than_two_to_the_31_elements():
    """All pages of a cache in reverse order into rows, and back."""
    needs(12)
    size, columns, step = 64, 576, 2**16
    pages = ELEMENTS // (size * columns) + 5
    rows = pages * size
    cache = torch.empty(pages, size, columns, dtype=BF16, device="cuda")
    flat = cache.view(rows, columns)
    for first in range(0, rows, step):
        part = flat[first : first + step]
        part.copy_(counted(first, len(part), columns))
    order = torch.arange(pages - 1, -1, -1, dtype=torch.int32, device="cuda")
    bounds = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
    found, _ = mla_triton.gather(cache, order[None], bounds, rows=rows)
    assert found.numel() > ELEMENTS
    for first in range(0, rows, step):
        part = found[first : first + step]
        place = order[first // size : (first + len(part)) // size].long() * size
        slots = (place[:, None] + torch.arange(size, device="cuda")).flatten()
        assert torch.equal(part, flat[slots]), first
    cache.fill_(float("nan"))
    slots = (order.long()[:, None] * size + torch.arange(size, device="cuda")).flatten()
    mla_triton.append(cache, found[:, :512], found[:, 512:], slots)
    for first in range(0, rows, step):
        part = flat[first : first + step]
        assert torch.equal(part, counted(first, len(part), columns)), first


def long_cache(stored: str, pages: int, owned: torch.Tensor, last: torch.Tensor) -> Any:
    """Pages of 64 keys, NaN in those that nobody owns; the last key owned is `last`."""
    generator = torch.Generator("cuda").manual_seed(0)
    width = FP8_DS_MLA.page_bytes(64) if stored == "fp8_ds_mla" else 64 * 576
    kind = BF16 if stored == "16bit" else torch.uint8
    made = torch.empty(pages, width, dtype=kind, device="cuda")
    scales = torch.tensor([5.5, 5.5], device="cuda") / 448
    is_owned = torch.zeros(pages, dtype=torch.bool, device="cuda")
    is_owned[owned] = True
    last_page, last_slot = owned[-1], (LENGTH - 1) % 64
    for first in range(0, pages, 1024):
        count = min(1024, pages - first)
        keys = torch.randn(count, 64, 576, generator=generator, device="cuda")
        keys[~is_owned[first : first + count]] = float("nan")
        if first <= last_page < first + count:
            keys[last_page - first, last_slot] = last
            keys[last_page - first, last_slot + 1 :] = float("nan")
        ckv, kpe = keys[..., :512], keys[..., 512:]
        if stored == "16bit":
            packed = keys.to(BF16)
        elif stored == "fp8":
            like = LatentCache(torch.empty(1, 1, 576, dtype=E4M3, device="cuda"), None, scales)
            packed = quantise(ckv, kpe, like, False).ckv.view(torch.uint8)
        else:
            packed = pack(FP8_DS_MLA, ckv, kpe)
        made[first : first + count] = packed.flatten(1)
    if stored == "fp8_ds_mla":
        return FP8_DS_MLA.views(made, 64)
    if stored == "fp8":
        return LatentCache(made.view(E4M3).view(pages, 64, 576), None, scales)
    return made.view(pages, 64, 576)


@pytest.mark.parametrize("stored", ["16bit", "fp8", "fp8_ds_mla"])
def test_a_request_of_a_million_tokens(stored):
    """Beside one of 37. Half of the heads look for the very last key, and see little else.

    The oracle is of three heads: of a million keys it takes about 15 GB.
    """
    needs(24)
    generator = torch.Generator("cuda").manual_seed(1)
    used = -(-LENGTH // 64)
    order = torch.randperm(used + 9, generator=generator, device="cuda")
    owned, short = order[:used], order[used]
    direction = torch.randn(576, generator=generator, device="cuda")
    query = torch.randn(2, 1, 128, 576, generator=generator, device="cuda")
    query[:, :, 1::2] = query[:, :, 1::2] * 0.3 + direction
    query = query.to(BF16)
    table = torch.full((2, used), 2**31 - 1, dtype=torch.int32, device="cuda")
    table[0], table[1, 0] = owned.int(), short.int()
    ours = torch.cat([short[None], owned])
    inputs = DecodeInputs(
        query[..., :512], query[..., 512:], long_cache(stored, used + 9, ours, direction), table,
        torch.tensor([LENGTH, 37], dtype=torch.int32, device="cuda"), 192**-0.5,
    )  # fmt: skip
    for heads, chosen in ((16, [0, 7, 15]), (128, [0, 64, 127])):
        whole = some_heads(inputs, list(range(heads)))
        part = some_heads(inputs, chosen)
        budget = decode_budget(part)
        # The last key of the long request is seen: it is what these heads look for.
        assert budget.exact.lse[0, 0, -1] > budget.exact.lse[0, 0, 0] + 5
        took = 0
        for way in WAYS if stored == "16bit" else WAYS[:2]:
            if is_refused(whole, way):
                continue
            first, again = (run(whole, way, **whole.output_buffers()) for _ in range(2))
            assert_same_bits(first, again)
            found = AttentionState(first.out[:, :, chosen], first.lse[:, :, chosen])
            assert_within_budget(found, part, budget)
            took += 1
        assert took >= 1


def some_heads(inputs: DecodeInputs, chosen: list[int]) -> DecodeInputs:
    assert inputs.q_rope is not None
    nope, rope = (q[:, :, chosen].contiguous() for q in (inputs.q_nope, inputs.q_rope))
    return replace(inputs, q_nope=nope, q_rope=rope)


@pytest.mark.parametrize("impl", ["portable", "sm90"])
def test_a_prompts_chunk_over_a_million_keys(impl):
    """Keys and values of more than 2**31 elements each; some heads are judged, one at a time."""
    needs(24)
    heads, k_lens, q_lens = 16, (9, ELEMENTS // (16 * 128) + 500), (7, 40)
    assert k_lens[1] > LENGTH
    generator = torch.Generator("cuda").manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=BF16)

    q, k = normal(sum(q_lens), heads, 192), normal(sum(k_lens), heads, 128)
    v, k_rope = normal(sum(k_lens), heads, 128), normal(sum(k_lens), 64)
    # Half of the heads look for a key near the end of the long sequence.
    k[-45, 1::2] = normal(128)
    q[7:, 1::2, :128] = q[7:, 1::2, :128] * 0.3 + k[-45, 1::2]
    assert k.numel() > ELEMENTS
    bounds = [
        torch.tensor([0, lens[0], sum(lens)], dtype=torch.int32, device="cuda")
        for lens in (q_lens, k_lens)
    ]
    whole = PrefillInputs(q, k, v, *bounds, 192**-0.5, k_rope=k_rope)
    problem: Any = problem_of(whole)
    if select.why_not_sm90_prefill(problem, devices.current(), "sm90") and impl == "sm90":
        pytest.skip("the Hopper kernel needs capability 9.0")
    arguments, options = whole.call_arguments()
    state = mla_triton.prefill(*arguments, **options, **whole.output_buffers(), impl=impl)
    for head in (0, heads - 1):
        part = replace(
            whole, q=q[:, head : head + 1], k=k[:, head : head + 1], v=v[:, head : head + 1]
        )
        found = AttentionState(state.out[:, head : head + 1], state.lse[:, head : head + 1])
        assert_within_budget(found, part)
