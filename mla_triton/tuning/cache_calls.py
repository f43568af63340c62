"""The appends, gathers and copies of pages that an engine makes over the caches of a deployment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mla_triton.cache import LatentCache
from mla_triton.problem_cache import FEW_TOKENS, AppendProblem, CopyProblem, GatherProblem
from mla_triton.tuning.deployment import Deployment, made_without_memory
from mla_triton.validate import Facts, facts
from mla_triton.validate_append import AppendCall, append_of
from mla_triton.validate_copy import CopyCall, cache_parts, copy_of
from mla_triton.validate_gather import GatherCall, gather_of
from mla_triton.validate_stored import facts_of

COUNTS = (FEW_TOKENS, FEW_TOKENS + 1)
"""Tokens of a call, on both sides of where another config is taken."""
POSITIONS = 2
"""Rows of a table of angles, as far as its layout shows."""


def _facts(*shape: int, kind: torch.dtype) -> Facts:
    return facts(made_without_memory(*shape, kind=kind))


def appends(deployment: Deployment, counts: Sequence[int] = COUNTS) -> Iterator[AppendProblem]:
    """Tokens as views of one projection, to int64 slots; as they are, and through a norm and a
    rotation, angles in float32 and in the tokens' dtype."""
    for dtype, _, cache in deployment.caches():
        for tokens in counts:
            for form in deployment.appends:
                angles = () if form == "plain" or not deployment.rope else (torch.float32, dtype)
                for angle in dict.fromkeys(angles or (None,)):
                    yield _append(deployment, dtype, cache, tokens, form, angle)


def _append(
    deployment: Deployment,
    dtype: torch.dtype,
    cache: LatentCache,
    tokens: int,
    form: str,
    angle: torch.dtype | None,
) -> AppendProblem:
    latent, rope = deployment.latent, deployment.rope
    projected = made_without_memory(tokens, latent + rope, kind=dtype)
    call = AppendCall(
        cache=facts_of(cache),
        latent=facts(projected[:, :latent]),
        rope=facts(projected[:, latent:]) if rope else None,
        slots=_facts(tokens, kind=torch.int64),
        norm_weight=None if form == "plain" else _facts(latent, kind=dtype),
        cos_sin=None if angle is None else _facts(POSITIONS, rope, kind=angle),
        positions=None if angle is None else _facts(tokens, kind=torch.int64),
        style="interleaved" if form == "plain" else form,
        power_of_two=True,
        aligned=True,
    )
    problem: AppendProblem = append_of(call).problem
    return problem


def gathers(deployment: Deployment, counts: Sequence[int] = COUNTS) -> Iterator[GatherProblem]:
    """Rows in the queries' dtype, from the first key of each request on and from a later one; the
    rotary keys apart and, where they may, behind the latents."""
    for dtype, _, cache in deployment.caches():
        apart = [(deployment.latent, deployment.rope)]
        # Of one tensor with a scale for its keys alone, the columns cannot come in one result.
        is_scaled_apart = cache.scales is not None and cache.scales.dim() == 1
        if cache.kpe is None and deployment.rope and not is_scaled_apart:
            apart.append((deployment.latent + deployment.rope, 0))
        for widths in apart:
            for table in deployment.tables:
                for has_starts in (False, True):
                    for rows in counts:
                        yield _gather(dtype, cache, widths, table == "csr", has_starts, rows)


def _gather(
    dtype: torch.dtype,
    cache: LatentCache,
    widths: tuple[int, int],
    is_csr: bool,
    has_starts: bool,
    rows: int,
) -> GatherProblem:
    latent, rope = widths
    int32 = torch.int32
    call = GatherCall(
        cache=facts_of(cache),
        pages=_facts(1, kind=int32) if is_csr else _facts(1, 1, kind=int32),
        indptr=_facts(2, kind=int32) if is_csr else None,
        cu_seqlens_k=_facts(2, kind=int32),
        starts=_facts(1, kind=int32) if has_starts else None,
        out=_facts(rows, latent, kind=dtype),
        rope_out=_facts(rows, rope, kind=dtype) if rope else None,
        aligned=True,
    )
    problem: GatherProblem = gather_of(call).problem
    return problem


def copies(deployment: Deployment) -> Iterator[CopyProblem]:
    """Pages by int64 numbers; packed ones as the bytes that they are in."""
    for _, packed, cache in deployment.caches():
        moved = cache_parts(cache if packed is None else packed, "cache")
        there = tuple(map(facts, moved.values()))
        ids = _facts(1, kind=torch.int64)
        problem: CopyProblem = copy_of(CopyCall(there, there, tuple(moved), ids, ids, True)).problem
        yield problem
