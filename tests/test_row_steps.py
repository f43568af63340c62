"""How far rows lie apart, as kernels are compiled for it: never by the size of a batch."""

from __future__ import annotations

import pytest
import torch

from mla_triton import validate

HEADS, LATENT, ROPE = 8, 512, 64


def row_steps(
    how: str, batch: int, s_q: int, heads: int = HEADS, ragged: bool = False
) -> tuple[int, int]:
    """(q_nope's, q_rope's) steps of queries that lie in memory as a model leaves them."""
    tokens = batch * s_q
    both = torch.empty(tokens, heads, LATENT + ROPE, device="meta")
    q_nope, q_rope = both.split([LATENT, ROPE], -1)
    if how == "contiguous":
        q_nope, q_rope = q_nope.contiguous(), q_rope.contiguous()
    elif how == "head_major":
        product = torch.bmm(
            torch.empty(heads, tokens, 7, device="meta"),
            torch.empty(heads, 7, LATENT, device="meta"),
        )
        q_nope = product.transpose(0, 1)
    lens, lead = torch.empty(batch, dtype=torch.int32, device="meta"), (tokens,)
    if not ragged:
        q_nope, q_rope = (q.unflatten(0, (batch, s_q)) for q in (q_nope, q_rope))
        lead = (batch, s_q)
    problem = validate.decode(
        q_nope, q_rope, torch.empty(1, 1, LATENT + ROPE, device="meta"), None, None,
        lens[:, None], None,
        lens, torch.empty(batch + 1, dtype=torch.int32, device="meta") if ragged else None,
        torch.empty(*lead, heads, LATENT, device="meta"),
        torch.empty(*lead, heads, device="meta"),
        softmax_scale=1.0, causal=True, value_dim=None, max_kv_len=None, allow_tf32=False,
        has_memory=False,
    )  # fmt: skip
    return problem.row_steps[:2]


BATCHES = (1, 2, 3, 40, 128)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("s_q", [1, 2, 4])
def test_even_rows_have_one_step_in_every_batch(s_q, ragged):
    for batch in BATCHES:
        assert row_steps("contiguous", batch, s_q, ragged=ragged) == (LATENT, ROPE)
        assert row_steps("joined", batch, s_q, ragged=ragged) == (LATENT + ROPE, LATENT + ROPE)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("s_q", [1, 2, 4])
def test_a_step_that_grows_with_the_batch_counts_as_varying(s_q, ragged):
    """Kernels are compiled for a step: each batch would else ask for one of its own."""
    for batch in BATCHES[1:]:
        assert row_steps("head_major", batch, s_q, ragged=ragged) == (0, LATENT + ROPE)


def test_head_major_queries_of_one_token_are_even():
    """Turned round or not, the heads of one token lie one behind the other."""
    for ragged in (False, True):
        assert row_steps("head_major", 1, 1, ragged=ragged) == (LATENT, LATENT + ROPE)
        assert row_steps("head_major", 1, 2, ragged=ragged) == (0, LATENT + ROPE)


@pytest.mark.parametrize("how", ["contiguous", "joined", "head_major"])
@pytest.mark.parametrize("ragged", [False, True])
def test_one_head_has_few_steps(how, ragged):
    """Whatever the batch: one step alone, and one more where rows are many."""
    for s_q in (1, 2):
        steps = {row_steps(how, batch, s_q, heads=1, ragged=ragged) for batch in BATCHES[1:]}
        assert len(steps) == 1
