"""With `batch_invariant=True` a request's result depends on nothing but the request, bit for bit.

Every example computes a batch, and another one that has some of its requests, in another order and
among others, elsewhere in the cache, in pages of another size and in a wider table. What both have
computed is the same, by the same implementation: with pages of 1 the Hopper kernel does not take
e4m3 keys, which is said by `impl` being refused, and sizes are drawn from those that it takes.

Shapes are parameters and not drawn, so that each is tried. For what a kernel is compiled for there
are as few of the rest as it takes: one number of query tokens, two page sizes.
"""

from __future__ import annotations

from dataclasses import replace

import bounds
import decodes
import prefills
import torch
from decodes import DEVICE
from executions import (
    COMPILED,
    Execution,
    Shape,
    executions,
    is_half,
    most_examples,
    over,
    reproduction,
    seeds,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import Way

from mla_triton import AttentionState
from mla_triton.cache import CSRPageTable
from mla_triton.plan import FIXED_LEAST, FIXED_UNIT
from mla_triton.testing import (
    DecodeInputs,
    assert_same_bits,
    assert_within_budget,
    decode_inputs,
    plan_of,
    prefill_changes,
)
from mla_triton.testing import decode_changes as changes
from mla_triton.testing.problems import int32

PIECE = FIXED_LEAST * FIXED_UNIT
SHORT = (130, 0, 1, 63)
LENGTHS = (PIECE + 1, *SHORT, PIECE - 1, 2 * PIECE + 65)
"""Keys of a request: those of two pieces, of one and of three."""
if COMPILED:
    LENGTHS += (4 * PIECE + 1, 20_000)

EXECUTIONS = executions(Way("sm90"))
EVERY = decodes.pairs(EXECUTIONS)
FEW = [
    (execution, shape)
    for execution, shape in EVERY
    if execution.label is None and shape["heads"] in decodes.FEW_HEADS
]
"""Of each other kind of call: older cards' code is compiled for a few as it is."""
EXAMPLES = settings(max_examples=max(3 if COMPILED else 1, most_examples() // len(decodes.SHAPES)))


def run(inputs: DecodeInputs, execution: Execution) -> AttentionState:
    return decodes.run(inputs, execution, batch_invariant=True)


def widened(inputs: DecodeInputs, by: int) -> DecodeInputs:
    """With so many entries more in its page table, which may be of longer requests."""
    table = inputs.page_table
    if isinstance(table, CSRPageTable):
        more = table.indices.new_full((by,), 2**31 - 1)
        return replace(inputs, page_table=table._replace(indices=torch.cat([table.indices, more])))
    more = table.new_full((len(table), by), 2**31 - 1)
    return replace(inputs, page_table=torch.cat([table, more], 1))


@st.composite
def long_problems(draw: st.DrawFn, shape: Shape, s_q: int = 1) -> DecodeInputs:
    # A thousand keys take a second in the interpreter: one request has them there.
    others = st.sampled_from(LENGTHS if COMPILED else SHORT)
    return decode_inputs(
        kv_lens=[
            draw(st.sampled_from(LENGTHS)),
            *draw(st.lists(others, min_size=1, max_size=2)),
        ],
        s_q=s_q,
        seed=draw(seeds()),
        device=DEVICE,
        **shape,
    )


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_a_request_of_a_decode_is_alone(execution, shape, data):
    inputs = data.draw(long_problems(shape, s_q=2 if is_half(shape) else 1))
    count = len(inputs.kv_lens)
    order = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    size = data.draw(st.sampled_from(decodes.page_sizes(inputs, execution)))
    seed, by = data.draw(st.integers(0, 2**16)), data.draw(st.sampled_from((1, 0, 5000)))
    change = f"widened(reordered(repaged(relocated(inputs, {seed}), {size}), {order}), {by})"
    reproduction(inputs, change, execution)
    moved = changes.repaged(changes.relocated(inputs, seed), size)
    moved = widened(changes.reordered(moved, order), by)
    expected = run(inputs, execution)
    assert_same_bits(run(moved, execution), bounds.rows(expected, order))
    assert_within_budget(expected, inputs)


@over(FEW)
@EXAMPLES
@given(data=st.data())
def test_ragged_queries_of_others_do_not_matter(execution, shape, data):
    """How many query tokens others have moves the average, by which tiles are chosen elsewhere."""
    tokens = data.draw(st.lists(st.sampled_from((1, 2, 9)), min_size=2, max_size=3))
    inputs = data.draw(long_problems(shape, s_q=max(tokens)))
    lengths, pages = inputs.kv_lens.tolist(), changes.pages_of(inputs)
    tokens = (tokens * len(lengths))[: len(lengths)]
    reproduction(inputs, f"each request alone, of {tokens} query tokens", execution)

    def ragged(requests: range) -> DecodeInputs:
        some = changes.with_pages(
            inputs, [pages[b] for b in requests], [lengths[b] for b in requests]
        )
        ends = torch.tensor([0, *(tokens[b] for b in requests)]).cumsum(0)
        return changes.with_queries(
            replace(some, cu_seqlens_q=int32(ends.tolist()).to(DEVICE)),
            lambda q: torch.cat([q[b, : tokens[b]] for b in requests]),
        )

    together = run(ragged(range(len(lengths))), execution)
    first = 0
    for b, count in enumerate(tokens):
        alone = run(ragged(range(b, b + 1)), execution)
        assert_same_bits(alone, bounds.rows(together, range(first, first + count)))
        first += count


@over(FEW)
@EXAMPLES
@given(data=st.data())
def test_a_plan_changes_nothing(execution, shape, data):
    """One that was made for other lengths, and is made again for these."""
    inputs = data.draw(long_problems(shape))
    reproduction(inputs, "with a plan", execution)
    before = replace(inputs, kv_lens=inputs.kv_lens.flip(0))
    plan = plan_of(before, execution.impl, batch_invariant=True, max_kv_len=max(LENGTHS))
    plan.update(inputs.kv_lens)
    assert_same_bits(
        decodes.run(inputs, execution, batch_invariant=True, plan=plan), run(inputs, execution)
    )


@over(prefills.pairs(EXECUTIONS))
@EXAMPLES
@given(data=st.data())
def test_a_sequence_of_a_prefill_is_alone(execution, shape, data):
    """Among long sequences, or short ones, for which tiles would be others."""
    causal = not is_half(shape)
    inputs = data.draw(prefills.problems(shape, causal=(causal,)))
    own = prefill_changes.spans(inputs.cu_seqlens_q)
    order = data.draw(st.lists(st.integers(0, len(own) - 1), min_size=1, max_size=len(own) + 1))
    reproduction(inputs, f"reordered(inputs, {order})", execution)
    got = prefills.run(prefill_changes.reordered(inputs, order), execution, batch_invariant=True)
    expected = prefills.run(inputs, execution, batch_invariant=True)
    assert_same_bits(got, bounds.rows(expected, [row for b in order for row in own[b]]))
    assert_within_budget(expected, inputs)


# -- that it would be noticed


def test_without_it_a_request_depends_on_the_others():
    """What is held above is no accident: a batch cuts its requests by what else is in it."""
    execution = Execution(Way("portable"))
    inputs = decode_inputs(
        kv_lens=[3000, 40, 40, 40], heads=2, latent=128, rope=32, page_size=16,
        dtype=torch.float32, device=DEVICE,
    )  # fmt: skip
    alone = changes.reordered(inputs, [0])
    lse = [decodes.run(some, execution).lse[0] for some in (inputs, alone)]
    assert not torch.equal(*lse)
    lse = [run(some, execution).lse[0] for some in (inputs, alone)]
    assert torch.equal(*lse)
