"""Many calls, and several at once, on the GPU in this machine: memory that does not grow, bits that
stay, streams and threads that do not see each other.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ways import Way, is_refused, run

import mla_triton
from mla_triton import AttentionState, select, timing
from mla_triton import device as devices
from mla_triton.testing import (
    append_inputs,
    assert_same_bits,
    assert_within_budget,
    decode_inputs,
    gather_inputs,
    merge_inputs,
    plan_of,
    prefill_inputs,
    problem_of,
)

BF16, F16 = torch.bfloat16, torch.float16
CALLS = 100_000
WARM_UP = 15_000
"""Calls until every table that is bounded has been filled."""
REPLAYED = 500
"""Calls of a graph."""
STREAMS = 8
ROUNDS = 30

MOST_BLOCKS = 2_000
"""Python's own blocks of memory: a fiftieth of one for each call."""
MOST_RESIDENT = 16 * 2**20
"""Bytes of the process: 168 for each call. The driver keeps some, in steps of a few MB."""

Step = Callable[[], Any]


# -- memory


class Memory(NamedTuple):
    """What a process holds."""

    allocated: int
    reserved: int
    blocks: int
    resident: int

    @classmethod
    def now(cls) -> Memory:
        torch.cuda.synchronize()
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            torch.cuda.memory_allocated(),
            torch.cuda.memory_reserved(),
            sys.getallocatedblocks(),
            pages * os.sysconf("SC_PAGE_SIZE"),
        )


@contextmanager
def as_served() -> Iterator[None]:
    """Without the NaN that tests fill new memory with, which would be most of the work."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled


def decode_step(heads: int, kv_lens: list[int], **more: Any) -> Step:
    inputs = decode_inputs(kv_lens=kv_lens, heads=heads, device="cuda", **more)
    arguments, options = inputs.call_arguments()
    return lambda: mla_triton.decode(*arguments, **options)


def steps_of_a_server() -> Iterator[Step]:
    """Mostly calls like the one before, of a few shapes, as an engine's layers make them; and now
    and then all else: more shapes than are remembered, caches that are elsewhere, other operations.
    """
    layers = [
        decode_step(16, [300, 70]),
        decode_step(128, [300, 70]),
        decode_step(16, [900], stored="fp8"),
        decode_step(16, [100, 65], stored="fp8_ds_mla"),
        decode_step(16, [64] * 8, dtype=F16),
    ]
    # Alike but for how many requests there are: each goes the whole way.
    others = [decode_step(16, [40 + n] * (n + 1)) for n in range(20)]
    prefill = prefill_inputs(q_lens=[65, 3], split_k=True, device="cuda").call_arguments()
    merge = merge_inputs(heads=4, device="cuda").call_arguments()
    append = append_inputs(form="fp8_ds_mla", device="cuda").call_arguments()
    gather = gather_inputs(device="cuda")
    pages = torch.zeros(9, 656, dtype=torch.uint8, device="cuda")
    ids = torch.tensor([1, 2], device="cuda"), torch.tensor([5, 6], device="cuda")
    operations: list[Step] = [
        lambda: mla_triton.prefill(*prefill[0], **prefill[1]),
        lambda: mla_triton.merge(*merge[0], **merge[1]),
        lambda: mla_triton.append(*append[0], **append[1]),
        lambda: gather.call(),
        lambda: mla_triton.copy_pages(pages, pages, *ids),
    ]
    # More places than a launcher keeps descriptors of; 8 numbers, so that they stay aligned.
    inputs = decode_inputs(kv_lens=[64], heads=128, device="cuda")
    cache, places = inputs.cache, 5_000
    memory = torch.zeros(cache.numel() + 8 * places, dtype=BF16, device="cuda")

    def elsewhere(place: int) -> None:
        moved = memory[8 * place :][: cache.numel()].view(cache.shape)
        arguments, options = replace(inputs, cache=moved).call_arguments()
        mla_triton.decode(*arguments, **options)

    places_in_turn = itertools.cycle(range(places))
    for number in itertools.count():
        turn = number % 100
        if turn < 40:
            yield layers[number % 5]
        elif turn < 84:
            yield lambda: elsewhere(next(places_in_turn))
        elif turn < 94:
            yield others[number // 100 * 10 % 20 + turn - 84]
        else:
            yield operations[turn % 5]


def test_memory_does_not_grow():
    """Over 100,000 calls, after as many as fill what is bounded: of the GPU not by a byte, of
    Python by no object a call, of the process by less than 168 bytes a call."""
    steps = steps_of_a_server()
    with as_served():
        for step in itertools.islice(steps, WARM_UP):
            step()
        before = Memory.now()
        for step in itertools.islice(steps, CALLS):
            step()
        after = Memory.now()
    assert after.allocated == before.allocated
    assert after.reserved == before.reserved
    assert after.blocks - before.blocks < MOST_BLOCKS, (before, after)
    assert after.resident - before.resident < MOST_RESIDENT, (before, after)


# -- replays


@pytest.mark.parametrize("stored", ["16bit", "fp8", "fp8_ds_mla"])
@pytest.mark.parametrize("heads", [16, 32, 128])
@pytest.mark.parametrize("others", [0, 8])
def test_a_hundred_thousand_replays_of_short_calls(others, heads, stored):
    """By one plan, so that nothing but attention and merges follow each other, without a pause;
    most programs of each find no key of the one request that has any."""
    kv_lens = [512, *[0] * others]
    inputs = decode_inputs(kv_lens=kv_lens, heads=heads, stored=stored, device="cuda")
    arguments, options = inputs.call_arguments()
    buffers, plan = inputs.output_buffers(), plan_of(inputs)
    graph = timing.capture(
        [lambda: mla_triton.decode(*arguments, **options, **buffers, plan=plan)] * REPLAYED
    )
    graph.replay()
    torch.cuda.synchronize()
    first = AttentionState(buffers["out"].clone(), buffers["lse"].clone())
    assert_within_budget(first, inputs)
    for _ in range(CALLS // REPLAYED):
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(AttentionState(buffers["out"], buffers["lse"]), first)


# -- streams


def decodes(way: Way, **recipe: Any) -> list[Step]:
    """For each stream one of its own values, cut into parts that are merged."""
    made = [
        decode_inputs(kv_lens=[4000, 65, 1000 + seed], seed=seed, device="cuda", **recipe)
        for seed in range(STREAMS)
    ]
    if is_refused(made[0], way):
        return []
    for inputs in made:
        assert_within_budget(run(inputs, way), inputs)
    return [lambda inputs=inputs: run(inputs, way) for inputs in made]


def prefills(impl: str) -> list[Step]:
    made = [
        prefill_inputs(
            q_lens=[300, 65], k_lens=[900, 65 + seed], heads=8, split_k=True, seed=seed,
            device="cuda",
        )
        for seed in range(STREAMS)
    ]  # fmt: skip
    problem: Any = problem_of(made[0])
    if impl == "sm90" and select.why_not_sm90_prefill(problem, devices.current(), impl):
        return []

    def step(inputs: Any) -> Any:
        arguments, options = inputs.call_arguments()
        return mla_triton.prefill(*arguments, **options, impl=impl)

    for inputs in made:
        assert_within_budget(step(inputs), inputs)
    return [lambda inputs=inputs: step(inputs) for inputs in made]


def merges() -> list[Step]:
    made = [merge_inputs(tokens=(400,), seed=seed, device="cuda") for seed in range(STREAMS)]
    calls = [inputs.call_arguments() for inputs in made]
    return [lambda call=call: mla_triton.merge(*call[0], **call[1]) for call in calls]


def appends() -> list[Step]:
    """Each into a cache of its own, and what is then in it."""
    made = [
        append_inputs(
            form="fp8_ds_mla", tokens=900, pages=60, norm=BF16, rotation="half", seed=seed,
            device="cuda",
        )
        for seed in range(STREAMS)
    ]  # fmt: skip

    def step(inputs: Any) -> Any:
        fresh = inputs.fresh()
        arguments, options = fresh.call_arguments()
        mla_triton.append(*arguments, **options)
        return fresh.memory.buffers

    return [lambda inputs=inputs: step(inputs) for inputs in made]


def gathers() -> list[Step]:
    made = [
        gather_inputs(form="fp8_ds_mla", lengths=(900, 3), page_size=64, seed=seed, device="cuda")
        for seed in range(STREAMS)
    ]
    return [lambda inputs=inputs: inputs.call() for inputs in made]


WORK: dict[str, Callable[[], list[Step]]] = {
    "decode portable": lambda: decodes(Way("portable")),
    "decode portable fp8": lambda: decodes(Way("portable"), stored="fp8"),
    "decode sm90": lambda: decodes(Way("sm90"), heads=128),
    "decode sm90 fp8_ds_mla": lambda: decodes(Way("sm90"), stored="fp8_ds_mla"),
    "prefill portable": lambda: prefills("portable"),
    "prefill sm90": lambda: prefills("sm90"),
    "merge": merges,
    "append": appends,
    "gather": gathers,
}


@pytest.mark.parametrize("threads", [False, True], ids=["one thread", "a thread each"])
@pytest.mark.parametrize("work", WORK)
def test_eight_streams_at_once(work, threads):
    """Each has the bits that it has alone, though all begin together and go on and on."""
    steps = WORK[work]()
    if not steps:
        pytest.skip("the Hopper kernel needs capability 9.0")
    alone = [step() for step in steps]
    torch.cuda.synchronize()
    different = [one for one in alone[1:] if not torch.equal(one[0], alone[0][0])]
    assert len(different) == STREAMS - 1, "streams would not be told apart"
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]

    def hold(stream: torch.cuda.Stream) -> None:
        """Until all have something to do: about 10 ms."""
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)

    def rounds(number: int) -> list[Any]:
        with torch.cuda.stream(streams[number]):
            return [steps[number]() for _ in range(ROUNDS)]

    for stream in streams:
        hold(stream)
    if threads:
        with ThreadPoolExecutor(STREAMS) as pool:
            found = list(pool.map(rounds, range(STREAMS)))
    else:
        found = [[] for _ in range(STREAMS)]
        for _, number in itertools.product(range(ROUNDS), range(STREAMS)):
            with torch.cuda.stream(streams[number]):
                found[number].append(steps[number]())
    torch.cuda.synchronize()
    for expected, results in zip(alone, found, strict=True):
        assert len(results) == ROUNDS
        for result in results:
            assert_same_bits(expected, result)
