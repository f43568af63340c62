"""Every rule about arguments: a call that breaks it, and the exact message.

`REJECTIONS` is the whole of it. `tests/test_validate.py` makes the calls, and holds the table
against the source and docs/errors.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import mla_triton
from mla_triton import select
from mla_triton.device import KIB, Device
from mla_triton.testing import decode_inputs

LATENT, ROPE, HEADS, BATCH, PAGE_SIZE = 128, 32, 4, 2, 16
TURING = Device("T4", "cuda", "sm_75", sm_count=40, shared_memory=64 * KIB)

Call = Callable[[], Any]


class Rejection(NamedTuple):
    name: str
    call: Call
    error: type[Exception]
    message: str


# -- calls that keep every rule, to be broken in one place


def arguments(
    *, device: str = "cpu", ragged: bool = False, pair: bool = False, csr: bool = False, **changes
) -> dict[str, Any]:
    """Of a decode that keeps every rule; a change may be a function of the argument it replaces."""
    inputs = decode_inputs(
        kv_lens=[40, 17],
        q_lens=[3, 2] if ragged else None,
        heads=HEADS,
        latent=LATENT,
        rope=ROPE,
        page_size=PAGE_SIZE,
        dtype=torch.float16,
        layout="pair" if pair else "fused",
        table="csr" if csr else "dense",
        device=device,
    )
    positional, options = inputs.call_arguments()
    names = ("q_nope", "q_rope", "cache", "page_table", "kv_lens")
    given = dict(zip(names, positional, strict=True)) | options | inputs.output_buffers()
    for name, change in changes.items():
        is_function = callable(change) and not isinstance(change, torch.Tensor)
        given[name] = change(given[name]) if is_function else change
    return given


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments().items() if key != name}


def make_plan(**changes: Any) -> mla_triton.Plan:
    given = {"heads": HEADS, "latent": LATENT, "rope": ROPE, "dtype": torch.float16}
    return mla_triton.plan(**({"kv_lens": int32(40, 17)} | given | changes))


def with_geometry(**changes: int) -> mla_triton.Plan:
    plan = make_plan()
    assert plan.geometry is not None
    return replace(plan, geometry=replace(plan.geometry, **changes))


def decode(**changes: Any) -> Call:
    return lambda: mla_triton.decode(**arguments(**changes))


def planned(make: Callable[[], mla_triton.Plan], **changes: Any) -> Call:
    return lambda: mla_triton.decode(**arguments(**changes), plan=make())


def plan(**changes: Any) -> Call:
    return lambda: make_plan(**changes)


def update(*lengths: Any, **changes: Any) -> Call:
    return lambda: make_plan(**changes).update(*lengths)


def sharing(name: str, other: str, dtype: torch.dtype = torch.float16) -> Call:
    """A call whose result `name` lies in the memory of another argument."""

    def call() -> Any:
        given = arguments()
        size = given[name].numel() * given[name].element_size()
        memory = given[other].view(torch.uint8).flatten()[:size]
        given[name] = memory.view(dtype).view(given[name].shape)
        return mla_triton.decode(**given)

    return call


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def empty(*shape: int) -> torch.Tensor:
    """Of any size: it has no memory."""
    return torch.empty(shape, dtype=torch.float16, device="meta")


def spaced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with a stride of 2 in the last dimension."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def to_meta(value: torch.Tensor) -> torch.Tensor:
    return value.to("meta")


# -- what is refused

GRAD = (
    "must not require grad while grad is enabled (there is no backward), "
    "got a tensor that does: call under torch.no_grad() or pass it detached"
)
PORTABLE = {"impl": "portable", "out": None}
STRIDE = "must have a contiguous last dimension (stride 1), got strides"

# fmt: off
DECODE_TYPES = [
    *(
        Rejection(f"{name} is no tensor", decode(**{name: [1.0]}), TypeError,
            f"{name} must be a torch.Tensor, got list")
        for name in ("q_nope", "q_rope", "kv_lens", "cu_seqlens_q", "out", "lse")
    ),
    Rejection("cache is no tensor", decode(cache=None), TypeError,
        "cache must be a torch.Tensor or a LatentCache, got NoneType"),
    Rejection("cache is a plain pair", decode(pair=True, cache=tuple), TypeError,
        "cache must be a torch.Tensor or a LatentCache, got tuple"),
    Rejection("ckv is no tensor",
        decode(pair=True, cache=lambda c: c._replace(ckv=None)), TypeError,
        "cache.ckv must be a torch.Tensor, got NoneType"),
    Rejection("kpe is no tensor", decode(pair=True, cache=lambda c: c._replace(kpe=1)), TypeError,
        "cache.kpe must be a torch.Tensor, got int"),
    Rejection("page table is no tensor", decode(page_table=[[0, 1]]), TypeError,
        "page_table must be a torch.Tensor or a CSRPageTable, got list"),
    Rejection("indptr is no tensor",
        decode(csr=True, page_table=lambda t: t._replace(indptr=[0, 3, 5])), TypeError,
        "page_table.indptr must be a torch.Tensor, got list"),
    Rejection("indices are no tensor",
        decode(csr=True, page_table=lambda t: t._replace(indices=None)), TypeError,
        "page_table.indices must be a torch.Tensor, got NoneType"),
    Rejection("plan of wrong type", decode(plan={"parts": 2}), TypeError,
        "plan must be a Plan or None, got dict"),
    Rejection("impl of wrong type", decode(impl=1), TypeError,
        "impl must be a str or None, got int"),
    Rejection("causal is no bool", decode(causal=1), TypeError,
        "causal must be True or False, got int"),
    Rejection("batch_invariant is no bool", decode(batch_invariant=1), TypeError,
        "batch_invariant must be True or False, got int"),
    Rejection("allow_tf32 is no bool", decode(allow_tf32=None), TypeError,
        "allow_tf32 must be True or False, got NoneType"),
    Rejection("value_dim is no integer", decode(value_dim=128.0), TypeError,
        "value_dim must be an integer, got float"),
    Rejection("max_kv_len is no integer", decode(max_kv_len=40.0), TypeError,
        "max_kv_len must be an integer, got float"),
    Rejection("max_kv_len is a bool", decode(max_kv_len=True), TypeError,
        "max_kv_len must be an integer, got bool"),
    Rejection("max_kv_len is on the device", decode(max_kv_len=torch.tensor(40)), TypeError,
        "max_kv_len must be an integer, got Tensor"),
    Rejection("softmax_scale is missing",
        lambda: mla_triton.decode(**without("softmax_scale")), TypeError,
        "decode() missing 1 required keyword-only argument: 'softmax_scale'"),
    Rejection("softmax_scale is None", decode(softmax_scale=None), TypeError,
        "softmax_scale must be a number, got NoneType"),
    Rejection("softmax_scale is a str", decode(softmax_scale="0.1"), TypeError,
        "softmax_scale must be a number, got str"),
    Rejection("softmax_scale is a bool", decode(softmax_scale=True), TypeError,
        "softmax_scale must be a number, got bool"),
    Rejection("softmax_scale is on the device", decode(softmax_scale=torch.tensor(0.1)), TypeError,
        "softmax_scale must be a number, got Tensor"),
]

DECODE_DTYPES = [
    *(
        Rejection(f"q_nope is {dtype}",
            decode(q_nope=lambda q, dtype=dtype: q.to(dtype)), TypeError,
            f"q_nope must be float16, bfloat16 or float32, got {dtype}")
        for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn)
    ),
    *(
        Rejection(f"{name} of another dtype", decode(**{name: lambda t: t.bfloat16()}), TypeError,
            f"{name} must have q_nope's dtype torch.float16, got torch.bfloat16")
        for name in ("q_rope", "cache", "out")
    ),
    Rejection("ckv of another dtype",
        decode(pair=True, cache=lambda c: c._replace(ckv=c.ckv.float())), TypeError,
        "cache.ckv must have q_nope's dtype torch.float16, got torch.float32"),
    Rejection("kpe of another dtype",
        decode(pair=True, cache=lambda c: c._replace(kpe=c.kpe.float())), TypeError,
        "cache.kpe must have q_nope's dtype torch.float16, got torch.float32"),
    Rejection("lse of another dtype", decode(lse=lambda t: t.half()), TypeError,
        "lse must be float32, got torch.float16"),
    Rejection("page table of int64", decode(page_table=lambda t: t.long()), TypeError,
        "page_table must be int32, got torch.int64"),
    Rejection("kv_lens of int64", decode(kv_lens=lambda t: t.long()), TypeError,
        "kv_lens must be int32, got torch.int64"),
    Rejection("cu_seqlens_q of int64",
        decode(ragged=True, cu_seqlens_q=lambda t: t.long()), TypeError,
        "cu_seqlens_q must be int32, got torch.int64"),
    Rejection("indptr of int64",
        decode(csr=True, page_table=lambda t: t._replace(indptr=t.indptr.long())), TypeError,
        "page_table.indptr must be int32, got torch.int64"),
    Rejection("indices of int16",
        decode(csr=True, page_table=lambda t: t._replace(indices=t.indices.short())), TypeError,
        "page_table.indices must be int32, got torch.int16"),
]

DECODE_DEVICES = [
    *(
        Rejection(f"{name} elsewhere",
            decode(ragged=name == "cu_seqlens_q", **{name: to_meta}), ValueError,
            f"{name} must be on q_nope's device cpu, got meta")
        for name in ("q_rope", "cache", "page_table", "kv_lens", "cu_seqlens_q", "out", "lse")
    ),
    Rejection("ckv elsewhere",
        decode(pair=True, cache=lambda c: c._replace(ckv=c.ckv.to("meta"))), ValueError,
        "cache.ckv must be on q_nope's device cpu, got meta"),
    Rejection("kpe elsewhere",
        decode(pair=True, cache=lambda c: c._replace(kpe=c.kpe.to("meta"))), ValueError,
        "cache.kpe must be on q_nope's device cpu, got meta"),
    Rejection("indptr elsewhere",
        decode(csr=True, page_table=lambda t: t._replace(indptr=t.indptr.to("meta"))), ValueError,
        "page_table.indptr must be on q_nope's device cpu, got meta"),
    Rejection("indices elsewhere",
        decode(csr=True, page_table=lambda t: t._replace(indices=t.indices.to("meta"))), ValueError,
        "page_table.indices must be on q_nope's device cpu, got meta"),
    Rejection("q_nope elsewhere", decode(q_nope=to_meta), ValueError,
        "q_rope must be on q_nope's device meta, got cpu"),
]

DECODE_SHAPES = [
    Rejection("a ragged q_nope without offsets",
        decode(q_nope=lambda q: q.flatten(0, 1)), ValueError,
        "q_nope must be [batch, s_q, heads, latent] without cu_seqlens_q, got shape (2, 4, 128)"),
    Rejection("a uniform q_nope with offsets", decode(cu_seqlens_q=int32(0, 1, 2)), ValueError,
        "q_nope must be [tokens, heads, latent] with cu_seqlens_q, got shape (2, 1, 4, 128)"),
    Rejection("q_nope without dimensions",
        decode(q_nope=lambda q: q[0, 0, 0, 0], out=None, lse=None), ValueError,
        "q_nope must be [batch, s_q, heads, latent] without cu_seqlens_q, got shape ()"),
    Rejection("q_nope without dimensions, with value_dim",
        decode(q_nope=lambda q: q[0, 0, 0, 0], value_dim=LATENT, out=None, lse=None), ValueError,
        "q_nope must be [batch, s_q, heads, latent] without cu_seqlens_q, got shape ()"),
    Rejection("no heads", decode(q_nope=lambda q: q[:, :, :0]), ValueError,
        "q_nope must have at least one head and one column, got shape (2, 1, 0, 128)"),
    Rejection("no columns", decode(q_nope=lambda q: q[..., :0]), ValueError,
        "q_nope must have at least one head and one column, got shape (2, 1, 4, 0)"),
    Rejection("too many rows",
        decode(device="meta", q_nope=empty(2, 2**24, 128, LATENT + ROPE), q_rope=None), ValueError,
        "q_nope must have at most 2147483647 rows (query tokens x heads), got 33554432 x 128"),
    Rejection("q_rope of other heads", decode(q_rope=lambda q: q[:, :, :2]), ValueError,
        "q_rope must be [2, 1, 4, rope] like q_nope, got shape (2, 1, 2, 32)"),
    Rejection("q_rope of other dimensions",
        decode(ragged=True, q_rope=lambda q: q[None]), ValueError,
        "q_rope must be [5, 4, rope] like q_nope, got shape (1, 5, 4, 32)"),
    Rejection("q_rope without dimensions",
        decode(q_rope=lambda q: q[0, 0, 0, 0], value_dim=LATENT, out=None), ValueError,
        "q_rope must be [2, 1, 4, rope] like q_nope, got shape ()"),
    Rejection("value_dim of neither kind", decode(value_dim=64), ValueError,
        "value_dim must be the latent's width 128 or, with the rope part inside, 160, got 64"),
    Rejection("value_dim of neither kind, before out is made",
        decode(value_dim=-1, out=None), ValueError,
        "value_dim must be the latent's width 128 or, with the rope part inside, 160, got -1"),
    Rejection("a flat cache", decode(cache=lambda c: c.flatten(0, 1)), ValueError,
        "cache must be [pages, page_size, width] with at least one page of one token, got shape "
        "(144, 160)"),
    Rejection("a cache with a head dimension", decode(cache=lambda c: c[:, :, None]), ValueError,
        "cache must be [pages, page_size, width] with at least one page of one token, got shape "
        "(9, 16, 1, 160)"),
    Rejection("an empty cache", decode(cache=lambda c: c[:0]), ValueError,
        "cache must be [pages, page_size, width] with at least one page of one token, got shape "
        "(0, 16, 160)"),
    Rejection("pages of no token",
        decode(pair=True, cache=lambda c: c._replace(ckv=c.ckv[:, :0])), ValueError,
        "cache.ckv must be [pages, page_size, width] with at least one page of one token, got "
        "shape (9, 0, 128)"),
    Rejection("a cache without rope", decode(cache=lambda c: c[..., :LATENT]), ValueError,
        "cache must be 160 wide (latent 128 + rope 32 of the queries), got width 128"),
    Rejection("a cache with rope for queries without", decode(q_rope=None), ValueError,
        "cache must be 128 wide (latent 128 + rope 0 of the queries), got width 160"),
    Rejection("latents of another width",
        decode(pair=True, cache=lambda c: c._replace(ckv=c.ckv[..., :64])), ValueError,
        "cache.ckv must be 128 wide like q_nope, got width 64"),
    Rejection("rotary keys of another width",
        decode(pair=True, cache=lambda c: c._replace(kpe=c.kpe[..., :16])), ValueError,
        "cache.kpe must be (9, 16, 32) to go with cache.ckv and q_rope, got shape (9, 16, 16)"),
    Rejection("rotary keys of fewer pages",
        decode(pair=True, cache=lambda c: c._replace(kpe=c.kpe[:4])), ValueError,
        "cache.kpe must be (9, 16, 32) to go with cache.ckv and q_rope, got shape (4, 16, 32)"),
    Rejection("rotary keys for queries without", decode(pair=True, q_rope=None), ValueError,
        "cache.kpe must be (9, 16, 0) to go with cache.ckv and q_rope, got shape (9, 16, 32)"),
    Rejection("rope inside the value of a pair",
        decode(pair=True, value_dim=LATENT + ROPE, out=None), ValueError,
        "cache must be one tensor where value_dim 160 has the rope part inside, got a LatentCache "
        "of two"),
    Rejection("kv_lens of two dimensions", decode(kv_lens=lambda n: n[:, None]), ValueError,
        "kv_lens must be contiguous [batch], got shape (2, 1) and strides (1, 1)"),
    Rejection("kv_lens with gaps", decode(kv_lens=spaced), ValueError,
        "kv_lens must be contiguous [batch], got shape (2,) and strides (2,)"),
    Rejection("kv_lens expanded", decode(kv_lens=lambda n: n[:1].expand(2)), ValueError,
        "kv_lens must be contiguous [batch], got shape (2,) and strides (0,)"),
    Rejection("kv_lens of another batch", decode(kv_lens=int32(1, 2, 3)), ValueError,
        "kv_lens must have q_nope's batch of 2, got 3 entries"),
    Rejection("offsets of another batch",
        decode(ragged=True, cu_seqlens_q=int32(0, 3, 5, 5)), ValueError,
        "cu_seqlens_q must be contiguous [batch + 1] = [3], got shape (4,) and strides (1,)"),
    Rejection("offsets with gaps", decode(ragged=True, cu_seqlens_q=spaced), ValueError,
        "cu_seqlens_q must be contiguous [batch + 1] = [3], got shape (3,) and strides (2,)"),
    Rejection("page table of another batch", decode(page_table=lambda t: t[:1]), ValueError,
        "page_table must be [batch, max_pages] = [2, 1 or more], got shape (1, 4)"),
    Rejection("page table of one dimension", decode(page_table=lambda t: t.flatten()), ValueError,
        "page_table must be [batch, max_pages] = [2, 1 or more], got shape (8,)"),
    Rejection("page table without columns", decode(page_table=lambda t: t[:, :0]), ValueError,
        "page_table must be [batch, max_pages] = [2, 1 or more], got shape (2, 0)"),
    Rejection("page table with gaps", decode(page_table=spaced), ValueError,
        f"page_table {STRIDE} (8, 2)"),
    Rejection("page table narrower than max_kv_len", decode(max_kv_len=65), ValueError,
        "page_table must reach max_kv_len 65 with pages of 16, got 4 entries (64 keys)"),
    Rejection("fewer pages than max_kv_len", decode(csr=True, max_kv_len=97), ValueError,
        "page_table.indices must reach max_kv_len 97 with pages of 16, got 6 entries (96 keys)"),
    Rejection("negative max_kv_len", decode(max_kv_len=-1), ValueError,
        "max_kv_len must be 0 or more, got -1"),
    Rejection("indptr of another batch",
        decode(csr=True, page_table=lambda t: t._replace(indptr=t.indptr[:2])), ValueError,
        "page_table.indptr must be contiguous [batch + 1] = [3], got shape (2,) and strides (1,)"),
    Rejection("indices with gaps",
        decode(csr=True, page_table=lambda t: t._replace(indices=spaced(t.indices))), ValueError,
        "page_table.indices must be contiguous [pages in use], got shape (6,) and strides (2,)"),
    *(
        Rejection(f"softmax_scale is {scale}", decode(softmax_scale=scale), ValueError,
            f"softmax_scale must be finite in float32, got {scale}")
        for scale in (math.nan, math.inf, -math.inf, 1e+39)
    ),
    Rejection("impl unknown", decode(impl="cutlass"), ValueError,
        "impl must be one of sm90, portable, reference, got 'cutlass'"),
]

DECODE_RESULTS = [
    Rejection("out of another shape", decode(out=lambda t: t[..., :64]), ValueError,
        "out must be (2, 1, 4, 128), got shape (2, 1, 4, 64)"),
    Rejection("out without the rope part inside", decode(value_dim=LATENT + ROPE), ValueError,
        "out must be (2, 1, 4, 160), got shape (2, 1, 4, 128)"),
    Rejection("lse of another shape", decode(lse=lambda t: t[..., None]), ValueError,
        "lse must be (2, 1, 4), got shape (2, 1, 4, 1)"),
    Rejection("out expanded",
        decode(out=lambda t: t[:, :, :1].expand(-1, -1, HEADS, -1)), ValueError,
        "out must be laid out without overlap, got strides (512, 512, 0, 1)"),
    Rejection("rows of out that overlap",
        decode(out=lambda t: t.as_strided(t.shape, (512, 512, 64, 1))), ValueError,
        "out must be laid out without overlap, got strides (512, 512, 64, 1)"),
    Rejection("lse expanded", decode(lse=lambda t: t[:1].expand(BATCH, -1, -1)), ValueError,
        "lse must be laid out without overlap, got strides (0, 4, 1)"),
    *(
        Rejection(f"{name} with gaps", decode(**{name: spaced}), ValueError,
            f"{name} {STRIDE} {got}")
        for name, got in (
            ("q_nope", (1024, 1024, 256, 2)), ("q_rope", (256, 256, 64, 2)),
            ("cache", (5120, 320, 2)), ("out", (1024, 1024, 256, 2)),
        )
    ),
    Rejection("ckv with gaps",
        decode(pair=True, cache=lambda c: c._replace(ckv=spaced(c.ckv))), ValueError,
        f"cache.ckv {STRIDE} (4096, 256, 2)"),
    Rejection("kpe with gaps",
        decode(pair=True, cache=lambda c: c._replace(kpe=spaced(c.kpe))), ValueError,
        f"cache.kpe {STRIDE} (1024, 64, 2)"),
    *(
        Rejection(f"{name} requires grad",
            decode(**{name: lambda t: t.requires_grad_()}), ValueError,
            f"{name} {GRAD}")
        for name in ("q_nope", "q_rope", "cache", "out")
    ),
    Rejection("ckv requires grad",
        decode(pair=True, cache=lambda c: c._replace(ckv=c.ckv.requires_grad_())), ValueError,
        f"cache.ckv {GRAD}"),
    Rejection("kpe requires grad",
        decode(pair=True, cache=lambda c: c._replace(kpe=c.kpe.requires_grad_())), ValueError,
        f"cache.kpe {GRAD}"),
]

DECODE_PLANS = [
    Rejection("plan of another batch",
        planned(lambda: make_plan(kv_lens=int32(1, 2, 3))), ValueError,
        "plan must be made for this call's batch 2, queries 2, got batch 3, queries 3"),
    Rejection("plan of other heads",
        planned(lambda: make_plan(heads=16)), ValueError,
        "plan must be made for this call's heads 4, got heads 16"),
    Rejection("plan of another width",
        planned(lambda: make_plan(latent=256)), ValueError,
        "plan must be made for this call's value_dim 128, got value_dim 256"),
    Rejection("plan of uniform queries",
        planned(make_plan, ragged=True), ValueError,
        "plan must be made for this call's ragged queries, queries 5, got s_q 1, queries 2"),
    Rejection("plan of ragged queries",
        planned(lambda: make_plan(cu_seqlens_q=int32(0, 1, 2), queries=2)), ValueError,
        "plan must be made for this call's s_q 1, got ragged queries"),
]

PLAN = [
    Rejection("plan: kv_lens is no tensor", plan(kv_lens=[1, 2]), TypeError,
        "kv_lens must be a torch.Tensor, got list"),
    Rejection("plan: kv_lens of int64", plan(kv_lens=torch.tensor([1, 2])), TypeError,
        "kv_lens must be int32, got torch.int64"),
    Rejection("plan: kv_lens of two dimensions", plan(kv_lens=int32(1, 2)[None]), ValueError,
        "kv_lens must be contiguous [batch], got shape (1, 2) and strides (2, 1)"),
    Rejection("plan: cu_seqlens_q is no tensor", plan(cu_seqlens_q=[0, 1, 2], queries=2), TypeError,
        "cu_seqlens_q must be a torch.Tensor, got list"),
    Rejection("plan: cu_seqlens_q of int64",
        plan(cu_seqlens_q=torch.tensor([0, 1, 2]), queries=2), TypeError,
        "cu_seqlens_q must be int32, got torch.int64"),
    Rejection("plan: cu_seqlens_q elsewhere",
        plan(cu_seqlens_q=int32(0, 1, 2).to("meta"), queries=2), ValueError,
        "cu_seqlens_q must be on kv_lens's device cpu, got meta"),
    Rejection("plan: cu_seqlens_q of another batch",
        plan(cu_seqlens_q=int32(0, 1), queries=1), ValueError,
        "cu_seqlens_q must be contiguous [batch + 1] = [3], got shape (2,) and strides (1,)"),
    *(
        Rejection(f"plan: {name} is {value}", plan(**{name: value}), ValueError,
            f"{name} must be {least} or more, got {value}")
        for name, least, value in (
            ("heads", 1, 0), ("latent", 1, 0), ("rope", 0, -1), ("s_q", 1, 0), ("queries", 0, -1),
            ("value_dim", 1, 0), ("max_kv_len", 0, -1), ("parts", 1, 0),
        )
    ),
    Rejection("plan: more parts than a launch takes", plan(parts=65536), ValueError,
        "parts must be at most 65535, got 65536"),
    Rejection("plan: parts of a batch-invariant one",
        plan(parts=2, batch_invariant=True, max_kv_len=9), ValueError,
        "parts must be left out where batch_invariant is set, got 2"),
    Rejection("plan: batch-invariant without a bound", plan(batch_invariant=True), ValueError,
        "max_kv_len must be given where batch_invariant is set, got None"),
    Rejection("plan: batch_invariant is no bool", plan(batch_invariant=1), TypeError,
        "batch_invariant must be True or False, got int"),
    *(
        Rejection(f"plan: {name} is no integer", plan(**{name: value}), TypeError,
            f"{name} must be an integer, got {type(value).__name__}")
        for name, value in (
            ("heads", 4.0), ("latent", "128"), ("rope", True), ("s_q", torch.tensor(1)),
            ("queries", 1.5), ("value_dim", 128.0), ("max_kv_len", [4]), ("parts", 2.0),
        )
    ),
    Rejection("plan: heads is None", plan(heads=None), TypeError,
        "heads must be an integer, got NoneType"),
    Rejection("plan: too many rows", plan(s_q=2 ** 29), ValueError,
        "heads must have at most 2147483647 rows (query tokens x heads), got 1073741824 x 4"),
    Rejection("plan: dtype of no kernel", plan(dtype=torch.float64), TypeError,
        "dtype must be float16, bfloat16 or float32, got torch.float64"),
    Rejection("plan: dtype by name", plan(dtype="float16"), TypeError,
        "dtype must be float16, bfloat16 or float32, got float16"),
    Rejection("plan: offsets without queries", plan(cu_seqlens_q=int32(0, 1, 2)), ValueError,
        "queries must be given if, and only if, cu_seqlens_q is, got None"),
    Rejection("plan: queries without offsets", plan(queries=2), ValueError,
        "queries must be given if, and only if, cu_seqlens_q is, got 2"),
    Rejection("plan: s_q of ragged queries",
        plan(cu_seqlens_q=int32(0, 1, 2), queries=2, s_q=2), ValueError,
        "s_q must be left out where cu_seqlens_q is given, got 2"),
    Rejection("plan: value_dim of neither kind", plan(value_dim=64), ValueError,
        "value_dim must be the latent's width 128 or, with the rope part inside, 160, got 64"),
    Rejection("plan: cache_format of wrong type", plan(cache_format=None), TypeError,
        "cache_format must be a str, got NoneType"),
    Rejection("plan: cache_format unknown", plan(cache_format="fp4"), ValueError,
        "cache_format must be one of 16bit, fp8, fp8_ds_mla, fp8_v4, fp8_v41, got 'fp4'"),
    Rejection("plan: cache_format of single precision",
        plan(cache_format="fp8", dtype=torch.float32), ValueError,
        "cache_format must be 16bit for float32, got fp8"),
    Rejection("plan: cache_format of other widths", plan(cache_format="fp8_v4"), ValueError,
        "cache_format must be one for keys of 128 + 32 with values of 128, got fp8_v4"),
    Rejection("plan: cache_format with other rotary keys",
        plan(cache_format="fp8_ds_mla", latent=512, rope=64), ValueError,
        "dtype must be bfloat16 where cache_format is fp8_ds_mla, got float16"),
    Rejection("plan: impl of wrong type", plan(impl=0), TypeError,
        "impl must be a str or None, got int"),
    Rejection("plan: impl unknown", plan(impl="flash"), ValueError,
        "impl must be one of sm90, portable, reference, got 'flash'"),
    Rejection("update: kv_lens is no tensor", update([1, 2]), TypeError,
        "kv_lens must be a torch.Tensor, got list"),
    Rejection("update: another batch", update(int32(1, 2, 3)), ValueError,
        "kv_lens must have the plan's batch of 2, got 3 entries"),
    Rejection("update: offsets for a uniform plan", update(int32(1, 2), int32(0, 1, 2)), ValueError,
        "cu_seqlens_q must be given if, and only if, the plan was made with it, got a tensor"),
    Rejection("update: no offsets for a ragged plan",
        update(int32(1, 2), cu_seqlens_q=int32(0, 1, 2), queries=2), ValueError,
        "cu_seqlens_q must be given if, and only if, the plan was made with it, got None"),
]

# Where CPU tensors are taken to the kernels.
INTERPRETED = [
    Rejection("plan of the reference for the kernels",
        planned(lambda: make_plan(impl="reference")), ValueError,
        "plan must be made for portable, which runs this call, got one for the reference"),
    Rejection("plan of another geometry",
        planned(lambda: with_geometry(kv_tile=256)), ValueError,
        "plan must be cut as portable cuts this call, by kv_tile 32, got kv_tile 256"),
    Rejection("plan elsewhere",
        planned(lambda: replace(make_plan(), schedule=torch.empty(1, device="meta"))), ValueError,
        "plan must be on q_nope's device cpu, got meta"),
    Rejection("update: kv_lens elsewhere", update(int32(1, 2).to("meta")), ValueError,
        "kv_lens must be on the plan's device cpu, got meta"),
    Rejection("no kernel for the width",
        decode(q_nope=lambda q: q[..., :96], cache=lambda c: c[..., :128], **PORTABLE),
        NotImplementedError,
        "impl 'portable' cannot run this decode: value_dim must be a power of two in [16, 512], "
        "got 96"),
    Rejection("plan: more fixed pieces than a launch takes",
        plan(kv_lens=int32(*[1] * 23), batch_invariant=True, max_kv_len=2**31 - 1), ValueError,
        "max_kv_len must leave at most 65535 pieces where batch_invariant is set, got 23 groups of "
        "up to 2897"),
    Rejection("plan: no kernel for the width",
        plan(latent=96, impl="portable"), NotImplementedError,
        "impl 'portable' cannot run this decode: value_dim must be a power of two in [16, 512], "
        "got 96"),
]

ELSEWHERE = [
    Rejection("no Hopper kernel for the card",
        lambda: select.decode(make_plan().problem, TURING, "sm90"), NotImplementedError,
        "impl 'sm90' cannot run this decode: it is written for capability 9.0, this card has 7.5"),
    Rejection("no implementation for the card",
        lambda: select.decode(make_plan().problem, TURING), NotImplementedError,
        "no implementation of decode can run on 7.5: sm90: it is written for capability 9.0, this "
        "card has 7.5; portable: it needs capability 8.0 or later, this card has 7.5; reference: "
        "it synchronises and copies; on a GPU it runs only when asked for (impl='reference')"),
]

# Found with MLA_TRITON_DEBUG=1.
DEBUG = [
    Rejection("a negative length", decode(kv_lens=int32(40, -1)), ValueError,
        "kv_lens must be at least 0, got -1 for request 1"),
    Rejection("a length past the table", decode(kv_lens=int32(65, 1)), ValueError,
        "kv_lens must be at most the 64 tokens of a request's 4 pages, got 65 for request 0"),
    Rejection("a length past max_kv_len", decode(max_kv_len=39), ValueError,
        "kv_lens must be at most max_kv_len = 39, got 40 for request 0"),
    Rejection("a page that is not there",
        decode(page_table=lambda t: t.index_fill(1, torch.tensor([1]), 9)), ValueError,
        "page_table must hold pages from 0 to 8, got 9 as page 1 of request 0"),
    Rejection("a CSR page that is not there",
        decode(csr=True, page_table=lambda t: t._replace(indices=t.indices * 0 - 1)), ValueError,
        "page_table.indices must hold pages from 0 to 8, got -1 as page 0 of request 0"),
    Rejection("offsets that do not start at 0",
        decode(ragged=True, cu_seqlens_q=int32(1, 3, 5)), ValueError,
        "cu_seqlens_q must start at 0, got 1"),
    Rejection("offsets that decrease",
        decode(csr=True, page_table=lambda t: t._replace(indptr=int32(0, 5, 3))), ValueError,
        "page_table.indptr must not decrease, got 5 then 3 at index 2"),
    Rejection("offsets that end before the queries",
        decode(ragged=True, cu_seqlens_q=int32(0, 3, 4)), ValueError,
        "cu_seqlens_q must end at the 5 tokens of q_nope, got 4"),
    Rejection("offsets past the pages",
        decode(csr=True, page_table=lambda t: t._replace(indptr=int32(0, 3, 7))), ValueError,
        "page_table.indptr must end within the 6 page_table.indices, got 7"),
    Rejection("out in q_nope", sharing("out", "q_nope"), ValueError,
        "out must not share memory with q_nope, got tensors that overlap"),
    Rejection("lse in out", sharing("lse", "out", torch.float32), ValueError,
        "out must not share memory with lse, got tensors that overlap"),
    Rejection("lse in q_rope", sharing("lse", "q_rope", torch.float32), ValueError,
        "lse must not share memory with q_rope, got tensors that overlap"),
]

DEBUG_INTERPRETED = [
    Rejection("a plan of other lengths",
        planned(lambda: make_plan(kv_lens=int32(17, 40))), ValueError,
        "plan must be of the lengths of this call (Plan.update makes it so), got a schedule of "
        "other lengths"),
]
# fmt: on

ALWAYS = [
    *DECODE_TYPES,
    *DECODE_DTYPES,
    *DECODE_DEVICES,
    *DECODE_SHAPES,
    *DECODE_RESULTS,
    *DECODE_PLANS,
    *PLAN,
    *ELSEWHERE,
]
REJECTIONS = [*ALWAYS, *INTERPRETED, *DEBUG, *DEBUG_INTERPRETED]
