"""What holds of a prefill whatever its numbers, by every implementation.

A program computes a tile of the queries of one sequence and one head, over all of its keys, by a
config that depends on sizes alone: how many queries a sequence has on average, how many heads. So,
bit for bit, where these stay as they are: order of the sequences and of the heads, another
sequence's keys, NaN in another sequence's values, values scaled by a power of two.

Within the budget of the one problem or, of merges, of all parts together: some of the heads,
queries in chunks, keys in parts, truncated keys, sequences without rows in between, and what is
told from the result by a formula: keys that are there twice, shifted logits, expanded latents. The
truth is the oracle's about the problem before the change.
"""

from __future__ import annotations

from dataclasses import replace
from math import log

import bounds
import prefills
import torch
from executions import DEVICE, examples, executions, merge, over, parts_of, picking, reproduction
from hypothesis import given
from hypothesis import strategies as st
from prefills import problems, run
from ways import Way

from mla_triton import AttentionState
from mla_triton.reference import unabsorbed
from mla_triton.testing import assert_same_bits, assert_within_budget, prefill_budget
from mla_triton.testing import prefill_changes as changes
from mla_triton.testing.problems import LARGE_LOGIT

EVERY = prefills.pairs(executions(Way("sm90")))
EXAMPLES = examples(EVERY)


def rows_but(inputs, sequence: int) -> list[int]:
    """Those of all other sequences."""
    every = changes.spans(inputs.cu_seqlens_q)
    return [row for b, own in enumerate(every) if b != sequence for row in own]


# -- bit for bit


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_the_order_of_the_batch_does_not_matter(execution, shape, data):
    inputs = data.draw(problems(shape))
    queries = changes.spans(inputs.cu_seqlens_q)
    order = data.draw(st.permutations(range(len(queries))))
    reproduction(inputs, f"reordered(inputs, {order})", execution)
    got, expected = run(changes.reordered(inputs, order), execution), run(inputs, execution)
    rows = [row for b in order for row in queries[b]]
    assert_same_bits(got, bounds.rows(expected, rows))


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_another_sequence_may_lose_its_keys(execution, shape, data):
    inputs = data.draw(problems(shape))
    queries = changes.spans(inputs.cu_seqlens_q)
    sequence = data.draw(st.integers(0, len(queries) - 1))
    reproduction(inputs, f"without_keys(inputs, {sequence})", execution)
    got, expected = run(changes.without_keys(inputs, sequence), execution), run(inputs, execution)
    others = rows_but(inputs, sequence)
    assert_same_bits(bounds.rows(got, others), bounds.rows(expected, others))
    empty = bounds.rows(got, queries[sequence])
    assert (empty.out == 0).all()
    assert (empty.lse == -torch.inf).all()


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_nan_in_a_sequence_is_of_that_sequence_alone(execution, shape, data):
    inputs = data.draw(problems(shape, at_least=1))
    queries, keys = changes.spans(inputs.cu_seqlens_q), changes.spans(inputs.cu_seqlens_k)
    sequence = data.draw(st.integers(0, len(queries) - 1))
    key = data.draw(st.integers(0, len(keys[sequence]) - 1))
    column = data.draw(st.integers(0, inputs.v.shape[-1] - 1))
    reproduction(inputs, f"poisoned(inputs, {sequence}, {key}, {column})", execution)
    got = run(changes.poisoned(inputs, sequence, key, column), execution)
    others, expected = rows_but(inputs, sequence), run(inputs, execution)
    assert_same_bits(bounds.rows(got, others), bounds.rows(expected, others))
    # The last query sees every key.
    assert got.out[queries[sequence][-1], :, column].isnan().all()


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_values_may_be_scaled(execution, shape, data):
    """By powers of two; elements of out that are not normal numbers are left out, and the smallest
    that is one, which may be rounded from one that is not."""
    inputs = data.draw(problems(shape))
    exponent = data.draw(st.integers(1, 4))
    reproduction(inputs, f"scaled(inputs, {exponent})", execution)
    plain, larger = run(inputs, execution), run(changes.scaled(inputs, exponent), execution)
    normal = plain.out.abs() > torch.finfo(inputs.dtype).tiny
    assert torch.equal((plain.out * 2**exponent)[normal], larger.out[normal])
    assert torch.equal(plain.lse, larger.lse)


@over(pair for pair in EVERY if "kv_heads" not in pair[1])
@EXAMPLES
@given(data=st.data())
def test_heads_may_stand_in_any_order(execution, shape, data):
    """Some of them twice, others not at all: as many as before, so that the config is the same."""
    inputs = data.draw(problems(shape))
    count = inputs.q.shape[1]
    heads = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
    reproduction(inputs, f"of_heads(inputs, {heads})", execution)
    got, expected = run(changes.of_heads(inputs, heads), execution), run(inputs, execution)
    truth = AttentionState(expected.out[:, heads], expected.lse[:, heads])
    assert_same_bits(got, truth)


# -- within the budget


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_heads_do_not_know_of_each_other(execution, shape, data):
    inputs = data.draw(problems(shape))
    count = inputs.q.shape[1]
    heads = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
    reproduction(inputs, f"of_heads(inputs, {heads})", execution)
    some, exact = changes.of_heads(inputs, heads), prefill_budget(inputs).exact
    truth = AttentionState(exact.out[:, heads], exact.lse[:, heads])
    bounds.assert_is(run(some, execution), truth, some)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_queries_in_chunks_are_the_whole(execution, shape, data):
    inputs = data.draw(problems(shape, batch=2))
    longest = max(map(len, changes.spans(inputs.cu_seqlens_q)))
    size = data.draw(st.integers(-(-longest // 4), longest))
    reproduction(inputs, f"query_chunks(inputs, {size})", execution)
    whole = inputs.output_buffers()
    for rows, chunk in changes.query_chunks(inputs, size):
        whole["out"][rows], whole["lse"][rows] = run(chunk, execution)
    assert_within_budget(AttentionState(**whole), inputs)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_any_partition_of_the_keys_merges_to_the_whole(execution, shape, data):
    """Of queries that see all keys, for which these have no order."""
    inputs = data.draw(problems(shape, causal=(False,)))
    parts, seed = parts_of(shape, prefills.SHAPES), data.draw(st.integers(0, 2**16))
    reproduction(inputs, f"merge(partitioned(inputs, {parts}, {seed}))", execution)
    pieces = changes.partitioned(inputs, parts, seed)
    states = [run(piece, execution) for piece in pieces]
    bounds.assert_merges_to(merge(states, execution), inputs, pieces, states)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_causal_chunks_of_keys_merge_to_the_whole(execution, shape, data):
    """As prompts are prefilled: what came before in parts, without a mask, then the queries' own
    keys with one."""
    inputs = data.draw(problems(shape, causal=(True,), at_least=1))
    queries, keys = changes.spans(inputs.cu_seqlens_q), changes.spans(inputs.cu_seqlens_k)
    # Queries that see no key of their own have no place in a prompt.
    asking = [q[max(0, len(q) - len(k)) :] for q, k in zip(queries, keys, strict=True)]
    inputs = changes.with_rows(inputs, asking)
    parts = parts_of(shape, prefills.SHAPES) - 1
    reproduction(inputs, f"its queries' own keys and {parts} chunks before", execution)
    before = [k[: len(k) - len(q)] for q, k in zip(asking, keys, strict=True)]
    own = [k[len(k) - len(q) :] for q, k in zip(asking, keys, strict=True)]
    pieces = [changes.with_rows(inputs, keys=own)]
    for n in range(parts):
        chunk = [k[len(k) * n // parts : len(k) * (n + 1) // parts] for k in before]
        pieces.append(replace(changes.with_rows(inputs, keys=chunk), causal=False))
    states = [run(piece, execution) for piece in pieces]
    bounds.assert_merges_to(merge(states, execution), inputs, pieces, states)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_causal_is_truncated_keys(execution, shape, data):
    inputs = data.draw(problems(shape, causal=(True,), batch=1))
    reproduction(inputs, "truncated(inputs)", execution)
    assert_within_budget(run(changes.truncated(inputs), execution), inputs)
    single = changes.truncated(inputs)
    assert_within_budget(run(inputs, execution), single)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_sequences_without_rows_are_neutral(execution, shape, data):
    inputs = data.draw(problems(shape))
    count = len(changes.spans(inputs.cu_seqlens_q))
    places = data.draw(st.lists(st.integers(0, count), min_size=1, max_size=3))
    reproduction(inputs, f"joined_by_empty(inputs, {places})", execution)
    assert_within_budget(run(changes.joined_by_empty(inputs, places), execution), inputs)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_keys_that_are_there_twice(execution, shape, data):
    """The same out, and an lse that is log 2 more."""
    inputs = data.draw(problems(shape, causal=(False,)))
    reproduction(inputs, "doubled(inputs)", execution)
    twice, exact = changes.doubled(inputs), prefill_budget(inputs).exact
    bounds.assert_is(run(twice, execution), exact._replace(lse=exact.lse + log(2)), twice)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_a_shift_of_all_logits(execution, shape, data):
    """The same out, and an lse that is shifted as far."""
    inputs = data.draw(problems(shape))
    # A whole number, exact in every dtype.
    most = min(256, int(LARGE_LOGIT / inputs.softmax_scale))
    by = float(data.draw(st.integers(-most, most)))
    reproduction(inputs, f"shifted(inputs, {by})", execution)
    moved, exact = changes.shifted(inputs, by), prefill_budget(changes.shifted(inputs, 0.0)).exact
    truth = exact._replace(lse=exact.lse + by * inputs.softmax_scale)
    bounds.assert_is(run(moved, execution), truth, moved)


@over(pair for pair in EVERY if "kv_heads" not in pair[1])
@EXAMPLES
@given(data=st.data())
def test_expanded_latents(execution, shape, data):
    """Keys and values made from latents; W_UK and W_UV pick columns, so that nothing is rounded."""
    inputs = data.draw(problems(shape))
    heads, v_dim = inputs.v.shape[1:]
    nope, latent = inputs.recipe["qk"] - inputs.recipe["rope"], 2 * v_dim
    seed = data.draw(st.integers(0, 2**16))
    reproduction(inputs, f"expanded with picking({seed})", execution)
    generator = torch.Generator().manual_seed(seed)
    end = int(inputs.cu_seqlens_k[-1])
    latents = torch.randn(end, latent, generator=generator).to(inputs.dtype).to(DEVICE)
    w_uk, w_uv = (picking(heads, n, latent, generator) for n in (nope, v_dim))
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:end, :, :nope] = torch.einsum("nl,hdl->nhd", latents.double(), w_uk).to(k.dtype)
    v[:end] = torch.einsum("nl,hvl->nhv", latents.double(), w_uv).to(v.dtype)
    expanded = replace(inputs, k=changes.like(inputs.k, k), v=changes.like(inputs.v, v))
    state = run(expanded, execution)
    q_rope = inputs.q[..., nope:] if inputs.q_rope is None else inputs.q_rope
    k_rope = inputs.k[:, 0, nope:] if inputs.k_rope is None else inputs.k_rope
    made = [
        unabsorbed.attention(
            inputs.q[q.start : q.stop, :, :nope], q_rope[q.start : q.stop],
            latents[own.start : own.stop], k_rope[own.start : own.stop], w_uk, w_uv,
            softmax_scale=inputs.softmax_scale, causal=inputs.causal,
        )
        for q, own in zip(
            changes.spans(inputs.cu_seqlens_q), changes.spans(inputs.cu_seqlens_k), strict=True
        )
    ]  # fmt: skip
    truth = AttentionState(*(torch.cat(tensors) for tensors in zip(*made, strict=True)))
    bounds.assert_is(state, truth, expanded)
