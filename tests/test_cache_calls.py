"""Calls of append, gather and copy_pages with real tensors ask for kernels that a warm-up has."""

from __future__ import annotations

import pytest
import torch

from mla_triton import configs
from mla_triton import device as devices
from mla_triton.cache import named
from mla_triton.cache.formats import E4M3
from mla_triton.cache.pages import LatentCache
from mla_triton.kernels.common.launch import Variant
from mla_triton.kernels.portable import append, copy_pages, gather
from mla_triton.tuning import cache_calls, warm
from mla_triton.tuning.deployment import Deployment, describe
from mla_triton.validate_append import append as check_append
from mla_triton.validate_copy import cache_parts
from mla_triton.validate_copy import copy_pages as check_copy
from mla_triton.validate_gather import gather as check_gather

PAGES, PAGE_SIZE = 3, 16
CARD = devices.from_label("8.9")
DESCRIPTIONS = {
    "16bit": {},
    "16bit pair": {"layout": "pair", "dtype": "float16"},
    "float32": {"dtype": "float32"},
    "fp8": {"cache_format": "fp8", "append": ["plain", "half"]},
    "fp8 pair": {"cache_format": "fp8", "layout": "pair"},
    "fp8_ds_mla": {"cache_format": "fp8_ds_mla", "table": ["csr"]},
    "fp8_v4": {"cache_format": "fp8_v4", "model": "DeepSeek-V4-Flash"},
    "fp8_v41": {"cache_format": "fp8_v41", "model": "DeepSeek-V4-Flash", "append": "half"},
    "no rope": {"rope": 0},
}


def deployment(name: str) -> Deployment:
    options = {"heads": 8, "max_batch": 1, "max_len": 64, "page_size": PAGE_SIZE}
    return describe(**options, **DESCRIPTIONS[name])


def cache_of(name: str, what: Deployment) -> tuple[torch.Tensor | None, LatentCache]:
    """Memory as an engine has it."""
    form, width = what.cache_formats[0], what.latent + what.rope
    if form in named.PACKED:
        pages = torch.zeros(PAGES, named.page_bytes(form, PAGE_SIZE, width), dtype=torch.uint8)
        return pages, named.parts(form, pages, PAGE_SIZE)
    kind = what.dtypes[0] if form == "16bit" else E4M3
    scales = None if form == "16bit" else torch.ones(2)

    def zeros(columns: int) -> torch.Tensor:
        return torch.zeros(PAGES, PAGE_SIZE, columns, dtype=torch.float32).to(kind)

    if what.layouts == ("pair",):
        return None, LatentCache(zeros(what.latent), zeros(what.rope), scales)
    return None, LatentCache(zeros(width), None, scales)


def asked_for(name: str, tokens: int) -> list[Variant]:
    """The kernels of an engine's calls with so many tokens."""
    what = deployment(name)
    packed, cache = cache_of(name, what)
    latent, rope, dtype = what.latent, what.rope, what.dtypes[0]
    projected = torch.zeros(tokens, latent + rope, dtype=dtype)
    keys = projected[:, latent:] if rope else None
    slots = torch.zeros(tokens, dtype=torch.int64)
    plain = (cache, projected[:, :latent], keys, slots)
    asked = []
    if "plain" in what.appends:
        asked.append((append, check_append(*plain, None, None, None, "interleaved", True)))
    for style in what.appends:
        if style != "plain":
            for angles in (torch.float32, dtype):
                table = torch.zeros(40, rope, dtype=angles) if rope else None
                positions = slots if rope else None
                weight = torch.ones(latent, dtype=dtype)
                problem = check_append(*plain, weight, table, positions, style, True)
                asked.append((append, problem))
    if "csr" in what.tables:
        indices, indptr = torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    else:
        indices, indptr = torch.zeros(2, 2, dtype=torch.int32), None
    bounds, starts = torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    for first in (None, starts):
        out = torch.zeros(tokens, latent, dtype=dtype)
        rope_out = torch.zeros(tokens, rope, dtype=dtype) if rope else None
        problem = check_gather(cache, indices, indptr, bounds, first, out, rope_out)
        asked.append((gather, problem))
        if cache.kpe is None and what.cache_formats != ("fp8",):
            whole = torch.zeros(tokens, latent + rope, dtype=dtype)
            problem = check_gather(cache, indices, indptr, bounds, first, whole, None)
            asked.append((gather, problem))
    moved = cache_parts(cache if packed is None else packed, "cache")
    parts = list(moved.values())
    others = [torch.zeros_like(part) for part in parts]
    asked.append((copy_pages, check_copy(list(moved), parts, others, slots[:2], slots[:2])))
    return [
        module.variant(problem, configs.choose(module, problem, CARD).config, CARD)
        for module, problem in asked
    ]


@pytest.mark.parametrize("tokens", [1, 1024, 1025])
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_every_kernel_of_a_call_is_warmed_up(name, tokens):
    known = set(warm.variants(deployment(name), CARD))
    missing = [warm.name_of(each) for each in asked_for(name, tokens) if each not in known]
    assert missing == []


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_no_kernel_is_compiled_that_no_call_asks_for(name):
    asked = {each for tokens in (1, 1025) for each in asked_for(name, tokens)}
    kernels = {each.function for each in asked}
    warmed = {v for v in warm.variants(deployment(name), CARD) if v.function in kernels}
    assert {warm.name_of(each) for each in warmed - asked} == set()


def test_lines_tell_kernels_apart():
    warmed = warm.variants(deployment("16bit"), CARD)
    names = [warm.name_of(v) for v in warmed if "append" in v.function.__name__]
    assert len(set(names)) == len(names) > 1


def test_without_a_plain_append_there_is_none():
    only = describe(heads=8, append="half")
    assert {problem.rotation for problem in cache_calls.appends(only)} == {"half"}


def test_a_cache_that_no_kernel_appends_to_is_warmed_up_without(monkeypatch):
    monkeypatch.setattr(append, "why_not", lambda problem, device: "no")
    warmed = warm.variants(deployment("16bit"), CARD)
    names = {v.function.__name__ for v in warmed}
    assert "append_kernel" not in names
    assert {"gather_kernel", "copy_kernel", "decode_kernel"} <= names
