"""Random problems of every operation, over a bounded set of kernels, and how each is judged.

What a kernel is compiled for (columns, dtypes, formats, heads, page sizes, masks, spacing of rows)
comes from the tables here; everything else is drawn: how many requests, their lengths, which pages
they have, values, slots, offsets. So nearly all of a long run is spent on running.

The problem of a number is the same in every run with the same seed, on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from ways import WAYS, Way, forced, is_refused

import mla_triton
from mla_triton import device as devices
from mla_triton import select
from mla_triton.kernels.sm90.decode_config import Config, is_valid
from mla_triton.testing import (
    AppendInputs,
    CacheMemory,
    append_inputs,
    assert_correct,
    budget_of,
    decode_inputs,
    deviations,
    gather_inputs,
    merge_inputs,
    plan_of,
    prefill_inputs,
    problem_of,
    run,
    same_bits,
)
from mla_triton.testing.budget import Budget, Inputs
from mla_triton.testing.caches import FORMS, append_errors

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INSIDE: dict[str, Any] = {"latent": 448, "value_dim": 512}
"""The rotary key inside the value."""

DECODES: tuple[dict[str, Any], ...] = (
    {"heads": 16, "dtype": BF16},
    {"heads": 16, "dtype": F16, "s_q": 2, "strided": 16},
    {"heads": 128, "dtype": BF16},
    {"heads": 128, "dtype": F16, "s_q": 2, "causal": False},
    {"heads": 20, "dtype": F16, "page_size": 32, "table": "csr"},
    {"heads": 5, "dtype": BF16, "page_size": 16, "layout": "pair", "table": "csr"},
    {"heads": 64, "dtype": BF16, "page_size": 128},
    {"heads": 32, "dtype": BF16, "page_size": 1},
    {"heads": 40, "dtype": F16, "page_size": 48, "s_q": 3},
    {"heads": 16, "dtype": BF16, "ragged": True},
    {"heads": 128, "dtype": F16, "ragged": True, "page_size": 16, "causal": False},
    {"heads": 40, "dtype": BF16, "layout": "pair", "strided": 16},
    {"heads": 16, "dtype": F16, "rope": 0},
    {"heads": 40, "dtype": BF16, "latent": 256, "rope": 32},
    {"heads": 40, "dtype": F16, "latent": 256, "rope": 64},
    {"heads": 8, "dtype": F32, "latent": 128, "rope": 32},
    {"heads": 2, "dtype": F32, "s_q": 2},
    {"heads": 64, "dtype": BF16, **INSIDE},
    {"heads": 16, "dtype": BF16, "strided": 3},
    {"heads": 16, "dtype": BF16, "stored": "fp8"},
    {"heads": 128, "dtype": F16, "stored": "fp8", "s_q": 2},
    {"heads": 24, "dtype": BF16, "stored": "fp8", "layout": "pair", "page_size": 32},
    {"heads": 5, "dtype": F16, "stored": "fp8", "ragged": True, "table": "csr", "page_size": 16},
    {"heads": 16, "dtype": BF16, "stored": "fp8_groups"},
    {"heads": 16, "dtype": BF16, "stored": "fp8_ds_mla"},
    {"heads": 24, "dtype": BF16, "stored": "fp8_ds_mla", "page_size": 32},
    {"heads": 128, "dtype": BF16, "stored": "fp8_ds_mla", "s_q": 2},
    {"heads": 64, "dtype": BF16, "stored": "fp8_v4", **INSIDE},
    {"heads": 8, "dtype": F16, "stored": "fp8_v41", **INSIDE},
    {"heads": 16, "dtype": BF16, "parts": 7},
    {"heads": 128, "dtype": BF16, "parts": 300},
    {"heads": 64, "dtype": F16, "parts": 1},
    {"heads": 16, "dtype": BF16, "batch_invariant": True},
    {"heads": 128, "dtype": F16, "batch_invariant": True, "s_q": 2},
    {"heads": 16, "dtype": BF16, "batch_invariant": True, "stored": "fp8"},
)
PREFILLS: tuple[dict[str, Any], ...] = (
    {"heads": 2, "dtype": BF16, "split_q": True, "split_k": True},
    {"heads": 32, "dtype": F16, "split_k": True},
    {"heads": 4, "dtype": BF16},
    {"heads": 4, "kv_heads": 2, "qk": 128, "dtype": F16},
    {"heads": 2, "qk": 256, "v_dim": 256, "dtype": F16, "split_k": True},
    {"heads": 3, "qk": 96, "rope": 32, "v_dim": 64, "dtype": F32},
    {"heads": 2, "qk": 96, "rope": 32, "v_dim": 64, "dtype": BF16, "strided": True},
    {"heads": 4, "dtype": BF16, "split_k": True, "strided": 16},
    {"heads": 4, "dtype": F16, "strided": 3},
    {"heads": 2, "dtype": BF16, "split_k": True, "batch_invariant": True},
)
MERGES: tuple[dict[str, Any], ...] = (
    {"heads": 16, "dtype": BF16},
    {"heads": 5, "dtype": F16, "value_dim": 128, "masked": True},
    {"heads": 8, "dtype": F32, "value_dim": 96, "strided": 3},
    {"heads": 16, "dtype": BF16, "stacked": True},
    {"heads": 3, "dtype": BF16, "first_dtype": F32, "masked": True},
)
STATES = {False: (2, 3, 8), True: (2, 7, 12)}
"""By whether they are a stack, which may have any number."""
APPENDS: tuple[dict[str, Any], ...] = tuple(
    {"form": form, "norm": norm, "rotation": rotation}
    for form in FORMS
    for norm, rotation in ((None, None), (F32, "half"), (BF16, "interleaved"))
)
GATHERS: tuple[dict[str, Any], ...] = tuple(
    {"form": form, "csr": csr, "page_size": size}
    for form in FORMS
    for csr, size in ((False, 16), (True, 64))
)
COPIES = (41984, 37440, 1001)
"""Bytes of a page."""

OFTEN = {"decode": 10, "prefill": 4, "merge": 2, "append": 2, "gather": 1, "copy_pages": 1}


class Size(NamedTuple):
    """How large problems may be."""

    keys: int
    """Of all requests of a decode."""
    batches: tuple[int, ...]
    tokens: int
    """Queries of a prefill's sequence, and keys; tokens of a merge, an append or a gather."""


ON_GPU = Size(16000, (1, 2, 5, 24), 600)
INTERPRETED = Size(120, (1, 2), 24)


@dataclass(frozen=True)
class Drawn:
    """A problem that is not made yet."""

    operation: str
    recipe: dict[str, Any]
    """Arguments of the operation's factory."""
    options: dict[str, Any]
    """Of the call, and `parts`."""

    def __str__(self) -> str:
        values = (self.recipe | self.options).items()
        return f"{self.operation}({', '.join(f'{name}={value!r}' for name, value in values)})"


class Finding(NamedTuple):
    """What came of a problem by one way to compute it."""

    label: str
    """The operation, and by what."""
    ratio: float
    """The largest error over its budget; 0 where what is asked for is equal bits."""
    wrong: str
    """ "" where nothing is."""


def draw(seed: int, number: int, size: Size) -> Drawn:
    """The problem of a number."""
    random = Random(f"{seed} {number}")
    (operation,) = random.choices(list(OFTEN), list(OFTEN.values()))
    recipe = {"decode": _decode, "prefill": _prefill, "merge": _merge, "append": _append,
              "gather": _gather, "copy_pages": _copy}[operation](random, size)  # fmt: skip
    options = {name: recipe.pop(name) for name in ("parts", "batch_invariant") if name in recipe}
    return Drawn(operation, {**recipe, "seed": random.randrange(2**31)}, options)


def judge(drawn: Drawn, device: torch.device) -> Iterator[Finding]:
    """A problem by everything that takes it."""
    by: dict[str, Callable[[Drawn, torch.device], Iterator[Finding]]] = {
        "decode": _judge_decode, "prefill": _judge_prefill, "merge": _judge_merge,
        "append": _judge_append, "gather": _judge_gather, "copy_pages": _judge_copy,
    }  # fmt: skip
    yield from by[drawn.operation](drawn, device)


# -- what is drawn


def _lengths(random: Random, count: int, total: int) -> list[int]:
    """Of so many requests, with so many keys together at most."""
    lengths: list[int] = []
    for _ in range(count):
        most = total - sum(lengths)
        border = 64 * random.randint(0, max(1, most // 64)) + random.randint(-1, 1)
        shorter = int(most ** random.random())
        even = random.randint(0, max(1, most // count))
        chosen = random.choice((0, 1, border, shorter, shorter, even, even, even))
        lengths.append(max(0, min(chosen, most)))
    random.shuffle(lengths)
    return lengths


def _logits(random: Random) -> str:
    return random.choice(("normal",) * 5 + ("large", "equal_keys", "dominant_key"))


def _decode(random: Random, size: Size) -> dict[str, Any]:
    recipe = dict(random.choice(DECODES))
    batch = random.choice(size.batches)
    total = size.keys // random.choice((1, 3, 20, 20))
    recipe["kv_lens"] = _lengths(random, batch, total)
    if recipe.pop("ragged", False):
        recipe["q_lens"] = [random.choice((0, 1, 1, 2, 3, size.tokens // 8)) for _ in range(batch)]
        # The oracle has every query's logits at once.
        recipe["kv_lens"] = [min(n, size.keys // 8) for n in recipe["kv_lens"]]
    return {"causal": random.random() < 0.8, **recipe, "logits": _logits(random)}


def _prefill(random: Random, size: Size) -> dict[str, Any]:
    recipe, batch = dict(random.choice(PREFILLS)), random.randint(1, 4)
    q_lens = _lengths(random, batch, size.tokens)
    k_lens = q_lens
    if random.random() < 0.7:
        k_lens = _lengths(random, batch, 3 * size.tokens)
    more = {"q_lens": q_lens, "k_lens": k_lens, "causal": random.random() < 0.6}
    constant = random.random() < 0.1
    return {**recipe, **more, "logits": _logits(random), "constant_values": constant}


def _merge(random: Random, size: Size) -> dict[str, Any]:
    recipe = random.choice(MERGES)
    return {
        **recipe,
        "states": random.choice(STATES["stacked" in recipe]),
        "tokens": (random.randint(1, size.tokens),),
        "empty": random.choice((0.0, 0.2, 0.9)),
        "spread": random.choice(("near", "far", "equal")),
        "level": random.choice((0.0, 500.0, -500.0)),
    }


def _append(random: Random, size: Size) -> dict[str, Any]:
    return {
        **random.choice(APPENDS),
        "tokens": random.randint(1, random.choice((16, 3 * size.tokens))),
        "pages": random.randint(1, 40),
        "page_size": random.choice((16, 64)),
        "scale": random.choice((1.0, 1e-3, 300.0)),
        "power_of_two": random.random() < 0.5,
    }


def _gather(random: Random, size: Size) -> dict[str, Any]:
    lengths = _lengths(random, random.choice(size.batches), 3 * size.tokens)
    starts = None
    if random.random() < 0.5:
        starts = tuple(random.randint(-3, 40) for _ in lengths)
    return {**random.choice(GATHERS), "lengths": tuple(lengths), "starts": starts}


def _copy(random: Random, size: Size) -> dict[str, Any]:
    return {"page_bytes": random.choice(COPIES), "pages": random.randint(1, 60)}


# -- how it is judged


def _against_budget(
    label: str, inputs: Inputs, compute: Callable[[Any], Any], budget: Budget
) -> Finding:
    """Twice, into buffers of NaN: within the budget, the same bits, nothing else written."""
    states = []

    def keep(given: Any) -> Any:
        states.append(compute(given))
        return states[-1]

    try:
        assert_correct(inputs, keep, budget=budget)
    except AssertionError as error:
        return Finding(label, float("nan"), str(error).partition("\n")[0])
    found = deviations(states[0], inputs, budget).values()
    return Finding(label, max(each.worst for each in found), "")


def _judge_decode(drawn: Drawn, device: torch.device) -> Iterator[Finding]:
    inputs = decode_inputs(**drawn.recipe, device=device)
    budget = budget_of(inputs)
    problem: Any = problem_of(inputs)
    options = dict(drawn.options)
    parts = options.pop("parts", None)

    def by(way: Way) -> Callable[[Any], Any]:
        def compute(given: Any) -> Any:
            arguments, own = given.call_arguments()
            plan = None if parts is None else plan_of(given, way.impl, parts)
            return mla_triton.decode(
                *arguments, **own, **given.output_buffers(), plan=plan, impl=way.impl, **options
            )

        return compute

    for way in WAYS if device.type == "cuda" else WAYS[:1]:
        if is_refused(inputs, way):
            continue
        # A problem that has no such form would run in the other one again.
        if way.blocks and not is_valid(Config(way.blocks), problem, devices.of(device))[0]:
            continue
        with forced(way):
            yield _against_budget(f"decode {way}", inputs, by(way), budget)


def _judge_prefill(drawn: Drawn, device: torch.device) -> Iterator[Finding]:
    inputs = prefill_inputs(**drawn.recipe, device=device)
    budget = budget_of(inputs)

    def by(impl: str) -> Callable[[Any], Any]:
        def compute(given: Any) -> Any:
            arguments, own = given.call_arguments()
            buffers = given.output_buffers()
            return mla_triton.prefill(*arguments, **own, **buffers, impl=impl, **drawn.options)

        return compute

    problem: Any = problem_of(inputs)
    here = devices.of(inputs.q.device)
    for impl in ("portable", "sm90"):
        if impl == "portable" or select.why_not_sm90_prefill(problem, here, impl) is None:
            yield _against_budget(f"prefill {impl}", inputs, by(impl), budget)


def _judge_merge(drawn: Drawn, device: torch.device) -> Iterator[Finding]:
    inputs = merge_inputs(**drawn.recipe, device=device)
    yield _against_budget(
        "merge", inputs, lambda given: run(given, impl="portable"), budget_of(inputs)
    )


def _appended(inputs: AppendInputs) -> CacheMemory:
    made = inputs.fresh()
    arguments, options = made.call_arguments()
    mla_triton.append(*arguments, **options, impl="portable")
    return made.memory.to("cpu")


def _judge_append(drawn: Drawn, device: torch.device) -> Iterator[Finding]:
    """Byte for byte the reference on the CPU; within a budget where something is fused."""
    inputs = append_inputs(**drawn.recipe, device=device)
    there = append_inputs(**drawn.recipe)
    got, again = _appended(inputs), _appended(inputs)
    wrong, ratio = [], 0.0
    if got.differs(again):
        wrong.append(f"two runs differ in {got.differs(again)} bytes")
    if drawn.recipe["norm"] is None and drawn.recipe["rotation"] is None:
        differing = got.differs(there.expected())
        if differing:
            wrong.append(f"{differing} bytes are not the reference's")
    else:
        error, allowed = append_errors(got, there)
        over = error > allowed
        if not error.isfinite().all() or over.any():
            wrong.append(f"{int(over.sum())} numbers are past their budget")
        shares = torch.where(error > 0, error / allowed, 0.0)
        ratio = float(shares.amax()) if shares.numel() else 0.0
    yield Finding("append", ratio, "; ".join(wrong))


def _judge_gather(drawn: Drawn, device: torch.device) -> Iterator[Finding]:
    """Bit for bit the reference on the CPU."""
    inputs = gather_inputs(**drawn.recipe, device=device)
    expected = gather_inputs(**drawn.recipe).expected()
    got, again = inputs.call(impl="portable"), inputs.call(impl="portable")
    wrong = [] if same_bits(got, again) else ["two runs are not the same"]
    if not same_bits([None if t is None else t.cpu() for t in got], expected):
        wrong.append("rows are not the reference's")
    yield Finding("gather", 0.0, "; ".join(wrong))


def _judge_copy(drawn: Drawn, device: torch.device) -> Iterator[Finding]:
    pages, size = drawn.recipe["pages"], drawn.recipe["page_bytes"]
    generator = torch.Generator().manual_seed(drawn.recipe["seed"])
    source, target = (
        torch.randint(256, (pages, size), dtype=torch.uint8, generator=generator) for _ in range(2)
    )
    # Some are none of the cache.
    ids = [torch.randperm(pages + 10, generator=generator)[:pages] - 5 for _ in range(2)]
    expected = target.clone()
    inside = ((ids[0] >= 0) & (ids[0] < pages)) & ((ids[1] >= 0) & (ids[1] < pages))
    expected[ids[1][inside]] = source[ids[0][inside]]
    there, moved = source.to(device), [each.to(device) for each in ids]
    got = [target.to(device, copy=True) for _ in range(2)]
    for into in got:
        mla_triton.copy_pages(there, into, *moved, impl="portable")
    wrong = [] if torch.equal(*got) else ["two runs are not the same"]
    if not torch.equal(got[0].cpu(), expected):
        wrong.append("pages are not those that were copied")
    if not torch.equal(there.cpu(), source):
        wrong.append("what was copied has changed")
    yield Finding("copy_pages", 0.0, "; ".join(wrong))
