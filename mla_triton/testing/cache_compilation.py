"""Every variant of append, gather and copy_pages by form of cache, for `compile_all`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from mla_triton.cache import LatentCache
from mla_triton.problem_cache import AppendProblem, CopyProblem, GatherProblem
from mla_triton.testing.caches import FORMS, PACKED, cache_memory
from mla_triton.testing.compilation import LABELS, Case
from mla_triton.validate import Facts, facts
from mla_triton.validate_append import AppendCall, append_of
from mla_triton.validate_stored import facts_of

MANY, FEW = 32768, 128
PAGE_SIZE = 64


def _facts(*shape: int, kind: torch.dtype = torch.bfloat16) -> Facts:
    return facts(torch.empty(*shape, dtype=kind, device="meta"))


def append_problem(form: str, tokens: int = MANY, rotation: str | None = None) -> AppendProblem:
    """bfloat16 tokens; with a rotation, through a norm as well."""
    latent = PACKED[form][1] if form in PACKED else 512
    cache = cache_memory(form, page_size=PAGE_SIZE, latent=latent, device="meta").cache
    call = AppendCall(
        cache=facts_of(LatentCache(cache) if isinstance(cache, torch.Tensor) else cache),
        latent=_facts(tokens, latent),
        rope=_facts(tokens, 64),
        slots=_facts(tokens, kind=torch.int64),
        norm_weight=_facts(latent) if rotation else None,
        cos_sin=_facts(4096, 64, kind=torch.float32) if rotation else None,
        positions=_facts(tokens, kind=torch.int64) if rotation else None,
        style=rotation or "half",
        power_of_two=True,
        aligned=True,
    )
    problem: AppendProblem = append_of(call).problem
    return problem


def gather_problem(form: str) -> GatherProblem:
    """bfloat16 rows by a dense table."""
    return GatherProblem(
        dtype=torch.bfloat16,
        stored=append_problem(form).stored,
        csr=False,
        starts=True,
        aligned=True,
        few=False,
        rows=MANY,
    )


def appends() -> Iterator[AppendProblem]:
    for form in FORMS:
        yield append_problem(form)
        yield append_problem(form, FEW)
        for rotation in ("interleaved", "half"):
            yield append_problem(form, rotation=rotation)
    plain = append_problem("fp8_ds_mla", rotation="half")
    yield replace(plain, aligned=False)
    yield replace(plain, power_of_two=False)
    yield replace(append_problem("fused"), dtype=torch.float32)


def gathers() -> Iterator[GatherProblem]:
    for form in FORMS:
        yield gather_problem(form)
    yield replace(gather_problem("fp8_ds_mla"), csr=True, starts=False, few=True)
    yield replace(gather_problem("fp8_ds_mla"), aligned=False, dtype=torch.float32)


def copies() -> Iterator[CopyProblem]:
    for words, size in (((10496,), 4), ((8192, 2048, 256), 4), ((1001,), 1)):
        yield CopyProblem(words=words, word_bytes=size, id_dtype=torch.int64)


def cases() -> Iterator[Case]:
    """All of them on every card."""
    for label in LABELS:
        for kernel, problems in (
            ("append", appends()), ("gather", gathers()), ("copy_pages", copies())
        ):  # fmt: skip
            for problem in problems:
                yield Case(label, kernel, problem)
