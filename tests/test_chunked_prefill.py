"""A prompt in chunks is the prompt in one go, expanded or absorbed: the recipe of the docs.

Small heads and prompts here; `tests/gpu/test_chunked_prefill_gpu.py` has the real ones.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import examples
import pytest
import torch

import mla_triton
from mla_triton import AttentionState, reference
from mla_triton.testing import (
    DecodeInputs,
    PrefillInputs,
    assert_within_budget,
    decode_budget,
    decode_inputs,
    query_blocks,
)

FORMS = ("expanded", "absorbed")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What came before a chunk is expanded in parts, some of them empty for some requests."""
    module = examples.load("chunked_prefill")
    monkeypatch.setattr(module, "WORKSPACE", 16)
    return module


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("size", "prompts"),
    [
        (1, (13, 5, 0)),
        (7, (40, 21, 3)),
        (7, (70,)),
        (512, (600, 37)),
        (4096, (40, 300)),
    ],
)
def test_chunks_are_the_whole(recipe, form, size, prompts):
    if size >= 512:
        recipe.WORKSPACE = 200
    reports = recipe.run(form, size, prompts, "cpu")
    assert [report.tokens for report in reports] == [length for length in prompts if length]
    assert all(report.ok for report in reports), reports


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(recipe, form, dtype):
    reports = recipe.run(form, 7, (20, 33), "cpu", dtype)
    assert all(report.ok for report in reports), reports


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_row_of_the_expanded_form_is_within_its_own_budget(recipe, dtype):
    """Keys that are expanded in other parts may be rounded otherwise, here they are not."""

    class Exact(recipe.Layer):
        def expand(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            wide = recipe.Layer(self.w_uk.double(), self.w_uv.double(), self.scale)
            k, v = wide.expand(latents.double())
            return k.to(latents.dtype), v.to(latents.dtype)

    prompts, widths = (50, 9, 23), recipe.SMALL
    layer, tokens = recipe.make(prompts, widths, dtype, torch.device("cpu"))
    layer = Exact(layer.w_uk, layer.w_uv, layer.scale)
    state = recipe.in_chunks("expanded", layer, prompts, tokens, 7)
    k, v = layer.expand(tokens.keys[:, : widths.latent])
    whole = recipe.offsets([(0, length) for length in prompts], torch.device("cpu"))
    inputs = PrefillInputs(
        q=tokens.q_nope, k=k, v=v, cu_seqlens_q=whole, cu_seqlens_k=whole,
        softmax_scale=layer.scale, q_rope=tokens.q_rope, k_rope=tokens.keys[:, widths.latent :],
    )  # fmt: skip
    assert_within_budget(state, inputs)


def test_chunks_are_taken_from_every_prompt(recipe):
    assert list(recipe.chunks((5, 0, 2), 2)) == [
        [(0, 2), (0, 0), (0, 2)],
        [(2, 4), (0, 0), (2, 2)],
        [(4, 5), (0, 0), (2, 2)],
    ]


def test_a_cache_gives_back_what_was_put_into_it(recipe):
    cache = recipe.Cache((40, 3), torch.zeros(1, 4))
    keys = torch.arange(43 * 4).view(43, 4).float()
    cache.append([(0, 30), (0, 3)], keys[:33])
    cache.append([(30, 40), (3, 3)], keys[33:])
    whole = [*range(30), *range(33, 43), 30, 31, 32]
    assert torch.equal(cache.gather([(0, 40), (0, 3)]), keys[whole])
    assert torch.equal(cache.gather([(29, 31), (1, 1)]), keys[[29, 33]])
    assert cache.pages.isnan().any()


RIGHT = mla_triton.merge


def leaves_a_prefix_out(states: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
    """The state of the chunk's own keys stays as it is."""


def averages(states: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
    out.copy_((states[0].out + states[1].out) / 2)


def takes_base_2(states: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
    mine, other = states
    RIGHT([mine, other._replace(lse=other.lse / 0.6931471805599453)], out=out, lse=lse)


@pytest.mark.parametrize("wrong", [leaves_a_prefix_out, averages, takes_base_2])
def test_a_wrong_merge_is_found(recipe, monkeypatch, wrong):
    monkeypatch.setattr(mla_triton, "merge", wrong)
    (report,) = recipe.run("expanded", 7, (40,), "cpu")
    assert not report.ok


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_that_is_missing_is_found(recipe, monkeypatch, form):
    name = {"expanded": "prefill", "absorbed": "decode"}[form]
    right = getattr(mla_triton, name)
    monkeypatch.setattr(mla_triton, name, lambda *a, **o: right(*a, **(o | {"causal": False})))
    (report,) = recipe.run(form, 7, (40,), "cpu")
    assert not report.ok


def test_nan_is_in_no_budget(recipe):
    layer, tokens = recipe.make((9,), recipe.SMALL, torch.bfloat16, torch.device("cpu"))
    state = recipe.in_chunks("expanded", layer, (9,), tokens, 4)
    assert recipe.judge("expanded", layer, tokens, state).ok
    state.out[3, 1, 2] = float("nan")
    assert not recipe.judge("expanded", layer, tokens, state).ok


def test_the_script_says_so(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chunked_prefill.py", "--device", "cpu", "--prompts", "9"])
    assert recipe.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    monkeypatch.setattr(mla_triton, "merge", lambda states, **buffers: states[0])
    assert recipe.main() == 1
    assert "too far" in capsys.readouterr().out


# -- absorbed: decode with long ragged queries


def assert_blocks_within_budget(state: AttentionState, inputs: DecodeInputs, size: int) -> None:
    for rows, part in query_blocks(inputs, size):
        assert_within_budget(AttentionState(state.out[rows], state.lse[rows]), part)


@pytest.mark.parametrize("table", ["dense", "csr"])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_a_problem_are_the_problem(causal, table):
    """So what is judged block by block is judged."""
    inputs = decode_inputs(
        kv_lens=[40, 9, 0, 70], q_lens=[40, 20, 3, 13], heads=3, latent=32, rope=16, table=table,
        causal=causal,
    )  # fmt: skip
    whole, seen = decode_budget(inputs), torch.zeros(76, dtype=torch.bool)
    for rows, part in query_blocks(inputs, 7):
        budget = decode_budget(part)
        assert part.q_nope.shape[0] == rows.stop - rows.start <= 7
        torch.testing.assert_close(budget.exact.out, whole.exact.out[rows])
        torch.testing.assert_close(budget.exact.lse, whole.exact.lse[rows])
        assert not seen[rows].any()
        seen[rows] = True
    assert seen.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_hundreds_of_query_tokens_a_request(causal, dtype):
    """A chunk behind a prefix, a prompt by itself, more queries than keys, and none."""
    inputs = decode_inputs(
        kv_lens=[300, 130, 90, 30, 0], q_lens=[130, 130, 0, 70, 9], heads=4, latent=64, rope=16,
        dtype=dtype, causal=causal, page_size=16,
    )  # fmt: skip
    buffers = inputs.output_buffers()
    arguments, options = inputs.call_arguments()
    state = mla_triton.decode(*arguments, **options, **buffers)
    assert_blocks_within_budget(state, inputs, 64)
    hidden = state.lse[130 + 130 : 130 + 130 + 40] if causal else state.lse[-9:]
    assert (hidden == float("-inf")).all()


def test_a_block_tells_a_wrong_mask():
    inputs = decode_inputs(kv_lens=[90], q_lens=[50], heads=2, latent=32, rope=16)
    arguments, options = inputs.call_arguments()
    state = reference.decode_same_precision(*arguments, **(options | {"causal": False}))
    with pytest.raises(AssertionError, match="is over its budget"):
        assert_blocks_within_budget(state, inputs, 16)
