"""Caches by the names of their formats: what a problem over one is, and what fills one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_triton import validate
from mla_triton.cache import LatentCache, named
from mla_triton.cache.formats import E4M3
from mla_triton.cache.quantise import dequantise
from mla_triton.testing import compilation, decode_inputs

QUANTISED = named.CACHE_FORMATS[1:]


def problem(name, **changes):
    """A problem over a 16-bit cache, of widths that a format serves."""
    inside = name in ("fp8_v4", "fp8_v41")
    dimensions = compilation.ROPE_INSIDE if inside else compilation.DIMENSIONS[0]
    return replace(compilation.problem(dimensions=dimensions), **changes)


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_problem_is_that_of_a_call(name, page_size):
    plain = problem(name, page_size=page_size)
    inputs = decode_inputs(
        kv_lens=[40], heads=plain.heads, latent=plain.latent, value_dim=plain.value_dim,
        page_size=page_size, stored=name,
    )  # fmt: skip
    buffers = inputs.output_buffers()
    call = validate.decode(
        inputs.q_nope, inputs.q_rope, *inputs.cache, inputs.page_table, None, inputs.kv_lens, None,
        buffers["out"], buffers["lse"], softmax_scale=1.0, causal=True, value_dim=plain.value_dim,
        max_kv_len=None, allow_tf32=False,
    )  # fmt: skip
    made = named.over(plain, name)
    for what in ("storage", "fused", "ckv_stride_slot", "kpe_stride_slot", "aligned"):
        assert getattr(made, what) == getattr(call, what), what
    assert named.name_of(made) == name


def test_a_16_bit_cache_is_a_format_too():
    plain = problem("16bit")
    assert named.over(plain, "16bit") is plain
    assert named.name_of(plain) == "16bit"
    assert list(named.over_storage(plain, "16bit")) == [plain]


@pytest.mark.parametrize("name", QUANTISED)
def test_the_storage_of_a_tuned_row_is_found_by_its_name(name):
    plain = problem(name)
    storage = named.over(plain, name).storage
    (found,) = named.over_storage(plain, storage.name)
    assert found.storage.name == storage.name
    assert (found.storage.group, found.storage.scale) == (storage.group, storage.scale)


@pytest.mark.parametrize("name", ["fp8-100-float32", "fp8-0-e8m0", "fp8-128-int8", "fp4", ""])
def test_other_names_have_no_storage(name):
    assert list(named.over_storage(problem("16bit"), name)) == []


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fp4", {}, "cache_format must be one of 16bit, fp8, fp8_ds_mla, fp8_v4, fp8_v41, got "),
        ("fp8", {"dtype": torch.float32}, "cache_format must be 16bit for float32, got fp8"),
        ("fp8_ds_mla", {"dtype": torch.float16}, "dtype must be bfloat16 where cache_format is fp"),
        ("fp8_ds_mla", {"rope": 32}, "cache_format must be one for keys of 512 + 32 with values "),
        ("fp8_v41", {"value_dim": 448}, "cache_format must be one for keys of 448 + 64 with val"),
    ],
)
def test_what_is_refused(name, changes, message):
    with pytest.raises(ValueError, match="cache_format") as error:
        named.over(problem(name, **changes), name)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_filled_cache_holds_normal_keys(name, monkeypatch):
    """A part at a time, and no two parts alike."""
    page_size, pages, columns = 16, 7, problem(name).key_dim
    size = named.page_bytes(name, page_size, columns)
    monkeypatch.setattr(named, "CHUNK_BYTES", 3 * size)
    raw = torch.full((pages, size), 0x7F, dtype=torch.uint8)
    named.fill(name, raw, page_size, columns, torch.Generator().manual_seed(0))
    cache = named.parts(name, raw, page_size)
    assert isinstance(cache, LatentCache)
    assert cache.ckv.dtype == E4M3
    rope = columns - 512 if name == "fp8" else 0
    numbers = [part for part in dequantise(cache, rope=rope) if part is not None]
    keys = torch.cat(numbers, -1)
    assert keys.shape == (pages, page_size, columns)
    assert keys.isfinite().all()
    assert abs(float(keys.mean())) < 0.05
    assert abs(float(keys.std()) - 1) < 0.05
    assert len(keys.flatten(1).unique(dim=0)) == pages
