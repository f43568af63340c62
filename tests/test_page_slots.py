"""Whether all pages of a cache are one evenly spaced row of slots, as a TMA descriptor needs it."""

from __future__ import annotations

import pytest
import torch

from mla_triton import validate
from mla_triton.cache import FP8_DS_MLA, LatentCache
from mla_triton.cache.formats import E4M3
from mla_triton.problem import DecodeProblem

PAGE, LATENT, ROPE = 64, 512, 64
WIDTH = LATENT + ROPE
F32 = torch.float32


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problem_of(cache: torch.Tensor | LatentCache, rope: int = ROPE) -> DecodeProblem:
    """A call of one request over a cache, as far as the host knows it."""
    ckv, kpe, scales = validate.unpack_cache(cache)
    return validate.decode(
        made(1, 1, 20, LATENT),
        made(1, 1, 20, rope) if rope else None,
        ckv,
        kpe,
        scales,
        made(1, 2, dtype=torch.int32),
        None,
        made(1, dtype=torch.int32),
        None,
        made(1, 1, 20, LATENT),
        made(1, 1, 20, dtype=F32),
        softmax_scale=1.0,
        causal=True,
        value_dim=None,
        max_kv_len=None,
        allow_tf32=False,
        has_memory=False,
    )


def slots(cache: torch.Tensor | LatentCache, rope: int = ROPE) -> int:
    return problem_of(cache, rope).page_slots


def strided(shape: tuple[int, int, int], page_step: int, slot_step: int) -> torch.Tensor:
    return made(10**6).as_strided(shape, (page_step, slot_step, 1))


@pytest.mark.parametrize("page", [1, 16, 48, 64, 192])
def test_a_contiguous_cache(page):
    assert slots(made(9, page, WIDTH)) == page


def test_one_page():
    assert slots(made(1, PAGE, WIDTH)) == PAGE
    assert slots(made(9, PAGE, WIDTH)[4:5]) == PAGE


def test_a_layer_of_a_cache_of_all_layers():
    assert slots(made(9, 61, PAGE, WIDTH)[:, 7]) == 61 * PAGE
    assert slots(made(61, 9, PAGE, WIDTH)[7]) == PAGE


def test_padding_between_pages():
    """Whole slots of it are slots that no page has; anything else is uneven."""
    assert slots(made(9, PAGE + 3, WIDTH)[:, :PAGE]) == PAGE + 3
    assert slots(strided((5, PAGE, WIDTH), PAGE * WIDTH + 8, WIDTH)) == 0


def test_padding_between_slots():
    assert slots(made(9, PAGE, WIDTH + 8)[..., :WIDTH]) == PAGE
    assert slots(made(9, PAGE, 2, WIDTH)[:, :, 1]) == PAGE


def test_other_strides_change_nothing_that_code_is_made_of():
    wide = problem_of(made(9, PAGE, WIDTH + 8)[..., :WIDTH])
    assert (wide.ckv_stride_slot, wide.page_slots) == (WIDTH + 8, PAGE)


def test_slots_or_pages_that_overlap():
    """What a kernel reads through strides may be anything; a descriptor's rows are apart."""
    assert slots(strided((5, PAGE, WIDTH), PAGE * WIDTH, WIDTH - 64)) == 0
    assert slots(strided((5, PAGE, WIDTH), (PAGE - 1) * WIDTH, WIDTH)) == 0
    assert slots(strided((5, PAGE, WIDTH), 0, WIDTH)) == 0


def test_a_slot_that_is_every_page():
    """Slots of a page further apart than the pages are."""
    assert slots(made(PAGE, 9, WIDTH).transpose(0, 1)) == 0


def test_a_pair_of_equal_spacing():
    assert slots(LatentCache(made(9, PAGE, LATENT), made(9, PAGE, ROPE))) == PAGE
    both = made(9, PAGE, WIDTH)
    assert slots(LatentCache(both[..., :LATENT], both[..., LATENT:])) == PAGE
    layers = made(9, 61, PAGE, LATENT)[:, 3], made(9, 61, PAGE, ROPE)[:, 3]
    assert slots(LatentCache(*layers)) == 61 * PAGE


def test_a_pair_of_unequal_spacing():
    """A page's first slot is looked up once, for both."""
    assert slots(LatentCache(made(9, PAGE + 1, LATENT)[:, :PAGE], made(9, PAGE, ROPE))) == 0
    assert slots(LatentCache(made(9, 61, PAGE, LATENT)[:, 3], made(9, PAGE, ROPE))) == 0
    uneven = strided((9, PAGE, ROPE), PAGE * ROPE + 8, ROPE)
    assert slots(LatentCache(made(9, PAGE, LATENT), uneven)) == 0


def test_a_cache_without_rotary_keys():
    assert slots(made(9, PAGE, LATENT), rope=0) == PAGE
    assert slots(LatentCache(made(9, PAGE, LATENT), None), rope=0) == PAGE


def test_scales_of_tokens_lie_in_the_same_slots():
    packed = FP8_DS_MLA.views(made(9, PAGE * 656, dtype=torch.uint8), PAGE)
    assert slots(packed) == PAGE
    every_layer = made(9, 61, PAGE * 656, dtype=torch.uint8)
    # Pages of a layer are contiguous, and so is every page of all layers.
    assert slots(FP8_DS_MLA.views(every_layer[:, 7], PAGE)) == 61 * PAGE
    apart = made(9, PAGE, 4, dtype=F32)
    pair = LatentCache(made(9, PAGE, LATENT, dtype=E4M3), made(9, PAGE, ROPE), apart)
    assert slots(pair) == PAGE
    assert slots(pair._replace(scales=made(9, PAGE + 1, 4, dtype=F32)[:, :PAGE])) == 0
    assert slots(packed._replace(scales=apart)) == PAGE
    assert slots(packed._replace(scales=made(9, PAGE + 1, 4, dtype=F32)[:, 1:])) == 0


def test_one_scale_for_all_tokens_lies_in_no_slot():
    assert slots(LatentCache(made(9, PAGE, WIDTH, dtype=E4M3), None, made(2, dtype=F32))) == PAGE
