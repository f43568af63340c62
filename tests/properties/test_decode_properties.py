"""What holds of a decode whatever its numbers, by every implementation and for every cache format.

Bit for bit, because each row goes through the same instructions over the same numbers:

* order of the batch, and another request's lengths, where the plan has one part. The schedule
  depends on all lengths and on their order: with several parts, other requests move the cuts of
  this one, and its partial results are added in another order;
* where pages lie, and NaN in another request's keys, under any schedule: neither moves a cut;
* values scaled by a power of two.

Within the budget of the one problem or, of merges, of all parts together, because sums are made in
another order or by another kernel: order of the batch with several parts, page size (blocks
that do not stay in one page begin where their part does), some of the heads (other rows, another
schedule), number of parts, queries in chunks, keys in parts, truncated lengths, one query token
for several, requests without keys in between, and what is told from the result by a formula: keys
that are there twice, shifted logits, absorbed projections. The truth is the oracle's about the
problem before the change, so it is no matter what the oracle makes of the change.
"""

from __future__ import annotations

from dataclasses import replace
from math import log

import bounds
import decodes
import torch
from decodes import DEVICE, is_16_bit, problems, run
from executions import examples, executions, is_half, merge, over, parts_of, picking, reproduction
from hypothesis import given
from hypothesis import strategies as st
from ways import Way

from mla_triton import AttentionState
from mla_triton.reference import unabsorbed
from mla_triton.testing import (
    assert_same_bits,
    assert_within_budget,
    decode_budget,
    plan_of,
    query_blocks,
)
from mla_triton.testing import decode_changes as changes
from mla_triton.testing.problems import LARGE_LOGIT, int32

EVERY = decodes.pairs(executions(Way("sm90", 1), Way("sm90", 2)))
EXAMPLES = examples(EVERY)
SEVERAL = 3
"""Query tokens of a request, where there have to be some."""


# -- bit for bit


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_the_order_of_the_batch_does_not_matter(execution, shape, data):
    inputs = data.draw(problems(shape))
    order = data.draw(st.permutations(range(len(inputs.kv_lens))))
    reproduction(inputs, f"reordered(inputs, {order}) in one part", execution)
    moved = changes.reordered(inputs, order)
    expected = run(inputs, execution, **decodes.in_one_part(inputs, execution))
    got = run(moved, execution, **decodes.in_one_part(moved, execution))
    assert_same_bits(got, bounds.rows(expected, order))


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_places_of_pages_do_not_matter(execution, shape, data):
    inputs = data.draw(problems(shape))
    seed = data.draw(st.integers(0, 2**16))
    reproduction(inputs, f"relocated(inputs, {seed})", execution)
    assert_same_bits(run(changes.relocated(inputs, seed), execution), run(inputs, execution))


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_another_request_may_lose_its_keys(execution, shape, data):
    inputs = data.draw(problems(shape))
    last = len(inputs.kv_lens) - 1
    request = data.draw(st.integers(0, last))
    reproduction(inputs, f"emptied(inputs, {request}) in one part", execution)
    fewer = changes.emptied(inputs, request)
    others = [b for b in range(last + 1) if b != request]
    expected = run(inputs, execution, **decodes.in_one_part(inputs, execution))
    got = run(fewer, execution, **decodes.in_one_part(fewer, execution))
    assert_same_bits(bounds.rows(got, others), bounds.rows(expected, others))
    assert (got.out[request] == 0).all()
    assert (got.lse[request] == -torch.inf).all()


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_nan_in_a_request_is_of_that_request_alone(execution, shape, data):
    inputs = data.draw(problems(shape, at_least=1))
    last = len(inputs.kv_lens) - 1
    request = data.draw(st.integers(0, last))
    key = data.draw(st.integers(0, int(inputs.kv_lens[request]) - 1))
    column = data.draw(st.integers(0, inputs.q_nope.shape[-1] - 1))
    reproduction(inputs, f"poisoned(inputs, {request}, {key}, {column})", execution)
    got = run(changes.poisoned(inputs, request, key, column), execution)
    expected = run(inputs, execution)
    others = [b for b in range(last + 1) if b != request]
    assert_same_bits(bounds.rows(got, others), bounds.rows(expected, others))
    # The last query token sees every key.
    assert got.out[request, -1].isnan().any(-1).all()


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_values_may_be_scaled(execution, shape, data):
    """By powers of two that keep all numbers normal; those of out that are not are left out, and
    the smallest that is, which may be rounded from one that is not."""
    inputs = changes.coarse(data.draw(problems(shape)))
    exponent = data.draw(st.integers(1, 4))
    reproduction(inputs, f"scaled(coarse(inputs), {exponent})", execution)
    plain, larger = run(inputs, execution), run(changes.scaled(inputs, exponent), execution)
    normal = plain.out.abs() > torch.finfo(inputs.dtype).tiny
    assert torch.equal((plain.out * 2**exponent)[normal], larger.out[normal])
    assert torch.equal(plain.lse, larger.lse)


# -- within the budget


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_the_order_of_a_batch_in_several_parts(execution, shape, data):
    inputs = data.draw(problems(shape))
    order = data.draw(st.permutations(range(len(inputs.kv_lens))))
    reproduction(inputs, f"reordered(inputs, {order})", execution)
    back = [order.index(b) for b in range(len(order))]
    got = run(changes.reordered(inputs, order), execution)
    assert_within_budget(bounds.rows(got, back), inputs)


@over(pair for pair in EVERY if pair[1]["page_size"] > 1)
@EXAMPLES
@given(data=st.data())
def test_the_page_size_does_not_matter(execution, shape, data):
    inputs = data.draw(problems(shape))
    size, *_ = decodes.page_sizes(inputs, execution)
    reproduction(inputs, f"repaged(inputs, {size})", execution)
    assert_within_budget(run(changes.repaged(inputs, size), execution), inputs)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_heads_do_not_know_of_each_other(execution, shape, data):
    inputs = data.draw(problems(shape))
    heads = data.draw(decodes.some_heads(inputs.q_nope.shape[-2]))
    reproduction(inputs, f"of_heads(inputs, {heads})", execution)
    got, budget = run(changes.of_heads(inputs, heads), execution), decode_budget(inputs)
    exact = AttentionState(budget.exact.out[:, :, heads], budget.exact.lse[:, :, heads])
    bounds.assert_is(got, exact, changes.of_heads(inputs, heads))


@over(pair for pair in EVERY if pair[0].impl != "reference")
@EXAMPLES
@given(data=st.data())
def test_the_number_of_parts_does_not_matter(execution, shape, data):
    inputs = data.draw(problems(shape))
    parts = data.draw(decodes.parts(shape, len(inputs.kv_lens)))
    reproduction(inputs, f"parts={parts}", execution)
    plan = plan_of(inputs, execution.impl, parts)
    assert_within_budget(run(inputs, execution, plan=plan), inputs)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_a_plan_that_knows_the_format_changes_no_bit(execution, shape, data):
    inputs = data.draw(problems(shape))
    reproduction(inputs, "with a plan", execution)
    plan = plan_of(inputs, execution.impl)
    assert_same_bits(run(inputs, execution, plan=plan), run(inputs, execution))


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_queries_in_chunks_are_the_whole(execution, shape, data):
    """As a prompt comes in chunks: ragged queries, the keys of a chunk ending with its own."""
    inputs = data.draw(problems(shape, s_q=SEVERAL, causal=(not is_half(shape),)))
    size = 2
    reproduction(inputs, f"query_blocks(ragged(inputs), {size})", execution)
    batch, s_q = inputs.q_nope.shape[:2]
    bounds_of = int32(range(0, batch * s_q + 1, s_q)).to(DEVICE)
    ragged = changes.with_queries(
        replace(inputs, cu_seqlens_q=bounds_of), lambda q: q.flatten(0, 1)
    )
    whole = ragged.output_buffers()
    for tokens, chunk in query_blocks(ragged, size):
        state = run(chunk, execution)
        whole["out"][tokens], whole["lse"][tokens] = state
    assert_within_budget(AttentionState(**whole), ragged)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_any_partition_of_the_pages_merges_to_the_whole(execution, shape, data):
    """Of queries that see all keys, for which these have no order."""
    inputs = data.draw(problems(shape, causal=(False,), whole_pages=True))
    parts, seed = parts_of(shape, decodes.SHAPES), data.draw(st.integers(0, 2**16))
    reproduction(inputs, f"merge(partitioned(inputs, {parts}, {seed}))", execution)
    pieces = changes.partitioned(inputs, parts, seed)
    states = [run(piece, execution) for piece in pieces]
    bounds.assert_merges_to(merge(states, execution), inputs, pieces, states)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_causal_is_truncated_lengths(execution, shape, data):
    """Without a mask, over the keys that a query token sees."""
    inputs = data.draw(problems(shape, s_q=SEVERAL, causal=(True,)))
    reproduction(inputs, "truncated(inputs, False)", execution)
    state = run(changes.truncated(inputs, causal=False), execution)
    batch, s_q = inputs.q_nope.shape[:2]
    rows = (tensor.flatten(0, 1).unflatten(0, (batch, s_q)) for tensor in state)
    assert_within_budget(AttentionState(*rows), inputs)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_a_row_of_several_is_a_decode_at_its_length(execution, shape, data):
    """As in multi-token prediction; the truth is that of single query tokens."""
    inputs = data.draw(problems(shape, s_q=SEVERAL, causal=(True,)))
    reproduction(inputs, "rows of truncated(inputs, True)", execution)
    single = changes.truncated(inputs, causal=True)
    state = run(inputs, execution)
    rows = AttentionState(*(tensor.flatten(0, 1)[:, None] for tensor in state))
    assert_within_budget(rows, single)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_requests_without_keys_are_neutral(execution, shape, data):
    inputs = data.draw(problems(shape))
    count = len(inputs.kv_lens)
    places = data.draw(st.lists(st.integers(0, count), min_size=2, max_size=2))
    reproduction(inputs, f"joined_by_empty(inputs, {places})", execution)
    rows = [*range(count)]
    for place in places:
        rows.insert(place, -1)
    state = run(changes.joined_by_empty(inputs, places), execution)
    assert_within_budget(bounds.rows(state, [rows.index(b) for b in range(count)]), inputs)
    added = bounds.rows(state, [place for place, b in enumerate(rows) if b < 0])
    assert (added.out == 0).all()
    assert (added.lse == -torch.inf).all()


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_keys_that_are_there_twice(execution, shape, data):
    """The same out, and an lse that is log 2 more."""
    inputs = data.draw(problems(shape, causal=(False,), whole_pages=True))
    reproduction(inputs, "doubled(inputs)", execution)
    twice, exact = changes.doubled(inputs), decode_budget(inputs).exact
    bounds.assert_is(run(twice, execution), exact._replace(lse=exact.lse + log(2)), twice)


@over(pair for pair in EVERY if pair[1]["rope"] > 0)
@EXAMPLES
@given(data=st.data())
def test_a_shift_of_all_logits(execution, shape, data):
    """The same out, and an lse that is shifted as far."""
    inputs = data.draw(problems(shape))
    level, key = changes.with_a_constant_column(changes.shifted(inputs, 0.0))
    # A whole number, exact in every dtype.
    most = min(256, int(LARGE_LOGIT / (key * inputs.softmax_scale)))
    by = float(data.draw(st.integers(-most, most)))
    reproduction(inputs, f"shifted(with_a_constant_column(inputs), {by})", execution)
    moved, exact = changes.shifted(level, by), decode_budget(level).exact
    shift = by * key * inputs.softmax_scale
    bounds.assert_is(run(moved, execution), exact._replace(lse=exact.lse + shift), moved)


@over(pair for pair in EVERY if is_16_bit(pair[1]) and "value_dim" not in pair[1])
@EXAMPLES
@given(data=st.data())
def test_absorbed_is_unabsorbed(execution, shape, data):
    """W_UK and W_UV that pick columns, with a sign: absorbing rounds nothing."""
    inputs = data.draw(problems(shape))
    seed = data.draw(st.integers(0, 2**16))
    reproduction(inputs, f"absorbed with picking({seed})", execution)
    generator = torch.Generator().manual_seed(seed)
    heads, latent = inputs.q_nope.shape[-2:]
    w_uk, w_uv = (picking(heads, latent // 4, latent, generator) for _ in range(2))
    q_nope = inputs.q_nope[..., : latent // 4]
    query = unabsorbed.absorb_queries(q_nope.double(), w_uk).to(inputs.dtype).contiguous()
    absorbed = replace(inputs, q_nope=query)
    state, budget = run(absorbed, execution), decode_budget(absorbed)
    got = unabsorbed.project_values(state.out.double(), w_uv)
    size = changes.page_size_of(inputs)
    for request, (pages, length) in enumerate(
        zip(changes.pages_of(inputs), inputs.kv_lens.tolist(), strict=True)
    ):
        c_kv = changes.latents_of(inputs, inputs.cache)[pages.long()].flatten(0, 1)[:length]
        k_pe = changes.rotary_of(inputs, inputs.cache)[pages.long()].flatten(0, 1)[:length]
        assert len(c_kv) == length <= len(pages) * size
        q_rope = None if inputs.q_rope is None else inputs.q_rope[request]
        truth = unabsorbed.attention(
            q_nope[request], q_rope, c_kv, k_pe, w_uk, w_uv,
            softmax_scale=inputs.softmax_scale, causal=inputs.causal,
        )  # fmt: skip
        assert ((got[request] - truth.out).abs() <= budget.out[request][..., None]).all()
        seen = truth.lse.isfinite()
        assert torch.equal(seen, state.lse[request].isfinite())
        off = (state.lse[request].double() - truth.lse).abs()
        assert (off <= budget.lse[request])[seen].all()
