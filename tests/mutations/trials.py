"""The fixed problems that bugs are planted under, and the checks of the suite as a number each.

A trial runs an operation over one problem and judges the result as the tests of that operation do:
decode, prefill and merge by `mla_triton.testing.compare`, and by the NaN between rows; append by
the bytes of the reference and the budget of its numbers; gather bit for bit. Beside that it says
whether a comparison as other libraries' tests make it, `torch.allclose` with 1e-2, would have seen
anything: over the same problem, and over one that such tests have.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from math import inf
from types import ModuleType
from typing import Any, NamedTuple

import torch
from given_configs import choosing
from mutants import MUTANTS
from planting import planted

import mla_triton
from mla_triton import device as devices
from mla_triton.configs import Choice
from mla_triton.device import Device
from mla_triton.testing import (
    AppendInputs,
    Budget,
    DecodeInputs,
    MergeInputs,
    PrefillInputs,
    append_inputs,
    compare,
    decode_inputs,
    gather_inputs,
    merge_inputs,
    prefill_inputs,
    same_bits,
    untouched_padding,
)
from mla_triton.testing.budget import budget_of
from mla_triton.testing.caches import append_errors

COMPILED = torch.cuda.is_available() and not devices.interpreting()
DEVICE = "cuda" if COMPILED else "cpu"
NO_RESERVE = 0x4000
"""Linux: memory that is counted where it is touched."""
LOOSE = 1e-2
"""The absolute and relative tolerance of many a test of attention."""


class Verdict(NamedTuple):
    """What was found in a result."""

    caught_by: str
    """The check that failed by most; empty where none did."""
    ratio: float
    """Error by budget of the row that is furthest past it; infinite where a number is none, and
    where none is expected."""
    is_seen_by_allclose: bool


def verdict(ratios: dict[str, float], strange: str, got: Any, exact: Any) -> Verdict:
    """`strange` is what fails beside the ratios, such as NaN; it says more than they do."""
    worst = max(ratios, key=ratios.__getitem__)
    caught_by = strange or (worst if ratios[worst] > 1 else "")
    close = all(
        torch.allclose(one.double(), other.double(), LOOSE, LOOSE, equal_nan=True)
        for one, other in zip(got, exact, strict=True)
    )
    return Verdict(caught_by, ratios[worst], not close)


# -- attention


def judge_state(
    state: mla_triton.AttentionState,
    inputs: DecodeInputs | PrefillInputs | MergeInputs,
    budget: Budget,
) -> Verdict:
    report, kinds = compare(state, inputs, budget), ("out", "out_rms", "lse")
    pairs = {k: (getattr(report, f"{k}_error"), getattr(report, f"{k}_budget")) for k in kinds}
    of_out = max(ratio(*pairs["out"]), ratio(*pairs["out_rms"]))
    ratios, strange = {"out": of_out, "lse": ratio(*pairs["lse"])}, ""
    if not report.ok and report.out_error != report.out_error:
        strange, ratios = "NaN or infinity", dict.fromkeys(ratios, inf)
    elif not (untouched_padding(state.out) and untouched_padding(state.lse)):
        strange = "what lies between rows"
    assert report.ok == (max(ratios.values()) <= 1), report
    return verdict(ratios, strange, state, budget.exact)


def ratio(error: float, budget: float) -> float:
    return error / budget if budget > 0 else (inf if error > 0 else 0.0)


def decode(
    inputs: DecodeInputs, parts: int | None, is_zeroed: bool = False, impl: str = "portable"
) -> mla_triton.AttentionState:
    arguments, options = inputs.call_arguments()
    made = {}
    if parts is not None:
        q_rope = inputs.q_rope
        made["plan"] = plan = mla_triton.plan(
            inputs.kv_lens,
            heads=inputs.q_nope.shape[-2],
            latent=inputs.q_nope.shape[-1],
            rope=0 if q_rope is None else q_rope.shape[-1],
            dtype=inputs.dtype,
            s_q=inputs.q_nope.shape[1],
            parts=parts,
            impl=impl,
        )
        if is_zeroed:
            plan.partial_out.zero_()
            plan.partial_lse.zero_()
    buffers = inputs.output_buffers()
    return mla_triton.decode(*arguments, **options, **buffers, **made, impl=impl)


def prefill(inputs: PrefillInputs, impl: str = "portable") -> mla_triton.AttentionState:
    arguments, options = inputs.call_arguments()
    return mla_triton.prefill(*arguments, **options, **inputs.output_buffers(), impl=impl)


def merge(inputs: MergeInputs) -> mla_triton.AttentionState:
    arguments, options = inputs.call_arguments()
    return mla_triton.merge(*arguments, **options, **inputs.output_buffers(), impl="portable")


@contextmanager
def configured_as(label: str | None) -> Iterator[None]:
    """Inside, decode and prefill have the configs of another card, wherever they run."""
    if label is None:
        yield
        return
    card = devices.from_label(label)

    def choose(implementation: ModuleType, problem: Any, device: Device, *rows: int) -> Choice:
        return Choice(
            implementation.heuristic(problem, card, *rows), "user", "said by a test", None
        )

    with choosing(choose):
        yield


def without_nan(cache: torch.Tensor) -> torch.Tensor:
    """As a test has it that fills a whole cache, or clears it: nothing punishes a stray read."""
    return cache.nan_to_num(0.0)


def spread_out(cache: torch.Tensor, what: str) -> torch.Tensor:
    """`[pages, page_size, columns]` whose last pages, or slots, begin at element 2**31 and later.

    Behind as much memory again, so that an offset that wraps around in 32 bits is in it, too, and
    finds no key. Without a GPU it is memory that is never touched, and so takes none.
    """
    pages, page_size, columns = cache.shape

    def align(step: int) -> int:
        return -(-step // 16) * 16

    if what == "pages":
        strides = (align(2**31 // (pages // 2)), columns, 1)
    else:
        strides = (columns, align(2**31 // (page_size // 2)), 1)
    reach = sum(step * (size - 1) for step, size in zip(strides, cache.shape, strict=True)) + 1
    size = (2**31 + reach) * cache.element_size()
    if cache.is_cuda:
        memory = torch.zeros(size, dtype=torch.uint8, device=cache.device)
    else:
        reserved = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        memory = torch.frombuffer(reserved, dtype=torch.uint8)
    made = memory.view(cache.dtype).as_strided(cache.shape, strides, 2**31)
    made.copy_(cache)
    return made


# -- a cache's tokens


def judge_append(inputs: AppendInputs) -> Verdict:
    made = inputs.fresh()
    arguments, options = made.call_arguments()
    mla_triton.append(*arguments, **options, impl="portable")
    error, allowed = append_errors(made.memory, inputs)
    share = torch.where(error > 0, error / allowed, 0.0).nan_to_num(inf)
    expected = inputs.expected()
    fused = {"norm_weight", "cos_sin"} & set(inputs.options)
    different = "" if fused or not made.memory.differs(expected) else "bytes of the reference"
    slots, rope = inputs.slots.long()[inputs.written], 64
    pair = (memory.values(slots, rope) for memory in (made.memory, expected))
    return verdict({"stored numbers": float(share.max())}, different, *([t] for t in pair))


def judge_gather(**recipe: Any) -> Verdict:
    inputs = gather_inputs(**recipe)
    got, expected = inputs.call(impl="portable"), inputs.expected()
    different = "" if same_bits(got, expected) else "bits of the reference"
    reached = ([rows[: inputs.reached] for rows in pair] for pair in (got, expected))
    return verdict({"": 0.0}, different, *reached)


# -- the problems

Judge = Callable[[torch.dtype], Verdict]
SMALL = {"heads": 4, "latent": 128, "rope": 32, "page_size": 16}


@cache
def decode_problem(
    dtype: torch.dtype, is_ordinary: bool, larger: int, **recipe: Any
) -> tuple[Any, Budget]:
    inputs = decode_inputs(dtype=dtype, device=DEVICE, **{**SMALL, **recipe})
    if larger:
        q_nope, q_rope = (query / 2**larger for query in (inputs.q_nope, inputs.q_rope))
        inputs = replace(inputs, cache=inputs.cache * 2**larger, q_nope=q_nope, q_rope=q_rope)
    if is_ordinary:
        inputs = replace(inputs, cache=without_nan(inputs.cache))
    return inputs, budget_of(inputs)


@cache
def other_problem(make: Callable[..., Any], dtype: torch.dtype, **recipe: Any) -> Any:
    inputs = make(dtype=dtype, device=DEVICE, **recipe)
    return inputs, budget_of(inputs)


def of_decode(
    parts: int | None = None,
    is_ordinary: bool = False,
    far: str | None = None,
    larger: int = 0,
    config_of: str | None = None,
    **recipe: Any,
) -> Judge:
    """`larger` is a power of two that values are multiplied by, and queries divided by."""

    def judge(dtype: torch.dtype) -> Verdict:
        inputs, budget = decode_problem(dtype, is_ordinary, larger, **recipe)
        if far is not None:
            inputs = replace(inputs, cache=spread_out(inputs.cache, far))
        with configured_as(config_of):
            return judge_state(decode(inputs, parts, is_ordinary), inputs, budget)

    return judge


def of_others(run: Callable[[Any], Any], make: Callable[..., Any], **recipe: Any) -> Judge:
    def judge(dtype: torch.dtype) -> Verdict:
        inputs, budget = other_problem(make, dtype, **recipe)
        return judge_state(run(inputs), inputs, budget)

    return judge


of_prefill = partial(of_others, prefill, prefill_inputs)
of_merge = partial(of_others, merge, merge_inputs)


def of_append(**recipe: Any) -> Judge:
    return lambda dtype: judge_append(append_inputs(dtype=dtype, device=DEVICE, **recipe))


def of_gather(**recipe: Any) -> Judge:
    return lambda dtype: judge_gather(dtype=dtype, device=DEVICE, **recipe)


TRIALS: dict[str, Judge] = {
    "decode": of_decode(kv_lens=(150, 0, 128, 1), s_q=2, strided=True, parts=1),
    "decode, all keys": of_decode(kv_lens=(200, 37), causal=False, parts=1),
    "decode, split": of_decode(kv_lens=(400, 20), parts=8),
    "decode, large logits": of_decode(kv_lens=(150, 40), logits="large"),
    "decode, large values": of_decode(kv_lens=(200,), logits="equal_keys", larger=12, parts=1),
    "decode, the config of 8.9": of_decode(kv_lens=(150, 128), config_of="8.9", parts=1),
    "decode, many keys": of_decode(kv_lens=(4000,), heads=16, latent=64, rope=16, parts=1),
    "decode, two scales": of_decode(kv_lens=(150, 37), stored="fp8"),
    "decode, scales of groups": of_decode(
        kv_lens=(150, 37), stored="fp8_groups", latent=256, rope=64
    ),
    "decode, pages far apart": of_decode(kv_lens=(40,), far="pages"),
    "decode, slots far apart": of_decode(kv_lens=(40,), far="slots"),
    "prefill": of_prefill(
        q_lens=(70, 3, 0), k_lens=(150, 40, 9), heads=2, split_k=True, strided=True
    ),
    "prefill, many keys": of_prefill(
        q_lens=(32,), k_lens=(2000,), heads=1, qk=64, v_dim=64, rope=32, causal=False
    ),
    "prefill, large logits": of_prefill(q_lens=(40,), heads=2, logits="large"),
    "merge": of_merge(states=3, heads=4, value_dim=128),
    "merge, far apart": of_merge(states=3, heads=4, value_dim=128, spread="far", level=300.0),
    "merge, a stack with a mask": of_merge(
        states=60, tokens=(9,), heads=4, value_dim=128, stacked=True, masked=True
    ),
    "append": of_append(form="pair", tokens=40, seed=1),
    "append, norm and rotation": of_append(
        form="fused", latent=96, norm=torch.float32, rotation="interleaved", scale=3e-3
    ),
    "append, scales of groups": of_append(form="groups", tokens=40, power_of_two=False),
    "gather": of_gather(lengths=(9, 0, 20, 7), starts=(0, 0, 2, -1), seed=3),
    "gather, scales of groups": of_gather(form="groups", lengths=(9, 0, 20, 7)),
}
ORDINARY: dict[str, Judge] = {
    "decode": of_decode(kv_lens=(256, 64), page_size=64, parts=3, is_ordinary=True),
    "prefill": of_prefill(q_lens=(64, 64), heads=1),
    "merge": of_merge(states=2, heads=4, value_dim=128, empty=0.0),
}
"""What a test has that nobody made hostile: a query token a request, whole pages, no NaN."""


class Finding(NamedTuple):
    """What is found of a bug in one dtype."""

    verdict: Verdict
    is_seen_on_ordinary_data: bool | None
    """By `torch.allclose`; None where there is no such problem."""


def ordinary_of(trial: str) -> Judge | None:
    operation, _, rest = trial.partition(", ")
    return None if "scales" in rest else ORDINARY.get(operation)


@cache
def without_bug(trial: str, dtype: torch.dtype) -> Verdict:
    return TRIALS[trial](dtype)


def with_bug(name: str, dtype: torch.dtype) -> Verdict:
    with planted(MUTANTS[name].edits):
        return TRIALS[MUTANTS[name].trial](dtype)


def find(name: str, dtype: torch.dtype) -> Finding:
    """The verdicts about a kernel with a bug."""
    trial = MUTANTS[name].trial
    ordinary = ordinary_of(trial)
    with planted(MUTANTS[name].edits):
        seen = None if ordinary is None else ordinary(dtype).is_seen_by_allclose
        return Finding(TRIALS[trial](dtype), seen)
