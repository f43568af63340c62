"""Every rule about the arguments of append, gather and copy_pages: a call that breaks it, and the
exact message.
"""

from __future__ import annotations

from typing import Any

import torch
from rejections import TURING, Call, Rejection, spaced, to_meta

import mla_triton
from mla_triton import CSRPageTable, LatentCache, select, validate_append
from mla_triton.testing.caches import append_inputs

E4M3 = torch.float8_e4m3fn
LATENT, ROPE, PAGES, PAGE_SIZE, TOKENS = 128, 32, 3, 4, 5


def e4m3(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.uint8).view(E4M3)


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def pair() -> LatentCache:
    return LatentCache(zeros(PAGES, PAGE_SIZE, LATENT), zeros(PAGES, PAGE_SIZE, ROPE))


def grouped() -> LatentCache:
    keys = zeros(PAGES, PAGE_SIZE, ROPE, dtype=torch.bfloat16)
    return LatentCache(e4m3(PAGES, PAGE_SIZE, LATENT), keys, torch.zeros(PAGES, PAGE_SIZE, 2))


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def replaced(given: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments with changes, each a value or a function of the argument that it replaces."""
    for name, change in changes.items():
        is_function = callable(change) and not isinstance(change, torch.Tensor)
        given[name] = change(given.get(name)) if is_function else change
    return given


def append(_angles: dict[str, Any] | None = None, **changes: Any) -> Call:
    def call() -> Any:
        given: dict[str, Any] = {
            "cache": zeros(PAGES, PAGE_SIZE, LATENT + ROPE),
            "latent": zeros(TOKENS, LATENT),
            "rope": zeros(TOKENS, ROPE),
            "slot_mapping": torch.arange(TOKENS),
        } | (_angles or {})
        return mla_triton.append(**replaced(given, changes))

    return call


def turned(**changes: Any) -> Call:
    """An append with a rotation."""
    return append({"cos_sin": zeros(9, ROPE), "positions": torch.arange(TOKENS)}, **changes)


def gather(**changes: Any) -> Call:
    def call() -> Any:
        given: dict[str, Any] = {
            "cache": zeros(PAGES, PAGE_SIZE, LATENT + ROPE),
            "page_table": torch.zeros(2, 3, dtype=torch.int32),
            "cu_seqlens_k": ints(0, 2, 5),
            "out": zeros(TOKENS, LATENT),
            "rope_out": zeros(TOKENS, ROPE),
        }
        return mla_triton.gather(**replaced(given, changes))

    return call


def csr() -> CSRPageTable:
    return CSRPageTable(ints(0, 1, 2), ints(0, 1))


def copy(**changes: Any) -> Call:
    def call() -> Any:
        given: dict[str, Any] = {
            "cache_from": zeros(PAGES, 4, 8),
            "cache_to": zeros(PAGES, 4, 8),
            "source_pages": ints(0, 1),
            "target_pages": ints(1, 2),
        }
        return mla_triton.copy_pages(**replaced(given, changes))

    return call


def copied_within(sources: torch.Tensor, targets: torch.Tensor) -> Call:
    """A copy of pages of one cache."""

    def call() -> Any:
        cache = zeros(PAGES, 4, 8)
        return mla_triton.copy_pages(cache, cache, sources, targets)

    return call


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


MANY = 2**31 - 128
GRAD = "a tensor that does: call under torch.no_grad() or pass it detached"
NO_GRAD = "not require grad while grad is enabled (there is no backward)"
OVERLAP = "share no memory with the cache, got tensors that overlap"


def shared_append(name: str) -> Call:
    """An append of which an argument lies in the cache."""

    def call() -> Any:
        cache = zeros(PAGES, PAGE_SIZE, LATENT + ROPE)
        rows = cache.view(-1, LATENT + ROPE)[:TOKENS]
        numbers = cache.view(-1)
        given: dict[str, Any] = {
            "latent": zeros(TOKENS, LATENT), "rope": zeros(TOKENS, ROPE),
            "slot_mapping": torch.arange(TOKENS), "cos_sin": zeros(9, ROPE),
            "positions": torch.arange(TOKENS), "norm_weight": zeros(LATENT),
        }  # fmt: skip
        inside = {
            "latent": rows[:, :LATENT], "rope": rows[:, LATENT:], "norm_weight": numbers[:LATENT],
            "slot_mapping": numbers.view(torch.int64)[:TOKENS],
            "positions": numbers.view(torch.int32)[:TOKENS],
            "cos_sin": numbers[: 9 * ROPE].view(9, -1),
        }  # fmt: skip
        return mla_triton.append(cache, **(given | {name: inside[name]}))

    return call


def shared_gather(name: str) -> Call:
    """A gather of which an argument lies in the result."""

    def call() -> Any:
        out = zeros(TOKENS, LATENT)
        numbers = out.view(-1).view(torch.int32)
        scales = torch.zeros(2)
        given: dict[str, Any] = {
            "cache": LatentCache(e4m3(PAGES, PAGE_SIZE, LATENT), None, scales),
            "page_table": torch.zeros(2, 3, dtype=torch.int32), "cu_seqlens_k": ints(0, 2, 5),
            "starts": ints(0, 0), "out": out,
        }  # fmt: skip
        if name.startswith("cache"):
            pages = zeros(PAGES, PAGE_SIZE, LATENT)
            given["cache"] = {
                "cache": pages,
                "cache.ckv": LatentCache(pages, zeros(PAGES, PAGE_SIZE, ROPE)),
                "cache.kpe": LatentCache(
                    zeros(PAGES, PAGE_SIZE, LATENT), pages.view(-1)[: 12 * ROPE].view(3, 4, -1)
                ),
                "cache.scales": LatentCache(
                    e4m3(PAGES, PAGE_SIZE, LATENT), None, out.view(-1).view(torch.float32)[:2]
                ),
            }[name]
            if name != "cache.scales":
                given["out"] = pages.view(-1, LATENT)[:TOKENS]
            if name in ("cache.ckv", "cache.kpe"):
                given["rope_out"] = zeros(TOKENS, ROPE)
        elif name == "page_table.indptr":
            given["page_table"] = CSRPageTable(numbers[:3], ints(0, 1))
        elif name == "page_table":
            given["page_table"] = numbers[:6].view(2, 3)
        else:
            given[name] = numbers[: 3 if name == "cu_seqlens_k" else 2]
        return mla_triton.gather(**given)

    return call


def odd() -> Any:
    """Groups of 96 columns."""
    problem = append_inputs(form="groups", latent=128, rope=32)
    (cache, *rest), _ = problem.call_arguments()
    return validate_append.append(cache, *rest, None, None, None, "half", True)


# fmt: off
APPEND = [
    Rejection("append: cache is a list", append(cache=[]), TypeError,
        "cache must be a torch.Tensor or a LatentCache, got list"),
    Rejection("append: ckv is no tensor", append(cache=LatentCache(3)), TypeError,
        "cache.ckv must be a torch.Tensor, got int"),
    Rejection("append: scales are a number", append(cache=lambda _: grouped()._replace(scales=1.0)),
        TypeError, "cache.scales must be a torch.Tensor, got float"),
    *[
        Rejection(f"append: {name} is no tensor", call, TypeError,
            f"{name} must be a torch.Tensor, got int")
        for name, call in {
            "latent": append(latent=1), "rope": append(rope=1),
            "slot_mapping": append(slot_mapping=1), "norm_weight": append(norm_weight=1),
            "cos_sin": turned(cos_sin=1), "positions": turned(positions=1),
        }.items()
    ],
    Rejection("append: an unknown style", turned(rope_style="neox"), ValueError,
        "rope_style must be \"interleaved\" or \"half\", got 'neox'"),
    Rejection("append: power of two is a number", append(power_of_two_scales=2), TypeError,
        "power_of_two_scales must be True or False, got int"),
    Rejection("append: eps is a word", append(norm_eps="1"), TypeError,
        "norm_eps must be a number, got str"),
    Rejection("append: eps is infinite", append(norm_eps=float("inf")), ValueError,
        "norm_eps must be finite in float32, got inf"),

    Rejection("append: a cache of integers", append(cache=lambda c: c.to(torch.int16)), TypeError,
        "cache must be float16, bfloat16, float32 or float8_e4m3fn, got torch.int16"),
    Rejection("append: e4m3 without scales", append(cache=lambda c: LatentCache(e4m3(*c.shape))),
        ValueError, "cache.scales must be given if, and only if, cache.ckv is float8_e4m3fn, "
        "got no tensor beside torch.float8_e4m3fn"),
    Rejection("append: scales of float64",
        append(cache=lambda _: grouped()._replace(scales=torch.zeros(3, 4, 2).double())), TypeError,
        "cache.scales must be float32, or uint8 (e8m0) for groups, got torch.float64"),
    Rejection("append: keys of another dtype",
        append(cache=lambda _: pair()._replace(kpe=torch.zeros(3, 4, 32))), TypeError,
        "cache.kpe must have cache.ckv's dtype torch.float16, got torch.float32"),
    Rejection("append: 16-bit keys beside two scales",
        append(cache=lambda _: grouped()._replace(scales=torch.zeros(2))), TypeError,
        "cache.kpe must be float8_e4m3fn, as cache.ckv, beside one scale for each, "
        "got torch.bfloat16"),
    Rejection("append: e4m3 keys beside groups",
        append(cache=lambda _: grouped()._replace(kpe=e4m3(3, 4, 32))), TypeError,
        "cache.kpe must be bfloat16 or float16 beside scales of groups, got torch.float8_e4m3fn"),
    Rejection("append: three scales",
        append(cache=lambda c: LatentCache(e4m3(*c.shape), None, torch.zeros(3))), ValueError,
        "cache.scales must be float32 [2], one for latents and one for rotary keys, or of groups, "
        "got torch.float32 of shape (3,)"),
    Rejection("append: groups that are no divisor",
        append(cache=lambda _: grouped()._replace(scales=torch.zeros(3, 4, 3))), ValueError,
        "cache.scales must be [2], or [3, 4, groups] with a divisor of 128 groups, "
        "got shape (3, 4, 3)"),
    Rejection("append: a cache of slots", append(cache=lambda c: c.flatten(0, 1)), ValueError,
        "cache must be [pages, page_size, columns] with at least one page of one token, "
        "got shape (12, 160)"),
    Rejection("append: ckv without pages",
        append(cache=lambda _: LatentCache(zeros(0, 4, 128), zeros(0, 4, 32))), ValueError,
        "cache.ckv must be [pages, page_size, columns] with at least one page of one token, "
        "got shape (0, 4, 128)"),
    Rejection("append: another width", append(cache=lambda c: c[..., :144]), ValueError,
        "cache must have 160 columns (latent 128 + rope 32), got 144"),
    Rejection("append: latents of another width",
        append(cache=lambda _: pair()._replace(ckv=zeros(3, 4, 96))), ValueError,
        "cache.ckv must have latent's 128 columns, got 96"),
    Rejection("append: keys of another width",
        append(cache=lambda _: pair()._replace(kpe=zeros(3, 4, 16))), ValueError,
        "cache.kpe must be (3, 4, 32) to go with cache.ckv and rope, got shape (3, 4, 16)"),
    Rejection("append: a cache of spaced columns", append(cache=spaced), ValueError,
        "cache must have a contiguous last dimension (stride 1), got strides (1280, 320, 2)"),
    Rejection("append: latents of spaced columns",
        append(cache=lambda _: pair()._replace(ckv=spaced(pair().ckv))), ValueError,
        "cache.ckv must have a contiguous last dimension (stride 1), got strides (1024, 256, 2)"),
    Rejection("append: keys of spaced columns",
        append(cache=lambda _: pair()._replace(kpe=spaced(pair().kpe))), ValueError,
        "cache.kpe must have a contiguous last dimension (stride 1), got strides (256, 64, 2)"),
    Rejection("append: spaced scales",
        append(cache=lambda _: grouped()._replace(scales=spaced(grouped().scales))), ValueError,
        "cache.scales must have a contiguous last dimension (stride 1), got strides (16, 4, 2)"),
    Rejection("append: keys elsewhere",
        append(cache=lambda _: pair()._replace(kpe=to_meta(pair().kpe))), ValueError,
        "cache.kpe must be on cache.ckv's device cpu, got meta"),
    Rejection("append: scales elsewhere",
        append(cache=lambda _: grouped()._replace(scales=to_meta(grouped().scales))), ValueError,
        "cache.scales must be on cache.ckv's device cpu, got meta"),
    Rejection("append: an expanded cache", append(cache=lambda c: c[:1].expand(3, 4, 160)),
        ValueError, "cache must be laid out without overlap, got strides (0, 160, 1)"),
    Rejection("append: expanded latents",
        append(cache=lambda _: pair()._replace(ckv=zeros(1, 4, 128).expand(3, 4, 128))), ValueError,
        "cache.ckv must be laid out without overlap, got strides (0, 128, 1)"),
    Rejection("append: expanded keys",
        append(cache=lambda _: pair()._replace(kpe=zeros(1, 4, 32).expand(3, 4, 32))), ValueError,
        "cache.kpe must be laid out without overlap, got strides (0, 32, 1)"),
    Rejection("append: expanded scales",
        append(cache=lambda _: grouped()._replace(scales=torch.zeros(1, 4, 2).expand(3, 4, 2))),
        ValueError, "cache.scales must be laid out without overlap, got strides (0, 2, 1)"),

    Rejection("append: integers", append(latent=lambda t: t.int()), TypeError,
        "latent must be float16, bfloat16 or float32, got torch.int32"),
    Rejection("append: a weight of integers", append(norm_weight=torch.zeros(128).int()), TypeError,
        "norm_weight must be float16, bfloat16 or float32, got torch.int32"),
    Rejection("append: angles in float64", turned(cos_sin=lambda t: t.double()), TypeError,
        "cos_sin must be float16, bfloat16 or float32, got torch.float64"),
    Rejection("append: keys and latents in two dtypes", append(rope=lambda t: t.float()), TypeError,
        "rope must have latent's dtype torch.float16, got torch.float32"),
    Rejection("append: slots in 16 bit", append(slot_mapping=lambda t: t.short()), TypeError,
        "slot_mapping must be int32 or int64, got torch.int16"),
    Rejection("append: positions in floating point", turned(positions=lambda t: t.float()),
        TypeError, "positions must be int32 or int64, got torch.float32"),
    Rejection("append: latents with heads", append(latent=lambda t: t[:, None]), ValueError,
        "latent must be [tokens, latent] with at least one column, got shape (5, 1, 128)"),
    Rejection("append: too many tokens",
        append(cache=meta(PAGES, PAGE_SIZE, 1), latent=meta(MANY, 1), rope=None,
            slot_mapping=meta(MANY, dtype=torch.int32)), ValueError,
        f"latent must have at most {MANY - 1} tokens, got {MANY}"),
    Rejection("append: keys of other tokens", append(rope=lambda t: t[:3]), ValueError,
        "rope must be [5, rope] like latent, got shape (3, 32)"),
    Rejection("append: slots of other tokens", append(slot_mapping=torch.arange(4)), ValueError,
        "slot_mapping must be contiguous [5], got shape (4,) and strides (1,)"),
    Rejection("append: positions apart", turned(positions=torch.arange(10)[::2]), ValueError,
        "positions must be contiguous [5], got shape (5,) and strides (2,)"),
    Rejection("append: a weight of another width", append(norm_weight=zeros(64)), ValueError,
        "norm_weight must be contiguous [128], got shape (64,) and strides (1,)"),
    Rejection("append: angles without positions", append(cos_sin=zeros(9, ROPE)), ValueError,
        "positions must be given if, and only if, cos_sin is, got None"),
    Rejection("append: positions without angles", append(positions=torch.arange(5)), ValueError,
        "positions must be given if, and only if, cos_sin is, got a tensor"),
    Rejection("append: an odd rotation",
        turned(rope=zeros(5, 31), cache=zeros(3, 4, 159), cos_sin=zeros(9, 31)), ValueError,
        "rope must have an even number of columns where cos_sin is given, got 31"),
    Rejection("append: angles of another width", turned(cos_sin=zeros(9, 16)), ValueError,
        "cos_sin must be [max_positions, 32] with at least one position, got shape (9, 16)"),
    Rejection("append: latents of spaced tokens", append(latent=spaced), ValueError,
        "latent must have a contiguous last dimension (stride 1), got strides (256, 2)"),
    Rejection("append: rotary keys of spaced tokens", append(rope=spaced), ValueError,
        "rope must have a contiguous last dimension (stride 1), got strides (64, 2)"),
    Rejection("append: spaced angles", turned(cos_sin=spaced), ValueError,
        "cos_sin must have a contiguous last dimension (stride 1), got strides (64, 2)"),
    *[
        Rejection(f"append: {name} elsewhere", call, ValueError,
            f"{name} must be on latent's device cpu, got meta")
        for name, call in {
            "rope": append(rope=to_meta), "slot_mapping": append(slot_mapping=to_meta),
            "norm_weight": append(norm_weight=meta(LATENT)), "cos_sin": turned(cos_sin=to_meta),
            "positions": turned(positions=to_meta), "cache": append(cache=to_meta),
            "cache.ckv": append(cache=lambda _: LatentCache(*map(to_meta, pair()[:2]))),
        }.items()
    ],
    *[
        Rejection(f"append: {name} requires grad", call, ValueError,
            f"{name} must {NO_GRAD}, got {GRAD}")
        for name, call in {
            "latent": append(latent=lambda t: t.requires_grad_()),
            "rope": append(rope=lambda t: t.requires_grad_()),
            "norm_weight": append(norm_weight=zeros(LATENT).requires_grad_()),
            "cos_sin": turned(cos_sin=lambda t: t.requires_grad_()),
            "cache.scales": append(
                cache=lambda _: grouped()._replace(scales=torch.zeros(3, 4, 2).requires_grad_())),
        }.items()
    ],
    *[
        Rejection(f"append: {name} in the cache", shared_append(name), ValueError,
            f"{name} must {OVERLAP}")
        for name in ("latent", "rope", "slot_mapping", "norm_weight", "cos_sin", "positions")
    ],
    Rejection("append: impl unknown", append(impl="sm90"), ValueError,
        "impl must be one of portable, reference, got 'sm90'"),
    Rejection("append: no kernel for the card", lambda: select.append(odd(), TURING, "portable"),
        NotImplementedError, "impl 'portable' cannot run this append: it needs capability 8.0 or "
        "later, this card has 7.5"),
    Rejection("append: no implementation for the card", lambda: select.append(odd(), TURING),
        NotImplementedError,
        "no implementation of append can run on 7.5: portable: it needs capability 8.0 or later, "
        "this card has 7.5; reference: it synchronises and copies; on a GPU it runs only when "
        "asked for (impl='reference')"),
]
GATHER = [
    Rejection("gather: rows are missing", gather(out=None, rope_out=None), ValueError,
        "rows must be given where out is not, got None"),
    Rejection("gather: rows are a tensor", gather(out=None, rope_out=None, rows=torch.tensor(3)),
        TypeError, "rows must be an integer, got Tensor"),
    Rejection("gather: fewer rows than none", gather(out=None, rope_out=None, rows=-1), ValueError,
        "rows must be 0 or more, got -1"),
    Rejection("gather: other rows than out's", gather(rows=4), ValueError,
        "rows must be left out, or the 5 rows of out, got 4"),
    Rejection("gather: rope of another width", gather(rope=16), ValueError,
        "rope must be left out, or the 32 columns of rope_out, got 16"),
    Rejection("gather: rope of another cache", gather(cache=lambda _: pair(), rope=16), ValueError,
        "rope must be left out, or the 32 columns of cache.kpe, got 16"),
    Rejection("gather: rope is all", gather(rope=160, out=None, rope_out=None, rows=5), ValueError,
        "rope must be fewer than the 160 columns of the cache, got 160"),
    Rejection("gather: dtype is a word", gather(out=None, dtype="half", rows=5), TypeError,
        "dtype must be float16, bfloat16 or float32, got half"),
    Rejection("gather: another dtype than out's", gather(dtype=torch.float32), TypeError,
        "dtype must be left out, or out's torch.float16, got torch.float32"),
    *[
        Rejection(f"gather: {name} is no tensor", gather(**{name: 1}), TypeError,
            f"{name} must be a torch.Tensor, got int")
        for name in ("cu_seqlens_k", "starts", "out", "rope_out")
    ],
    Rejection("gather: a table in 64 bit", gather(page_table=lambda t: t.long()), TypeError,
        "page_table must be int32, got torch.int64"),
    Rejection("gather: starts in 64 bit", gather(starts=torch.zeros(2).long()), TypeError,
        "starts must be int32, got torch.int64"),
    Rejection("gather: rows of integers", gather(out=lambda t: t.int()), TypeError,
        "out must be float16, bfloat16 or float32, got torch.int32"),
    Rejection("gather: keys of another dtype", gather(rope_out=lambda t: t.float()), TypeError,
        "rope_out must have out's dtype torch.float16, got torch.float32"),
    Rejection("gather: out with heads", gather(out=lambda t: t[:, None]), ValueError,
        "out must be [rows, latent] with at least one column, got shape (5, 1, 128)"),
    Rejection("gather: too many rows",
        gather(cache=meta(2, 2, 1), out=meta(MANY, 1), rope_out=None), ValueError,
        f"out must have at most {MANY - 1} rows, got {MANY}"),
    Rejection("gather: keys of other rows", gather(rope_out=lambda t: t[:4]), ValueError,
        "rope_out must be [5, rope] like out, got shape (4, 32)"),
    Rejection("gather: offsets in two dimensions", gather(cu_seqlens_k=lambda t: t[None]),
        ValueError, "cu_seqlens_k must be contiguous [batch + 1], got shape (1, 3) and strides "
        "(3, 1)"),
    Rejection("gather: starts of another batch", gather(starts=ints(0)), ValueError,
        "starts must be contiguous [2], got shape (1,) and strides (1,)"),
    Rejection("gather: rows of spaced columns", gather(out=spaced), ValueError,
        "out must have a contiguous last dimension (stride 1), got strides (256, 2)"),
    Rejection("gather: keys of spaced columns", gather(rope_out=spaced), ValueError,
        "rope_out must have a contiguous last dimension (stride 1), got strides (64, 2)"),
    Rejection("gather: expanded rows", gather(out=lambda t: t[:1].expand(5, 128)), ValueError,
        "out must be laid out without overlap, got strides (0, 1)"),
    Rejection("gather: expanded keys", gather(rope_out=lambda t: t[:1].expand(5, 32)), ValueError,
        "rope_out must be laid out without overlap, got strides (0, 1)"),
    *[
        Rejection(f"gather: {name} elsewhere", call, ValueError,
            f"{name} must be on out's device cpu, got meta")
        for name, call in {
            "cache": gather(cache=to_meta), "page_table": gather(page_table=to_meta),
            "cache.ckv": gather(cache=lambda _: LatentCache(*map(to_meta, pair()[:2]))),
            "page_table.indptr": gather(
                page_table=lambda _: csr()._replace(indptr=to_meta(csr().indptr))),
            "page_table.indices": gather(
                page_table=lambda _: csr()._replace(indices=to_meta(csr().indices))),
            "cu_seqlens_k": gather(cu_seqlens_k=to_meta),
            "starts": gather(starts=to_meta(ints(0, 0))), "rope_out": gather(rope_out=to_meta),
        }.items()
    ],
    Rejection("gather: keys require grad", gather(rope_out=lambda t: t.requires_grad_()),
        ValueError, f"rope_out must {NO_GRAD}, got {GRAD}"),
    *[
        Rejection(f"gather: {name} in the result", shared_gather(name), ValueError,
            f"{name} must share no memory with the results, got tensors that overlap")
        for name in ("cache", "cache.ckv", "cache.kpe", "cache.scales", "page_table",
            "page_table.indptr", "cu_seqlens_k", "starts")
    ],
    Rejection("gather: impl unknown", gather(impl="sm90"), ValueError,
        "impl must be one of portable, reference, got 'sm90'"),
]
COPY = [
    Rejection("copy: a cache is a list", copy(cache_from=[]), TypeError,
        "cache_from must be a torch.Tensor or a LatentCache, got list"),
    Rejection("copy: the other is a list", copy(cache_to=[]), TypeError,
        "cache_to must be a torch.Tensor or a LatentCache, got list"),
    Rejection("copy: ids are a list", copy(source_pages=[1]), TypeError,
        "source_pages must be a torch.Tensor, got list"),
    Rejection("copy: targets are a list", copy(target_pages=[1]), TypeError,
        "target_pages must be a torch.Tensor, got list"),
    Rejection("copy: one tensor to two", copy(cache_to=lambda _: pair()), ValueError,
        "cache_to must be in the tensors of cache_from (cache_to), got cache_to.ckv and "
        "cache_to.kpe"),
    Rejection("copy: ids in 16 bit", copy(source_pages=lambda t: t.short()), TypeError,
        "source_pages must be int32 or int64, got torch.int16"),
    Rejection("copy: targets in 16 bit", copy(target_pages=lambda t: t.short()), TypeError,
        "target_pages must be int32 or int64, got torch.int16"),
    Rejection("copy: ids in two dtypes", copy(target_pages=lambda t: t.long()), TypeError,
        "target_pages must have source_pages's dtype torch.int32, got torch.int64"),
    Rejection("copy: ids in two dimensions", copy(source_pages=lambda t: t[None]), ValueError,
        "source_pages must be contiguous [pages to copy], got shape (1, 2) and strides (2, 1)"),
    Rejection("copy: more targets", copy(target_pages=ints(0, 1, 2)), ValueError,
        "target_pages must be contiguous [2], got shape (3,) and strides (1,)"),
    Rejection("copy: no page", copy(cache_from=zeros(0, 4, 8)), ValueError,
        "cache_from must be [pages, ...] with at least one page, got shape (0, 4, 8)"),
    Rejection("copy: slots of latents", copy(cache_from=lambda _: pair()._replace(ckv=zeros(3)),
        cache_to=lambda _: pair()), ValueError,
        "cache_from.ckv must be [pages, ...] with at least one page, got shape (3,)"),
    Rejection("copy: pages of spaced slots", copy(cache_to=zeros(3, 4, 16)[..., :8]), ValueError,
        "cache_to must have contiguous pages (packed ones are copied as the uint8 tensor they are "
        "in), got strides (64, 16, 1)"),
    Rejection("copy: expanded pages", copy(cache_to=zeros(1, 4, 8).expand(3, 4, 8)), ValueError,
        "cache_to must be laid out without overlap, got strides (0, 8, 1)"),
    Rejection("copy: other pages", copy(cache_to=zeros(3, 4, 9)), ValueError,
        "cache_to must have pages of torch.float16 (4, 8), as cache_from, got torch.float16 "
        "(4, 9)"),
    Rejection("copy: a cache elsewhere", copy(cache_from=to_meta), ValueError,
        "cache_from must be on source_pages's device cpu, got meta"),
    Rejection("copy: the other elsewhere", copy(cache_to=to_meta), ValueError,
        "cache_to must be on source_pages's device cpu, got meta"),
    Rejection("copy: targets elsewhere", copy(target_pages=to_meta), ValueError,
        "target_pages must be on source_pages's device cpu, got meta"),
    Rejection("copy: fewer keys than latents",
        copy(cache_from=lambda _: pair()._replace(kpe=zeros(2, 4, 32)), cache_to=lambda _: pair()),
        ValueError, "cache_from must have as many pages in every tensor as the first, 3, got 2"),
    Rejection("copy: fewer keys than latents there",
        copy(cache_to=lambda _: pair()._replace(kpe=zeros(2, 4, 32)), cache_from=lambda _: pair()),
        ValueError, "cache_to must have as many pages in every tensor as the first, 3, got 2"),
    Rejection("copy: a cache requires grad", copy(cache_from=lambda t: t.requires_grad_()),
        ValueError, f"cache_from must {NO_GRAD}, got {GRAD}"),
    Rejection("copy: the other requires grad", copy(cache_to=lambda t: t.requires_grad_()),
        ValueError, f"cache_to must {NO_GRAD}, got {GRAD}"),
    Rejection("copy: impl of wrong type", copy(impl=1), TypeError,
        "impl must be a str or None, got int"),
]
# fmt: on


def shared_copies() -> list[Rejection]:
    """Caches that overlap, and numbers of pages in the cache that is written."""
    memory = zeros(4, 4, 8)
    numbers = memory.view(-1).view(torch.int64)
    ids = torch.arange(2)
    rule = "share no memory with the results, got tensors that overlap"
    calls = {
        "cache_from": (memory[:3], memory[1:], ids, ids),
        "source_pages": (zeros(4, 4, 8), memory, numbers[:2], ids),
        "target_pages": (zeros(4, 4, 8), memory, ids, numbers[2:4]),
    }
    return [
        Rejection(
            f"copy: {name} in the other",
            lambda given=given: mla_triton.copy_pages(*given),
            ValueError,
            f"{name} must {rule}",
        )
        for name, given in calls.items()
    ]


CACHE = [*APPEND, *GATHER, *COPY, *shared_copies()]

# fmt: off
DEBUG = [
    Rejection("append: a slot behind the cache", append(slot_mapping=ints(0, 1, 12, 3, 4)),
        ValueError, "slot_mapping must hold slots from 0 to 11, or -1, got 12 for token 2"),
    Rejection("append: a slot below -1", append(slot_mapping=ints(0, 1, -2, 3, 4)), ValueError,
        "slot_mapping must hold slots from 0 to 11, or -1, got -2 for token 2"),
    Rejection("append: a slot twice", append(slot_mapping=ints(-1, 7, -1, 3, 7)), ValueError,
        "slot_mapping must name a slot once, got 7 for tokens 1 and 4"),
    Rejection("append: a position without angles", turned(positions=ints(0, 1, 2, 9, 4)),
        ValueError, "positions must be rows of cos_sin, 0 to 8, got 9 for token 3"),
    Rejection("gather: offsets that decrease", gather(cu_seqlens_k=ints(0, 5, 2)), ValueError,
        "cu_seqlens_k must not decrease, got 5 then 2 at index 2"),
    Rejection("gather: offsets that end behind the rows", gather(cu_seqlens_k=ints(0, 2, 6)),
        ValueError, "cu_seqlens_k must end within the 5 rows, got 6"),
    Rejection("gather: a negative start", gather(starts=ints(0, -1)), ValueError,
        "starts must be at least 0, got -1 for request 1"),
    Rejection("gather: keys behind the pages", gather(starts=ints(0, 10)), ValueError,
        "cu_seqlens_k must stay within the 12 tokens of a request's 3 pages, got key 12 for "
        "request 1"),
    Rejection("gather: a page that is not there",
        gather(page_table=lambda t: t.index_fill(1, torch.tensor([1]), 3), starts=ints(0, 2)),
        ValueError, "page_table must hold pages from 0 to 2, got 3 as page 1 of request 1"),
    Rejection("copy_pages: a source that is not there", copy(source_pages=ints(0, 3)), ValueError,
        "source_pages must hold pages from 0 to 2, or -1, got 3 as number 1"),
    Rejection("copy_pages: a target that is not there", copy(target_pages=ints(-2, 1)), ValueError,
        "target_pages must hold pages from 0 to 2, or -1, got -2 as number 0"),
    Rejection("copy_pages: a target twice", copy(target_pages=ints(1, 1)), ValueError,
        "target_pages must name a page once, got 1 twice"),
    Rejection("copy_pages: a source that is written", copied_within(ints(0, 1), ints(1, 2)),
        ValueError, "source_pages must be written by no other pair, got page 1"),
]
# fmt: on
