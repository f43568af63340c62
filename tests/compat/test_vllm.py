"""`mla_triton.compat.vllm` has vLLM's conventions, and refuses what it does not have."""

from __future__ import annotations

from typing import Any

import pytest
import rival_calls
import torch

from mla_triton.compat import vllm
from mla_triton.testing import decode_inputs

SMALL = {"heads": 3, "latent": 128, "rope": 32}
HALVES = [torch.float16, torch.bfloat16]
by_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


@by_half
@pytest.mark.parametrize("page_size", [1, 16])
def test_decode(page_size, dtype, device):
    rival_calls.vllm_decode(
        kv_lens=[40, 0, 1, 33], page_size=page_size, dtype=dtype, device=device, **SMALL
    )


@pytest.mark.parametrize(
    "other",
    [
        {"rope": 0},
        {"index_dtype": torch.int64},
        {"lse_dtype": torch.bfloat16},
        {"latent": 512, "rope": 64, "heads": 2, "kv_lens": [70]},
    ],
    ids=str,
)
def test_decode_of_other_kinds(other, device):
    given = {"kv_lens": [20, 3], "page_size": 16, "dtype": torch.bfloat16, "device": device}
    rival_calls.vllm_decode(**(given | SMALL | other))


def arguments(**changes: Any) -> dict[str, Any]:
    k_buffer = torch.randn(4, 16, 1, 160)
    given = {
        "q": torch.randn(2, 3, 160),
        "k_buffer": k_buffer,
        "v_buffer": k_buffer[..., :128],
        "o": torch.zeros(2, 3, 128),
        "lse": torch.zeros(2, 3),
        "req_to_token": torch.tensor([[1, 3], [0, 2]], dtype=torch.int32),
        "b_seq_len": torch.tensor([20, 3], dtype=torch.int32),
        "attn_logits": None,
        "num_kv_splits": 4,
        "sm_scale": 0.1,
        "page_size": 16,
    }
    return given | changes


def test_values_are_not_looked_at_where_they_are_said_to_be_the_keys():
    given = arguments()
    vllm.decode_attention_fwd(**given)
    own_values = torch.full((4, 16, 1, 128), float("nan"))
    again = given | {"o": torch.zeros(2, 3, 128), "v_buffer": own_values}
    vllm.decode_attention_fwd(**again, is_mla=True)
    assert torch.equal(again["o"], given["o"])


def test_a_table_with_a_dimension_to_spare():
    given = arguments()
    vllm.decode_attention_fwd(**given)
    again = given | {"o": torch.zeros(2, 3, 128)}
    again["req_to_token"] = given["req_to_token"].long().unsqueeze(-1)
    vllm.decode_attention_fwd(**again)
    assert torch.equal(again["o"], given["o"])


def test_scales_are_those_of_quantised_caches_alone():
    given = arguments()
    vllm.decode_attention_fwd(**given)
    again = given | {"o": torch.zeros(2, 3, 128)}
    vllm.decode_attention_fwd(**again, k_scale=torch.tensor(0.5), v_scale=torch.tensor(0.5))
    assert torch.equal(again["o"], given["o"])


@pytest.mark.parametrize("num_kv_splits", [1, 4])
def test_one_split_is_asked_for_in_a_batch_invariant_engine(num_kv_splits, device):
    """A long request among short ones, and alone."""
    inputs = decode_inputs(
        kv_lens=[3000, 40, 40, 40], heads=2, latent=128, rope=32, page_size=16,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    q = rival_calls.joined(inputs).squeeze(1)
    k_buffer = inputs.cache.unsqueeze(2)

    def run(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = torch.empty(batch, 2, 128, device=device), torch.empty(batch, 2, device=device)
        vllm.decode_attention_fwd(
            q[:batch], k_buffer, k_buffer[..., :128], o, lse, inputs.page_table[:batch],
            inputs.kv_lens[:batch], None, num_kv_splits, inputs.softmax_scale, 16,
        )  # fmt: skip
        return o[0], lse[0]

    same = [torch.equal(alone, among) for alone, among in zip(run(1), run(4), strict=True)]
    assert all(same) == (num_kv_splits == 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logit_cap": 30.0}, NotImplementedError, "logit_cap must be 0.0, got 30.0"),
        (
            {"v_buffer": torch.zeros(4, 16, 1, 128)},
            NotImplementedError,
            "v_buffer must be a view of k_buffer's leading columns, as the latent of MLA is, "
            "got a tensor of its own",
        ),
        (
            {"k_buffer": torch.zeros(4, 16, 1, 160).to(torch.float8_e4m3fn)},
            NotImplementedError,
            "k_buffer must have q's dtype torch.float32: quantised caches are not implemented, "
            "got torch.float8_e4m3fn",
        ),
        ({"page_size": 8}, ValueError, "page_size must be that of k_buffer, 16, got 8"),
        (
            {"q": torch.zeros(2, 1, 3, 160)},
            ValueError,
            "q must be [batch, heads, head_dim], got shape (2, 1, 3, 160)",
        ),
        (
            {"o": torch.zeros(2, 384)},
            ValueError,
            "o must be [batch, heads, latent], got shape (2, 384)",
        ),
        ({"lse": None}, TypeError, "lse must be a torch.Tensor, got NoneType"),
    ],
)
def test_what_decode_refuses(changes, error, message):
    with pytest.raises(error) as raised:
        vllm.decode_attention_fwd(**arguments(**changes))
    assert str(raised.value) == message


MERGE = {"tokens": (9,), "heads": 4, "value_dim": 64}


@by_half
@pytest.mark.parametrize("with_context", [None, 0, 4])
@pytest.mark.parametrize("in_place", [False, True])
def test_merge(in_place, with_context, dtype, device):
    # Rows that are empty in the suffix are NaN there, and would be kept as they are.
    empty = 0.2 if with_context is None else 0.0
    rival_calls.vllm_merge(
        with_context=with_context, in_place=in_place, empty=empty, dtype=dtype, device=device,
        **MERGE,
    )  # fmt: skip


def test_a_merge_without_a_place_for_its_lse(device):
    states = [torch.randn(3, 2, 8, device=device) for _ in range(2)]
    lses = [torch.randn(2, 3, device=device) for _ in range(2)]
    output, other = torch.zeros_like(states[0]), torch.zeros_like(states[0])
    kept = [lse.clone() for lse in lses]
    lses[0][0, 0] = kept[0][0, 0] = float("inf")
    vllm.merge_attn_states(output, states[0], lses[0], states[1], lses[1])
    vllm.merge_attn_states(other, states[0], lses[0], states[1], lses[1], torch.zeros_like(lses[0]))
    assert torch.equal(output, other)
    assert torch.equal(output[0, 0], states[1][0, 0])
    assert all(torch.equal(lse, before) for lse, before in zip(lses, kept, strict=True))


def test_what_merge_refuses():
    out, lse = torch.zeros(3, 2, 8), torch.zeros(2, 3)
    with pytest.raises(NotImplementedError) as raised:
        vllm.merge_attn_states(out, out, lse, out, lse, output_scale=torch.ones(1))
    assert str(raised.value) == "output_scale must be None, got a tensor"
