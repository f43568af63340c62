"""Calls as an engine makes them, up to the kernels they ask for; and a process that serves them.

    python warm_child.py LABEL SEED CALLS DESCRIPTION

DESCRIPTION is the JSON of a deployment, as `mla_triton.warmup` takes it. Every kernel that the
calls ask for is made ready for the card LABEL, launching none. Prints JSON: the keys of what Triton
found in its cache and of what it compiled, the names of the latter, and the kernels of a warm-up.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import engine_caches
import torch
import triton

from mla_triton import configs, select, validate, validate_merge, validate_prefill
from mla_triton import device as devices
from mla_triton.cache import FP8_DS_MLA, LatentCache
from mla_triton.device import Device
from mla_triton.kernels.common.launch import Variant
from mla_triton.ops import decode as operation
from mla_triton.ops import merge as merging
from mla_triton.ops import prefill as prefilling
from mla_triton.ops.plan import cut, schedule_launcher
from mla_triton.problem import DecodeProblem
from mla_triton.tuning import warm
from mla_triton.tuning.deployment import Deployment, describe

TOKENS = (1, 7, 1024, 5000)
"""That an append or a gather is of."""


def made(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def queries_of(
    deployment: Deployment, tokens: int, dtype: torch.dtype, draw: random.Random
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[tokens, heads, ...] queries as a model computes them."""
    heads, latent, rope = deployment.heads, deployment.latent, deployment.rope
    how = draw.choice(deployment.queries)
    if how == "joined":
        q_nope, q_rope = made(tokens, heads, latent + rope, dtype=dtype).split([latent, rope], -1)
    else:
        nope = deployment.nope or 16
        projected = made(tokens, heads, nope + rope, dtype=dtype)
        before, q_rope = projected.split([nope, rope], -1)
        absorb = made(heads, nope, latent, dtype=dtype)
        q_nope = torch.bmm(before.transpose(0, 1), absorb).transpose(0, 1)
        if how == "split":
            q_nope = q_nope.contiguous()
        is_rotated_in_place = deployment.nope and draw.random() < 0.5
        if not is_rotated_in_place:
            q_rope = q_rope.contiguous()
    return q_nope, q_rope if rope else None


def call(deployment: Deployment, draw: random.Random) -> DecodeProblem:
    """What one call of a deployment is to the package."""
    dtype, page_size = draw.choice(deployment.dtypes), draw.choice(deployment.page_sizes)
    layout, table = draw.choice(deployment.layouts), draw.choice(deployment.tables)
    latent, rope = deployment.latent, deployment.rope
    most = deployment.max_batch
    batch = draw.choice([1, draw.randint(1, most), draw.randint(1, min(4, most)), most])
    if deployment.ragged:
        tokens = draw.randint(1, batch * max(deployment.s_q))
    else:
        s_q = draw.choice(deployment.s_q)
        tokens = batch * s_q
    q_nope, q_rope = queries_of(deployment, tokens, dtype, draw)
    if not deployment.ragged:
        q_nope = q_nope.unflatten(0, (batch, s_q))
        q_rope = None if q_rope is None else q_rope.unflatten(0, (batch, s_q))
    longest = draw.choice([deployment.max_len, draw.randint(1, deployment.max_len)])
    pages = -(-longest // page_size)
    bound = draw.choice([None, longest, draw.randint(1, longest)])
    indptr = None
    if table == "dense":
        page_table = made(batch, pages)
    else:
        page_table, indptr = made(draw.choice([pages, pages * batch])), made(batch + 1)
    fused = layout == "fused" or rope == 0
    stored = draw.choice(deployment.cache_formats)
    kind = dtype if stored == "16bit" else torch.float8_e4m3fn
    cache = LatentCache(
        made(9, page_size, latent + rope if fused else latent, dtype=kind),
        None if fused else made(9, page_size, rope, dtype=kind),
        None if stored == "16bit" else made(2, dtype=torch.float32),
    )
    if stored == "fp8_ds_mla":
        cache = FP8_DS_MLA.views(made(9, 656 * page_size, dtype=torch.uint8), page_size)
    return validate.decode(
        q_nope,
        q_rope,
        *cache,
        page_table,
        indptr,
        made(batch),
        made(batch + 1) if deployment.ragged else None,
        made(*q_nope.shape[:-1], deployment.value_dim, dtype=dtype),
        made(*q_nope.shape[:-1], dtype=torch.float32),
        softmax_scale=1.0,
        causal=deployment.causal,
        value_dim=deployment.value_dim,
        max_kv_len=bound,
        allow_tf32=False,
        batch_invariant=deployment.batch_invariant,
        has_memory=False,
    )


def kernels_of(problem: DecodeProblem, device: Device) -> Iterator[Variant]:
    """The kernels that a call launches, found as `mla_triton.decode` finds them: one that makes its
    own schedule, and one that is given a plan."""
    length = configs.length_bucket(problem.max_kv_len)
    for like in (None, cut(problem.as_planned(), device, None, None)):
        implementation = select.decode(problem, device, None, like).module
        ready = operation.prepare(implementation, problem, device, None, like, length)
        assert like in (None, ready.geometry)
        tile, fixed = ready.geometry.kv_tile, ready.geometry.fixed
        yield schedule_launcher(problem.batch, problem.ragged, tile, device, None, fixed).variant
        yield ready.kernel.variant
        if ready.geometry.parts > 1:
            yield ready.combine.variant


def merge_of(deployment: Deployment, draw: random.Random, device: Device) -> Variant:
    """The kernel of a merge of two states that calls of a deployment leave."""
    batch, s_q = draw.randint(1, deployment.max_batch), draw.choice(deployment.s_q)
    tokens = (batch * s_q,) if deployment.ragged else (batch, s_q)
    rows = (*tokens, deployment.heads)
    widths = [deployment.value_dim, *([deployment.v] if deployment.prefill_tokens else [])]
    out = made(*rows, draw.choice(widths), dtype=draw.choice(deployment.dtypes))
    lse = made(*rows, dtype=torch.float32)
    mask = draw.choice([None, made(*tokens, dtype=torch.bool)])
    problem = validate_merge.described([out] * 2, [lse] * 2, mask, out, lse)
    module = select.choose_merge(problem, device).module
    return merging.prepare(module, problem, device, None).kernel.variant


def prefill_of(deployment: Deployment, draw: random.Random, device: Device) -> Variant:
    """The kernel of a prefill of a deployment: of prompts by themselves, or of what is before."""
    heads, nope, rope, v = deployment.heads, deployment.nope, deployment.rope, deployment.v
    dtype = draw.choice(deployment.dtypes)
    batch = draw.randint(1, deployment.max_batch)
    queries = draw.choice([draw.randint(0, batch), draw.randint(1, deployment.prefill_tokens)])
    keys = draw.randint(0, batch * deployment.max_len)
    query = made(queries, heads, nope + rope, dtype=dtype)
    split = "split" in deployment.queries and draw.random() < 0.5
    q, q_rope = (query[..., :nope], query[..., nope:]) if split else (query, None)
    k, values = made(keys, heads, nope + v, dtype=dtype).split([nope, v], -1)
    offsets = made(batch + 1)
    problem = validate_prefill.prefill(
        q, q_rope, k, made(keys, rope, dtype=dtype), values, offsets, offsets,
        made(queries, heads, v, dtype=dtype), made(queries, heads, dtype=torch.float32),
        softmax_scale=1.0, causal=deployment.causal and draw.random() < 0.5,
        max_seqlen_q=draw.choice([None, queries]), has_memory=False,
    )  # fmt: skip
    module = select.choose_prefill(problem, device).module
    return prefilling.prepare(module, problem, device, None).kernel.variant


def asked_for(deployment: Deployment, device: Device, seed: int, calls: int) -> list[Variant]:
    """The kernels of so many calls, each once."""
    draw = random.Random(seed)
    problems = [call(deployment, draw) for _ in range(calls)]
    asked = dict.fromkeys(v for problem in problems for v in kernels_of(problem, device))
    asked |= dict.fromkeys(merge_of(deployment, draw, device) for _ in range(calls // 4))
    if deployment.prefill_tokens:
        asked |= dict.fromkeys(prefill_of(deployment, draw, device) for _ in range(calls // 4))
    asked |= dict.fromkeys(engine_caches.kernels_of(deployment, TOKENS, device))
    return list(asked)


def plain(variant: Variant) -> list[Any]:
    return [warm.name_of(variant), variant.types, variant.constants, sorted(variant.aligned)]


def main(label: str, seed: str, calls: str, description: str) -> None:
    device, deployment = devices.from_label(label), describe(**json.loads(description))
    found: list[str] = []
    compiled: list[str] = []

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        (found if cache_hit else compiled).append(metadata["hash"])

    triton.knobs.compilation.listener = listen
    names = []
    for variant in asked_for(deployment, device, int(seed), int(calls)):
        before = len(compiled)
        variant.compile(device)
        names += [warm.name_of(variant)] * (len(compiled) - before)
    warmed = [plain(variant) for variant in warm.variants(deployment, device)]
    told = {"found": found, "compiled": compiled, "names": names, "warmed": warmed}
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
