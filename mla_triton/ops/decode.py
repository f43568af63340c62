"""Decode: absorbed attention over a paged latent cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch

from mla_triton import configs, debug, reference, select, validate
from mla_triton import device as devices
from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.device import Device
from mla_triton.kernels.common import combine
from mla_triton.kernels.common.launch import Launch, Launcher, Recording
from mla_triton.kernels.common.tensors import DecodeTensors
from mla_triton.ops import recall
from mla_triton.ops.library import LIBRARY
from mla_triton.ops.plan import (
    Plan,
    buffers,
    check_plan,
    check_plan_device,
    launcher,
    make_schedule,
    plan_key,
    planned_geometry,
)
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem
from mla_triton.state import AttentionState


def decode(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    cache: torch.Tensor | LatentCache,
    page_table: torch.Tensor | CSRPageTable,
    kv_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens_q: torch.Tensor | None = None,
    value_dim: int | None = None,
    max_kv_len: int | None = None,
    allow_tf32: bool = False,
    batch_invariant: bool = False,
    plan: Plan | None = None,
    impl: str | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> AttentionState:
    """Attention of absorbed queries over the latents of each request (MLA's MQA form).

    The key of a token is its latent and, behind it, its rotary key; its value is the latent itself.

    Args:
        q_nope: `[batch, s_q, heads, latent]`, already multiplied by W_UK; with `cu_seqlens_q`
            `[tokens, heads, latent]`. float16, bfloat16 or float32. Any strides but the last.
        q_rope: the same with `rope` columns, or None where the model has no rotary key.
        cache: `[pages, page_size, latent + rope]` in q's dtype, or a `LatentCache` of two tensors,
            or of e4m3 numbers and their scales.
        page_table: int32 `[batch, max_pages]`, or a `CSRPageTable`. Entries past a request's keys
            are not read.
        kv_lens: int32 `[batch]`, keys of each request, the queries' own included. A length past the
            table or `max_kv_len` is cut there.
        softmax_scale: factor of the logits: `(nope + rope) ** -0.5` of the *unabsorbed* head
            dimensions, times the square of YaRN's mscale where the model has one.
        causal: whether query i of s_q sees keys j <= kv_len - s_q + i only (bottom-right aligned).
        cu_seqlens_q: int32 `[batch + 1]`, where each request's query tokens begin, for ragged
            queries.
        value_dim: columns of a key that are its value: q_nope's width, or that plus q_rope's where
            the rotary part is inside the value (DeepSeek-V4).
        max_kv_len: upper bound of `kv_lens`, checked against the table's width.
        allow_tf32: whether float32 products may be rounded to tf32.
        batch_invariant: whether each request's result, bit for bit, is to depend on nothing but its
            own queries, keys and length: not on what else is in the batch, its order or padding,
            nor on page size and places of pages. Keys are then cut by their own number, and configs
            are the heuristic's. Of one card, version of this package and implementation.
        plan: a `Plan` of the same lengths, made by `mla_triton.plan`, to be shared by layers.
        impl: "sm90" (capability 9.0 alone), "portable" or "reference"; refused with a reason where
            it cannot run, never replaced. Without it the best one that can run and follow the plan.
        out, lse: buffers for the result, for CUDA graphs; `[..., heads, value_dim]` in q's dtype
            and `[..., heads]` float32.

    Returns:
        `AttentionState(out, lse)`; lse is the natural logarithm. A row that sees no key has out 0
        and lse -inf.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
        NotImplementedError: no implementation, or not `impl`, can take the problem; says why.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1; docs/math.md derives the absorbed form.
    """
    validate.check_tensor("q_nope", q_nope)
    validate.check_tensor("kv_lens", kv_lens)
    if q_rope is not None:
        validate.check_tensor("q_rope", q_rope)
    if cu_seqlens_q is not None:
        validate.check_tensor("cu_seqlens_q", cu_seqlens_q)
    ckv, kpe, scales = validate.unpack_cache(cache)
    pages, indptr = validate.unpack_page_table(page_table)
    softmax_scale = validate.number("softmax_scale", softmax_scale)
    validate.check_flag("causal", causal)
    validate.check_flag("allow_tf32", allow_tf32)
    validate.check_flag("batch_invariant", batch_invariant)
    if value_dim is not None:
        value_dim = validate.integer("value_dim", value_dim)
    if max_kv_len is not None:
        max_kv_len = validate.integer("max_kv_len", max_kv_len)
    validate.check_impl(impl)
    if plan is not None and not isinstance(plan, Plan):
        validate.fail(TypeError, "plan", "be a Plan or None", type(plan).__name__)
    if out is None and value_dim is None:
        out = torch.empty_like(q_nope, memory_format=torch.contiguous_format)
    elif out is None:
        out = q_nope.new_empty(validate.out_shape(q_nope, q_rope, value_dim))
    else:
        validate.check_tensor("out", out)
    if lse is None:
        lse = q_nope.new_empty(q_nope.shape[:-1], dtype=torch.float32)
    else:
        validate.check_tensor("lse", lse)
    tensors = (
        q_nope, q_rope, ckv, kpe, scales, pages, indptr, kv_lens, cu_seqlens_q,
        None if plan is None else plan.schedule,
        None if plan is None else plan.partial_out,
        None if plan is None else plan.partial_lse,
        out, lse,
    )  # fmt: skip
    planned = None if plan is None else plan.key
    options = (
        softmax_scale, causal, value_dim, max_kv_len, allow_tf32, planned, impl, batch_invariant,
    )  # fmt: skip
    if not RECALLED.again(tensors, options):
        torch.ops.mla_triton.decode(*tensors, *options)
    return AttentionState(out, lse)


RECALLED = recall.Memory(own=slice(9, 12), wide=(0, 1, 2, 3, 4, 12))
"""Earlier calls. Their own: schedule and partial results. Wide: queries, cache, its tokens' scales
and out."""


def forget() -> None:
    """Lets the next call look its config up again."""
    prepare.cache_clear()
    RECALLED.clear()


LIBRARY.define(
    "decode(Tensor q_nope, Tensor? q_rope, Tensor ckv, Tensor? kpe, Tensor? scales, "
    "Tensor pages, Tensor? indptr, Tensor kv_lens, Tensor? cu_seqlens_q, Tensor? schedule, "
    "Tensor(a!)? partial_out, "
    "Tensor(b!)? partial_lse, Tensor(c!) out, Tensor(d!) lse, float softmax_scale, bool causal, "
    "SymInt? value_dim, SymInt? max_kv_len, bool allow_tf32, SymInt[]? planned, "
    "str? impl, bool batch_invariant=False) -> ()"
)


class Prepared(NamedTuple):
    """What an implementation needs for a problem on a device, found once and kept."""

    geometry: Geometry
    key: list[int]
    """What a plan given by the user must have, too."""
    kernel: Launcher
    combine_config: combine.Config
    combine: Launcher


@lru_cache(maxsize=4096)
def prepare(
    implementation: ModuleType,
    problem: DecodeProblem,
    device: Device,
    index: int | None,
    like: Geometry | None,
    length: int,
) -> Prepared:
    """`like` is a plan's geometry; `length` is the bucket of the problem's longest keys, which
    equal problems may differ in."""
    geometry = implementation.geometry(problem, device, like=like)
    config = configs.choose(implementation, problem, device, geometry.row_tile).config
    return prepare_with(config, implementation, problem, device, index, geometry)


def prepare_with(
    config: Any,
    implementation: ModuleType,
    problem: DecodeProblem,
    device: Device,
    index: int | None,
    geometry: Geometry,
) -> Prepared:
    """The same with a config that is given rather than looked up."""
    combine_config = combine.heuristic(problem, geometry, device)
    return Prepared(
        geometry,
        plan_key(problem, geometry),
        launcher(implementation.variant(problem, config, geometry, device), device, index),
        combine_config,
        launcher(combine.variant(problem, combine_config, device), device, index),
    )


def launch(
    ready: Prepared,
    implementation: ModuleType,
    problem: DecodeProblem,
    tensors: DecodeTensors,
    launching: Callable[[Launcher], Launch],
) -> None:
    """Attention, then the merge of what was cut; `launching` says how a launcher is used."""
    implementation.launch(launching(ready.kernel), problem, ready.geometry, tensors)
    if ready.geometry.parts > 1:
        merge = launching(ready.combine)
        combine.launch(merge, problem, ready.combine_config, ready.geometry, tensors)


def _decode(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    scales: torch.Tensor | None,
    pages: torch.Tensor,
    indptr: torch.Tensor | None,
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    schedule: torch.Tensor | None,
    partial_out: torch.Tensor | None,
    partial_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    value_dim: int | None,
    max_kv_len: int | None,
    allow_tf32: bool,
    planned: list[int] | None,
    impl: str | None,
    batch_invariant: bool = False,
) -> None:
    problem = validate.decode(
        q_nope, q_rope, ckv, kpe, scales, pages, indptr, kv_lens, cu_seqlens_q, out, lse,
        softmax_scale=softmax_scale, causal=causal, value_dim=value_dim, max_kv_len=max_kv_len,
        allow_tf32=allow_tf32, batch_invariant=batch_invariant,
    )  # fmt: skip
    if schedule is not None:
        check_plan_device(schedule, q_nope)
    verify = debug.wanted(q_nope)
    if verify:
        debug.check_decode(
            q_nope,
            q_rope,
            ckv,
            kpe,
            scales,
            pages,
            indptr,
            kv_lens,
            cu_seqlens_q,
            out,
            lse,
            max_kv_len,
        )
    device = devices.of(q_nope.device)
    like = None if planned is None else planned_geometry(planned)
    chosen = select.decode(problem, device, impl, like)
    if problem.queries == 0:
        return
    if chosen.name == "reference":
        if planned is not None:
            check_plan(planned, plan_key(problem, None), chosen.name)
        cache = ckv if kpe is None and scales is None else LatentCache(ckv, kpe, scales)
        table = pages if indptr is None else CSRPageTable(indptr, pages)
        exact = reference.decode(
            q_nope, q_rope, cache, table, kv_lens,
            softmax_scale=softmax_scale, causal=causal, cu_seqlens_q=cu_seqlens_q,
            value_dim=value_dim, max_kv_len=max_kv_len,
        )  # fmt: skip
        out.copy_(exact.out)
        lse.copy_(exact.lse)
        return
    given = (
        q_nope, q_rope, ckv, kpe, scales, pages, indptr, kv_lens, cu_seqlens_q,
        schedule, partial_out, partial_lse, out, lse,
    )  # fmt: skip
    options = (
        softmax_scale, causal, value_dim, max_kv_len, allow_tf32, planned, impl, batch_invariant,
    )  # fmt: skip
    length = configs.length_bucket(problem.max_kv_len)
    ready = prepare(chosen.module, problem, device, q_nope.device.index, like, length)
    make_own = None
    if planned is None:
        planned = [problem.max_kv_len, *ready.key]
        make_own = partial(buffers, problem, ready.geometry, q_nope.device)
        schedule, partial_out, partial_lse = make_own()
    else:
        check_plan(planned, ready.key, chosen.name)
    assert schedule is not None
    assert partial_out is not None
    assert partial_lse is not None
    tensors = DecodeTensors(
        q_nope, q_rope, ckv, kpe, scales, pages, indptr, kv_lens, cu_seqlens_q, schedule,
        planned[0], partial_out, partial_lse, out, lse, softmax_scale,
    )  # fmt: skip
    recording = Recording((*given[:9], schedule, partial_out, partial_lse, out, lse))
    if make_own is not None:
        make_schedule(kv_lens, cu_seqlens_q, schedule, planned, recording)
    if verify:
        debug.check_schedule(schedule, make_schedule, kv_lens, cu_seqlens_q, planned)
    launch(ready, chosen.module, problem, tensors, recording.launching)
    RECALLED.keep(given, options, recording, make_own)


def _decode_fake(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    scales: torch.Tensor | None,
    pages: torch.Tensor,
    indptr: torch.Tensor | None,
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    schedule: torch.Tensor | None,
    partial_out: torch.Tensor | None,
    partial_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    value_dim: int | None,
    max_kv_len: int | None,
    *_: object,
) -> None:
    """The rules alone: results go to `out` and `lse`, which are there."""
    validate.decode(
        q_nope, q_rope, ckv, kpe, scales, pages, indptr, kv_lens, cu_seqlens_q, out, lse,
        softmax_scale=softmax_scale, causal=causal, value_dim=value_dim, max_kv_len=max_kv_len,
        allow_tf32=False, has_memory=False,
    )  # fmt: skip
    if schedule is not None:
        check_plan_device(schedule, q_nope)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("decode", _decode, _key)
torch.library.register_fake("mla_triton::decode", _decode_fake, lib=LIBRARY)
