"""The operations of a cache on the GPU in this machine: byte for byte the CPU's reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_append import append, described
from test_formats import CODES, value
from test_gather import gather_inputs, same_bits

import mla_triton
from mla_triton import LatentCache
from mla_triton import device as devices
from mla_triton.cache import FP8_DS_MLA
from mla_triton.cache.quantise import to_e4m3
from mla_triton.kernels.portable import append as portable_append
from mla_triton.kernels.portable import copy_pages as portable_copy
from mla_triton.kernels.portable import gather as portable_gather
from mla_triton.ops import append as append_operation
from mla_triton.ops import copy_pages as copy_operation
from mla_triton.ops import gather as gather_operation
from mla_triton.testing.caches import FORMS, PACKED, append_excess, append_inputs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
by_form = pytest.mark.parametrize("form", FORMS)


def differs(**recipe: Any) -> int:
    """Bytes in which what the GPU leaves is another than what the reference does on the CPU."""
    written = append(append_inputs(**recipe, device="cuda")).to("cpu")
    return written.differs(append_inputs(**recipe).expected())


@by_form
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 128, 3000])
def test_appends_byte_for_byte(tokens, dtype, form):
    pages = 60 if tokens > 128 else 5
    for power_of_two in (True, False):
        for slot_dtype in (torch.int32, torch.int64):
            assert not differs(
                form=form, tokens=tokens, dtype=dtype, pages=pages, page_size=64,
                power_of_two=power_of_two, slot_dtype=slot_dtype,
            )  # fmt: skip


@by_form
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("strided", [0, 16, 3])
def test_layouts(strided, page_size, form):
    """Rows that begin at multiples of 16 bytes and such that do not, around canaries."""
    for tokens in (20, 1500):
        assert not differs(
            form=form, tokens=tokens, page_size=page_size, pages=40,
            strided=0 if form in PACKED else strided,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (256, 64), (256, 32), (128, 32), (96, 1)])
def test_widths_and_dtypes(latent, rope, cache_dtype, dtype):
    for form in ("fused", "pair"):
        assert not differs(
            form=form, latent=latent, rope=rope, dtype=dtype, cache_dtype=cache_dtype, tokens=70
        )


@by_form
@pytest.mark.parametrize("scale", [1e-38, 1e-3, 300.0, 1e35])
def test_magnitudes(scale, form):
    assert not differs(form=form, scale=scale, dtype=torch.float32, cache_dtype=torch.float32)


def stored_codes(values: torch.Tensor) -> torch.Tensor:
    """What the GPU makes of float32 numbers, as bytes of e4m3, on the CPU."""
    rows = values.cuda().reshape(-1, 16)
    stored = torch.zeros(1, len(rows), 16, dtype=torch.uint8, device="cuda")
    cache = LatentCache(stored.view(torch.float8_e4m3fn), None, torch.ones(2, device="cuda"))
    mla_triton.append(cache, rows, None, torch.arange(len(rows), device="cuda"))
    return stored.flatten().cpu()


def test_every_bfloat16_and_every_tie_is_rounded_as_the_reference_does():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    numbers = torch.tensor([value(code) for code in CODES])
    middle = (numbers[1:] + numbers[:-1]) / 2
    ends = (float("inf"), -float("inf"))
    near = torch.cat([middle, *(torch.nextafter(middle, torch.tensor(end)) for end in ends)])
    every = torch.cat([every, near, -near])
    every = torch.cat([every, every.new_zeros(-len(every) % 16)])
    assert torch.equal(stored_codes(every), to_e4m3(every).view(torch.uint8))


def test_the_software_of_older_cards_gives_the_same_bytes(monkeypatch):
    """Compiled for this card."""
    for module in (portable_append, portable_gather):
        monkeypatch.setattr(module, "converts_e4m3", lambda device: False)
    for operation in (append_operation, gather_operation):
        operation.prepare.cache_clear()
    test_every_bfloat16_and_every_tie_is_rounded_as_the_reference_does()
    for form in FORMS:
        assert not differs(form=form, tokens=200, pages=20)
        gathers_like_the_reference(form=form)
    for operation in (append_operation, gather_operation):
        operation.prepare.cache_clear()


@by_form
def test_nan_and_infinity(form):
    made = [
        append_inputs(form=form, dtype=torch.float32, cache_dtype=torch.float32, device=device)
        for device in ("cuda", "cpu")
    ]
    for inputs in made:
        for n, strange in enumerate([float("nan"), float("inf"), -float("inf"), 3e38, -0.0]):
            inputs.latent[n::5, 3::97] = strange
            # In 16 bit a NaN has many forms.
            inputs.rope[n::5, 5::31] = 0.0 if strange != strange else strange
    assert append(made[0]).to("cpu").differs(made[1].expected()) == 0


@by_form
@pytest.mark.parametrize("tokens", [5, 2000])
def test_slots_outside_the_cache(tokens, form):
    inputs = append_inputs(form=form, tokens=tokens, device="cuda")
    for wrong in (-1, inputs.memory.capacity, 2**31, 2**62, -(2**63)):
        inputs.slots[:] = wrong
        assert append(inputs).differs(inputs.memory) == 0


@by_form
def test_tokens_with_one_slot(form):
    """Each byte is that of one of them; no other slot is touched."""
    tokens = 300
    inputs = append_inputs(form=form, tokens=tokens, device="cuda")
    inputs.slots.copy_(torch.arange(tokens) % 3 + 7)
    got = append(inputs)
    alone = []
    for first in range(0, tokens, 3):
        few = append_inputs(form=form, tokens=tokens, device="cuda")
        few.slots.fill_(-1)
        few.slots[first : first + 3] = inputs.slots[first : first + 3]
        alone.append(append(few))
    for place, buffer in enumerate(got.buffers):
        untouched = inputs.memory.buffers[place]
        candidates = torch.stack([memory.buffers[place] for memory in alone])
        writes = (candidates != untouched).any(0)
        assert torch.equal(buffer[~writes], untouched[~writes])
        assert (candidates == buffer).any(0)[writes].all()


@by_form
@pytest.mark.parametrize("norm", [None, *DTYPES])
@pytest.mark.parametrize("rotation", [None, "interleaved", "half"])
def test_norm_and_rotation(rotation, norm, form):
    for tokens in (7, 1500):
        for dtype in DTYPES:
            recipe = {
                "form": form, "tokens": tokens, "pages": 30, "page_size": 64, "dtype": dtype,
                "norm": norm, "rotation": rotation, "angles": norm or torch.float32,
            }  # fmt: skip
            got = append(append_inputs(**recipe, device="cuda")).to("cpu")
            assert append_excess(got, append_inputs(**recipe)) <= 0


def test_equal_bits_run_to_run():
    inputs = append_inputs(
        form="fp8_ds_mla", tokens=3000, pages=60, page_size=64, norm=torch.bfloat16,
        rotation="half", device="cuda",
    )  # fmt: skip
    first = append(inputs)
    assert all(append(inputs).differs(first) == 0 for _ in range(20))


def test_a_cuda_graph_appends_what_is_there_at_each_replay():
    inputs = append_inputs(form="fp8_ds_mla", tokens=40, device="cuda")
    made = inputs.fresh()
    arguments, options = made.call_arguments()
    append(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_triton.append(*arguments, **options)
    for seed in (1, 2):
        other = append_inputs(form="fp8_ds_mla", tokens=40, seed=seed, device="cuda")
        for name in ("latent", "rope", "slots"):
            getattr(made, name).copy_(getattr(other, name))
        for buffer, clean in zip(made.memory.buffers, other.memory.buffers, strict=True):
            buffer.copy_(clean)
        graph.replay()
        assert made.memory.differs(append(other)) == 0


def test_pages_past_two_to_the_31_elements():
    """A cache of more than 2**31 numbers, and its last slots are right."""
    page_size, columns = 64, 576
    pages = 2**31 // (page_size * columns) + 20
    needed = pages * page_size * columns * 2
    if torch.cuda.mem_get_info()[0] < needed + 2**30:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")
    cache = torch.zeros(pages, page_size, columns, dtype=torch.bfloat16, device="cuda")
    tokens = torch.randn(30, columns, dtype=torch.bfloat16, device="cuda")
    slots = torch.arange(pages * page_size - 30, pages * page_size, device="cuda")
    mla_triton.append(cache, tokens[:, :512], tokens[:, 512:], slots)
    assert torch.equal(cache.view(-1, columns)[-30:], tokens)
    assert not cache.view(-1, columns)[:-30].any()
    table = torch.tensor([[pages - 1]], dtype=torch.int32, device="cuda")
    bounds = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    rows, _ = mla_triton.gather(cache, table, bounds, rows=64)
    assert torch.equal(rows, cache[-1])
    ids = torch.tensor([pages - 1], device="cuda"), torch.tensor([pages - 3], device="cuda")
    mla_triton.copy_pages(cache, cache, *ids)
    assert torch.equal(cache[-3], cache[-1])


# -- gather


def gathers_like_the_reference(**recipe: Any) -> None:
    got = gather_inputs(**recipe, device="cuda").call()
    expected = gather_inputs(**recipe).expected()
    assert same_bits([None if t is None else t.cpu() for t in got], expected)


@by_form
@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (9, 0, 20, 1), (700, 0, 2, 900, 64), (3,) * 300])
def test_gathers_bit_for_bit(lengths, csr, form):
    for starts in (None, tuple(n % 7 - 2 for n in range(len(lengths)))):
        for page_size in (1, 16, 64):
            gathers_like_the_reference(
                form=form, csr=csr, lengths=lengths, starts=starts, page_size=page_size
            )


@by_form
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [0, 16, 3])
def test_gathered_dtypes_and_layouts(strided, dtype, form):
    for cache_dtype in DTYPES:
        gathers_like_the_reference(
            form=form, dtype=dtype, cache_dtype=cache_dtype, lengths=(50, 7),
            strided=0 if form in PACKED else strided,
        )  # fmt: skip


def test_hostile_offsets():
    for csr in (False, True):
        inputs = gather_inputs(csr=csr, lengths=(3, 5, 4), starts=(0, 0, 0), device="cuda")
        for wrong in ([5, -7, 2**31 - 1, 3], [2**31 - 1] * 4, [-(2**31)] * 4, [9, 6, 3, 0]):
            inputs.cu_seqlens_k.copy_(torch.tensor(wrong))
            inputs.starts.copy_(torch.tensor([2**31 - 1, -(2**31), 5]))
            if csr:
                inputs.table.indptr.copy_(torch.tensor(wrong))
            inputs.call()
            torch.cuda.synchronize()


# -- copy of pages


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("size", [16, 656, 41984, 37440, 13, 1001])
def test_pages_are_copied(size, id_dtype):
    source, target = (
        torch.randint(256, (50, size), dtype=torch.uint8, device="cuda") for _ in range(2)
    )
    ids = [torch.randperm(60)[:40].to(id_dtype) - 5 for _ in range(2)]
    expected = target.clone()
    for from_page, to_page in zip(*(i.tolist() for i in ids), strict=True):
        if 0 <= from_page < 50 and 0 <= to_page < 50:
            expected[to_page] = source[from_page]
    mla_triton.copy_pages(source, target, *(i.cuda() for i in ids))
    assert torch.equal(target, expected)


def test_pages_of_a_pair_and_of_groups():
    def cache() -> LatentCache:
        sizes = [(20, 64, n) for n in (512, 128, 16)]
        parts = [torch.randint(256, size, dtype=torch.uint8, device="cuda") for size in sizes]
        kinds = (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
        return LatentCache(*(p.view(kind) for p, kind in zip(parts, kinds, strict=True)))

    one, other = cache(), cache()
    ids = torch.tensor([3, 19, 0], device="cuda"), torch.tensor([0, 1, 19], device="cuda")
    mla_triton.copy_pages(one, other, *ids)
    for read, written in zip(one, other, strict=True):
        assert torch.equal(written.view(torch.uint8)[ids[1]], read.view(torch.uint8)[ids[0]])


# -- configs


@pytest.mark.parametrize("form", ["fused", "fp8_ds_mla", "fp8_v4", "fp8_v41", "one"])
def test_every_config_is_right(form, monkeypatch):
    """Those that the heuristic never takes here, too."""
    device = devices.current()
    tried = 0
    for rows in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4):
            config = portable_append.Config(rows, warps)
            for module in (portable_append, portable_gather):
                monkeypatch.setattr(module, "choose", lambda *_, config=config: (config, ""))
            for operation in (append_operation, gather_operation):
                operation.prepare.cache_clear()
            inputs = append_inputs(form=form, tokens=77, rotation="half", device="cuda")
            if not portable_append.is_valid(config, described(inputs), device)[0]:
                continue
            assert append_excess(append(inputs).to("cpu"), append_inputs(**inputs.recipe)) <= 0
            gathers_like_the_reference(form=form)
            tried += 1
    for operation in (append_operation, gather_operation):
        operation.prepare.cache_clear()
    assert tried > 8


@pytest.mark.parametrize("words", portable_copy.PIECES)
def test_every_piece_of_a_page(words, monkeypatch):
    for warps in portable_copy.WARPS:
        config = portable_copy.Config(words, warps)
        monkeypatch.setattr(portable_copy, "choose", lambda *_, config=config: (config, ""))
        copy_operation.prepare.cache_clear()
        for size in (41984, 1001):
            test_pages_are_copied(size, torch.int64)
    copy_operation.prepare.cache_clear()


def test_another_stream_and_the_operator():
    inputs = append_inputs(form="fp8_ds_mla", device="cuda")
    expected = append(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = append(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert there.differs(expected) == 0


def test_the_reference_is_never_taken_by_itself():
    odd = torch.zeros(2, 4, 96, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    cache = LatentCache(odd, None, torch.zeros(2, 4, 2, device="cuda"))
    tokens, slots = torch.randn(3, 96, device="cuda"), torch.arange(3, device="cuda")
    with pytest.raises(NotImplementedError, match=r"^no implementation of append can run on "):
        mla_triton.append(cache, tokens, None, slots)
    mla_triton.append(cache, tokens, None, slots, impl="reference")
    assert cache.scales[0, :3].all()


def test_packed_pages_of_an_engine():
    """vLLM's `[pages, page_size, 656]`, and a layer of a tensor of all layers."""
    layers = torch.zeros(3, 9, 64, 656, dtype=torch.uint8, device="cuda")
    tokens = torch.randn(100, 576, dtype=torch.bfloat16, device="cuda")
    slots = torch.randperm(9 * 64, device="cuda")[:100]
    mla_triton.append(FP8_DS_MLA.views(layers[1], 64), tokens[:, :512], tokens[:, 512:], slots)
    assert layers[1].view(-1, 656)[slots].any(1).all()
    assert not layers[::2].any()
