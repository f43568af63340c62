"""What an engine will ask of one GPU, as far as kernels depend on it, and the problems that gives.

`describe` reads what a user types, on the command line or as arguments of `mla_triton.tune` and
`mla_triton.warmup`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mla_triton import models, validate, validate_merge, validate_prefill
from mla_triton.cache import LatentCache, named
from mla_triton.cache.formats import E4M3
from mla_triton.cache.named import CACHE_FORMATS
from mla_triton.configs import length_bucket
from mla_triton.models import Model
from mla_triton.problem import DecodeProblem, MergeProblem, PrefillProblem

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYOUTS = ("fused", "pair")
"""The cache in one tensor, or latents and rotary keys in two."""
TABLES = ("dense", "csr")
QUERIES = ("split", "joined", "head_major")
"""q_nope and q_rope as tensors of their own; as columns of one tensor; q_nope head by head, as a
batched product with `W_UK` leaves it."""
APPENDS = ("plain", "interleaved", "half")
"""Tokens into the cache as they are; through an RMSNorm and a rotation of pairs of one of the two
kinds."""
MAX_HEADS = 128


@dataclass(frozen=True)
class Deployment:
    """One rank of a model in service. Lengths are in tokens, sizes in elements."""

    heads: int
    latent: int
    rope: int
    value_dim: int
    nope: int | None
    """Width of a head's query before absorption, where it is known."""
    max_batch: int
    max_len: int
    s_q: tuple[int, ...]
    """Query tokens of a request: 1, and 1 + draft tokens where there are any. Where queries are
    ragged, what they are on average."""
    dtypes: tuple[torch.dtype, ...]
    page_sizes: tuple[int, ...]
    layouts: tuple[str, ...]
    tables: tuple[str, ...]
    queries: tuple[str, ...]
    ragged: bool
    causal: bool
    cache_formats: tuple[str, ...] = ("16bit",)
    """Names of `mla_triton.cache.named`."""
    v: int | None = None
    """Width of a head's values in a prefill, where it is known."""
    prefill_tokens: int = 0
    """Query tokens of a prefill at most; 0 where `mla_triton.prefill` is not called."""
    batch_invariant: bool = False
    appends: tuple[str, ...] = ("plain", "interleaved")
    """How `mla_triton.append` is called, of `APPENDS`."""

    def forms(self, batch: int) -> Iterator[DecodeProblem]:
        """The problems of a batch that differ in more than sizes, `max_len` keys long each."""
        for dtype in self.dtypes:
            for page_size in self.page_sizes:
                for _, cache in self._caches(dtype, page_size):
                    for table in self.tables:
                        for s_q in self.s_q:
                            for query in self.queries:
                                for q_rope_width in self._rope_widths(query):
                                    yield self._problem(
                                        batch, dtype, page_size, cache, table, s_q, query,
                                        q_rope_width,
                                    )  # fmt: skip

    def prefills(self, batch: int, queries: int, keys: int) -> Iterator[PrefillProblem]:
        """The prefills of `batch` sequences that differ in more than sizes; their query tokens and
        keys together.

        Under a causal mask, as a prompt attends to itself, and without, as a chunk attends to what
        came before it. Keys have one rotary part for all heads, queries are whole or in two parts.
        """
        if not self.prefill_tokens:
            return
        splits = [kind == "split" for kind in ("joined", "split") if kind in self.queries]
        for dtype in self.dtypes:
            for causal in (True, False) if self.causal else (False,):
                for split in splits or [False]:
                    yield self._prefill(
                        batch, queries, keys, dtype, causal, split and self.rope > 0
                    )

    def merges(self) -> Iterator[MergeProblem]:
        """Merges of two states of such calls, with and without a mask; buffers contiguous."""
        widths = {self.value_dim: None} | ({self.v: None} if self.prefill_tokens and self.v else {})
        for dtype in self.dtypes:
            for width in widths:
                out = made_without_memory(1, self.heads, width, kind=dtype)
                lse = made_without_memory(1, self.heads, kind=torch.float32)
                for mask in (None, made_without_memory(1, kind=torch.bool)):
                    yield validate_merge.described([out] * 2, [lse] * 2, mask, out, lse)

    def lengths(self, form: DecodeProblem) -> list[int]:
        """The lengths that configs are looked up by, ascending: powers of two up to the longest.

        Where a call gives no `max_kv_len`, it is as long as its page table has room for: whole
        pages, and of a CSR table those of all requests.
        """
        pages = -(-self.max_len // form.page_size)
        requests = self.max_batch if form.csr else 1
        longest = length_bucket(requests * pages * form.page_size)
        return [1 << n for n in range(longest.bit_length())]

    def caches(self) -> Iterator[tuple[torch.dtype, torch.Tensor | None, LatentCache]]:
        """(dtype of queries, packed pages or None, their parts) of each cache, on no memory."""
        for dtype in self.dtypes:
            for page_size in self.page_sizes:
                for packed, cache in self._caches(dtype, page_size):
                    yield dtype, packed, cache

    def _caches(
        self, dtype: torch.dtype, page_size: int
    ) -> Iterator[tuple[torch.Tensor | None, LatentCache]]:
        """Pages of each cache that there may be, on no memory; packed ones, and their parts. A
        packed format is its layout, and how far its pages are apart shows in two of them."""
        slots, width = (1, page_size), self.latent + self.rope
        for name in self.cache_formats:
            if name in named.PACKED:
                pages = made_without_memory(
                    2, named.page_bytes(name, page_size, width), kind=torch.uint8
                )
                yield pages, named.parts(name, pages, page_size)
                continue
            kind = dtype if name == "16bit" else E4M3
            scales = None if name == "16bit" else made_without_memory(2, kind=torch.float32)
            for layout in self.layouts:
                if layout == "fused":
                    ckv = made_without_memory(*slots, width, kind=kind)
                    yield None, LatentCache(ckv, None, scales)
                else:
                    ckv = made_without_memory(*slots, self.latent, kind=kind)
                    kpe = made_without_memory(*slots, self.rope, kind=kind) if self.rope else None
                    yield None, LatentCache(ckv, kpe, scales)

    def _rope_widths(self, query: str) -> tuple[int, ...]:
        """From one rotary query to the next: alone, or behind what was absorbed."""
        if query != "joined" and self.rope and self.nope is not None:
            return self.rope, self.nope + self.rope
        return (self.rope,)

    def _problem(
        self,
        batch: int,
        dtype: torch.dtype,
        page_size: int,
        cache: LatentCache,
        table: str,
        s_q: int,
        query: str,
        rope_width: int,
    ) -> DecodeProblem:
        """What a call of this form is to the package: found by its own checks, on no memory."""
        made = partial(made_without_memory, kind=dtype)
        tokens, heads, width = batch * s_q, self.heads, self.latent + self.rope
        if query == "joined":
            both = made(tokens, heads, width)
            q_nope, q_rope = both[..., : self.latent], both[..., self.latent :]
        else:
            q_nope = made(tokens, heads, self.latent)
            if query == "head_major":
                q_nope = made(heads, tokens, self.latent).transpose(0, 1)
            q_rope = made(tokens, heads, rope_width)[..., -self.rope :]
        if not self.ragged:
            q_nope, q_rope = (q.unflatten(0, (batch, s_q)) for q in (q_nope, q_rope))
        int32 = torch.int32
        pages = -(-self.max_len // page_size)
        return validate.decode(
            q_nope,
            q_rope if self.rope else None,
            *cache,
            made(batch, pages, kind=int32) if table == "dense" else made(pages, kind=int32),
            None if table == "dense" else made(batch + 1, kind=int32),
            made(batch, kind=int32),
            made(batch + 1, kind=int32) if self.ragged else None,
            made(*q_nope.shape[:-1], self.value_dim),
            made(*q_nope.shape[:-1], kind=torch.float32),
            softmax_scale=1.0,
            causal=self.causal,
            value_dim=self.value_dim,
            max_kv_len=None if table == "csr" else self.max_len,
            allow_tf32=False,
            batch_invariant=self.batch_invariant,
            has_memory=False,
        )

    def _prefill(
        self, batch: int, queries: int, keys: int, dtype: torch.dtype, causal: bool, split: bool
    ) -> PrefillProblem:
        """The same of a prefill."""
        assert self.nope is not None
        assert self.v is not None
        made = partial(made_without_memory, kind=dtype)
        nope, rope = self.nope, self.rope
        offsets = made(batch + 1, kind=torch.int32)
        return validate_prefill.prefill(
            made(queries, self.heads, nope if split else nope + rope),
            made(queries, self.heads, rope) if split else None,
            made(keys, self.heads, nope),
            made(keys, rope) if rope else None,
            made(keys, self.heads, self.v),
            offsets,
            offsets,
            made(queries, self.heads, self.v),
            made(queries, self.heads, kind=torch.float32),
            softmax_scale=1.0,
            causal=causal,
            max_seqlen_q=None,
            batch_invariant=self.batch_invariant,
            has_memory=False,
        )


def made_without_memory(*shape: int, kind: torch.dtype) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=kind, device="meta")


def resized(problem: DecodeProblem, batch: int, length: int) -> DecodeProblem:
    """The same call for another batch, of the same number of query tokens a request, or length."""
    queries = batch * problem.mean_s_q
    return replace(problem, batch=batch, queries=queries, max_kv_len=length)


def describe(
    *,
    model: str | None = None,
    from_model: str | Path | None = None,
    tp: int = 1,
    heads: int | None = None,
    latent: int | None = None,
    rope: int | None = None,
    value_dim: int | None = None,
    max_batch: int = 128,
    max_len: int | None = None,
    s_q: int | Sequence[int] = 1,
    dtype: Any = "bfloat16",
    page_size: int | Sequence[int] = 64,
    layout: str | Sequence[str] = "fused",
    cache_format: str | Sequence[str] = "16bit",
    table: str | Sequence[str] = "dense",
    queries: str | Sequence[str] = QUERIES,
    ragged: bool = False,
    causal: bool = True,
    prefill_tokens: int = 0,
    batch_invariant: bool = False,
    append: str | Sequence[str] = ("plain", "interleaved"),
) -> Deployment:
    """A deployment by model or by shapes; ValueError naming argument, rule and value.

    Shapes that are given replace the model's. Without a model they are DeepSeek-V3's.
    """
    if model is not None and from_model is not None:
        raise ValueError(f"model must be left out where from_model is given, got {model!r}")
    known = _read(from_model) if from_model is not None else models.named(model or "DeepSeek-V3")
    widths = (
        known.latent if latent is None else _least("latent", latent),
        known.rope if rope is None else _least("rope", rope, 0),
    )
    same_widths = widths == (known.latent, known.rope)
    if value_dim is None:
        value_dim = known.value_dim if same_widths else widths[0]
    if value_dim not in (widths[0], sum(widths)):
        rule = f"latent or latent + rope, {widths[0]} or {sum(widths)}"
        raise ValueError(f"value_dim must be {rule}, got {value_dim}")
    if heads is None:
        rank_heads = models.rank_heads(known.heads, _least("tp", tp))
    else:
        rank_heads = _least("heads", heads)
    if rank_heads > MAX_HEADS:
        raise ValueError(f"heads must be in [1, {MAX_HEADS}], got {rank_heads}")
    described = Deployment(
        heads=rank_heads,
        latent=widths[0],
        rope=widths[1],
        value_dim=value_dim,
        nope=known.nope if same_widths else None,
        v=known.v if same_widths else None,
        max_batch=_least("max_batch", max_batch),
        max_len=_least("max_len", known.context if max_len is None else max_len),
        s_q=tuple(_least("s_q", size) for size in _several("s_q", s_q)),
        dtypes=tuple(_dtype(each) for each in _several("dtype", dtype)),
        page_sizes=tuple(_least("page_size", size) for size in _several("page_size", page_size)),
        layouts=_choices("layout", layout, LAYOUTS),
        cache_formats=_choices("cache_format", cache_format, CACHE_FORMATS),
        tables=_choices("table", table, TABLES),
        queries=_choices("queries", queries, QUERIES),
        ragged=bool(ragged),
        causal=bool(causal),
        prefill_tokens=_least("prefill_tokens", prefill_tokens, 0),
        batch_invariant=bool(batch_invariant),
        appends=_choices("append", append, APPENDS),
    )
    for kind in described.dtypes:
        for name in described.cache_formats:
            reason = named.why_not(name, kind, *widths, value_dim)
            if reason is not None:
                raise ValueError(reason)
    if prefill_tokens and not same_widths:
        rule = "be left out where latent and rope are not the model's: heads have no known widths"
        raise ValueError(f"prefill_tokens must {rule}, got {prefill_tokens}")
    if ragged:
        # A batch of requests with 1 to n query tokens has any average between.
        described = replace(described, s_q=tuple(range(1, max(described.s_q) + 1)))
    return described


def _read(path: str | Path) -> Model:
    """The model of a Hugging Face `config.json`, or of the directory that it lies in."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"from_model must be a config.json, got {path}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ValueError(f"from_model must be JSON, got {file}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"from_model must be a model's config.json, got {file}")
    try:
        return models.from_config(config)
    except ValueError as error:
        raise ValueError(f"from_model {file}: {error}") from error


def _several(name: str, value: Any) -> tuple[Any, ...]:
    given = tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)
    if not given:
        raise ValueError(f"{name} must be one value or several, got none")
    return tuple(dict.fromkeys(given))


def _least(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def _dtype(value: Any) -> torch.dtype:
    if isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    if value in DTYPES.values():
        return value
    raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {value!r}")


def _choices(name: str, value: Any, known: Sequence[str]) -> tuple[str, ...]:
    given = _several(name, value)
    for each in given:
        if each not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {each!r}")
    return given
