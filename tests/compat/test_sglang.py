"""`mla_triton.compat.sglang` has SGLang's conventions, and refuses what it does not have."""

from __future__ import annotations

from typing import Any

import pytest
import rival_calls
import torch

from mla_triton.compat import sglang

SMALL = {"heads": 3, "latent": 128, "rope": 32}
HALVES = [torch.float16, torch.bfloat16]
MERGE = {"tokens": (5,), "heads": 3, "value_dim": 64}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_decode(dtype, device):
    rival_calls.sglang_decode(kv_lens=[40, 0, 1, 33], dtype=dtype, device=device, **SMALL)


@pytest.mark.parametrize(
    "other",
    [
        {"rope": 0},
        {"index_dtype": torch.int64},
        {"latent": 512, "rope": 64, "heads": 2, "kv_lens": [70]},
    ],
    ids=str,
)
def test_decode_of_other_kinds(other, device):
    given = {"kv_lens": [20, 3], "dtype": torch.bfloat16, "device": device}
    rival_calls.sglang_decode(**(given | SMALL | other))


def call(**changes: Any) -> None:
    k_buffer = torch.zeros(9, 1, 160)
    given = {
        "q": torch.zeros(2, 3, 160),
        "k_buffer": k_buffer,
        "v_buffer": k_buffer[..., :128],
        "o": torch.ones(2, 3, 128),
        "kv_indptr": torch.tensor([0, 4, 5], dtype=torch.int32),
        "kv_indices": torch.arange(5, dtype=torch.int32),
        "attn_logits": None,
        "attn_lse": None,
        "num_kv_splits": None,
        "max_kv_splits": 8,
        "sm_scale": 0.1,
    }
    sglang.decode_attention_fwd(**(given | changes))


def test_no_slots_at_all():
    out = torch.ones(2, 3, 128)
    call(
        o=out,
        kv_indptr=torch.zeros(3, dtype=torch.int32),
        kv_indices=torch.zeros(0, dtype=torch.int32),
        k_scale=1.0,
        v_scale=1.0,
    )
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k_scale": 0.5}, NotImplementedError, "k_scale must be None or 1.0, got 0.5"),
        ({"v_scale": 0.5}, NotImplementedError, "v_scale must be None or 1.0, got 0.5"),
        ({"logit_cap": 30.0}, NotImplementedError, "logit_cap must be 0.0, got 30.0"),
        ({"sinks": torch.zeros(3)}, NotImplementedError, "sinks must be None, got a tensor"),
        (
            {"xai_temperature_len": 9},
            NotImplementedError,
            "xai_temperature_len must be -1, got 9",
        ),
        (
            {"v_buffer": torch.zeros(9, 1, 128)},
            NotImplementedError,
            "v_buffer must be a view of k_buffer's leading columns, as the latent of MLA is, "
            "got a tensor of its own",
        ),
        (
            {"k_buffer": torch.zeros(9, 1, 160).to(torch.float8_e4m3fn)},
            NotImplementedError,
            "k_buffer must have q's dtype torch.float32: quantised caches are not implemented, "
            "got torch.float8_e4m3fn",
        ),
        (
            {"k_buffer": torch.zeros(9, 160)},
            ValueError,
            "k_buffer must be [slots, kv_heads, head_dim], got shape (9, 160)",
        ),
    ],
)
def test_refusals(changes, error, message):
    with pytest.raises(error) as raised:
        call(**changes)
    assert str(raised.value) == message


@pytest.mark.parametrize("with_buffers", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_merges(dtype, with_buffers, device):
    given = {"with_buffers": with_buffers, "dtype": dtype, "device": device}
    rival_calls.sglang_merge(**given, **MERGE)
    rival_calls.sglang_merge_v2(**given, **MERGE)


def test_rules_of_merges():
    v, s = torch.zeros(3, 2, 8), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="s_a") as raised:
        sglang.merge_state_v2(v, s[0], v, s)
    assert str(raised.value) == "s_a must be [tokens, heads], got shape (2,)"
