"""Calls of append, gather and copy_pages with real tensors ask for kernels that a warm-up has."""

from __future__ import annotations

import engine_caches
import pytest

from mla_triton import device as devices
from mla_triton.kernels.common.launch import Variant
from mla_triton.kernels.portable import append
from mla_triton.tuning import cache_calls, warm
from mla_triton.tuning.deployment import Deployment, describe

PAGE_SIZE = 16
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


def asked_for(name: str, tokens: int) -> list[Variant]:
    """The kernels of an engine's calls with so many tokens."""
    return list(engine_caches.kernels_of(deployment(name), [tokens], CARD))


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
