"""Prefill: attention of ragged sequences over expanded keys and values."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from mla_triton import configs, debug, reference, select, validate, validate_prefill
from mla_triton import device as devices
from mla_triton.device import Device
from mla_triton.kernels.common.launch import Launcher, Recording
from mla_triton.kernels.common.tensors import PrefillTensors
from mla_triton.ops import recall
from mla_triton.ops.library import LIBRARY
from mla_triton.ops.plan import launcher
from mla_triton.plan import cdiv
from mla_triton.problem import PrefillProblem
from mla_triton.state import AttentionState


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool = True,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    batch_invariant: bool = False,
    impl: str | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> AttentionState:
    """Attention of ragged sequences over keys and values of their own (MLA's MHA form).

    Sequences stand one behind the other in the first dimension of every tensor. One may have no
    queries, or no keys: its rows are then empty.

    Args:
        q: `[q_tokens, heads, qk]`, or the columns before `q_rope`. float16, bfloat16 or float32.
            Any strides but the last, as for all that follow.
        k: `[k_tokens, kv_heads, qk]`, or the columns before `k_rope`. q's dtype. `heads` is a
            multiple of `kv_heads`; query head i has KV head i // (heads // kv_heads).
        v: `[k_tokens, kv_heads, v_dim]`, q's dtype.
        cu_seqlens_q, cu_seqlens_k: int32 `[batch + 1]` on q's device: where each sequence's queries
            and keys begin, and the last one's end. Rows behind the last sequence are not written.
        softmax_scale: factor of the logits: `qk ** -0.5`, times the square of YaRN's mscale where
            the model has one.
        causal: whether query i of s_q sees keys j <= s_k - s_q + i only (bottom-right aligned, as a
            chunk of a prompt needs it).
        q_rope: `[q_tokens, heads, rope]`, the last columns of the queries where they are a tensor
            of their own.
        k_rope: `[k_tokens, rope]`, the last columns of the keys where they are one for all heads,
            as MLA's rotary keys are: nobody needs to copy them to every head.
        max_seqlen_q: an upper bound of the sequences' query tokens, where the host knows one: it
            spares programs that find nothing to do. Of a longer sequence the rest of its rows are
            not written.
        batch_invariant: whether each sequence's result, bit for bit, is to depend on nothing but
            its own rows: not on what else is in the batch, nor on its order. Tiles are then those
            of long sequences, and configs the heuristic's. Of one card, version of this package
            and implementation.
        impl: "sm90", "portable" or "reference"; refused with a reason where it cannot run, never
            replaced. Without it the best one that can run.
        out, lse: buffers for the result, for CUDA graphs; `[q_tokens, heads, v_dim]` in q's dtype
            and `[q_tokens, heads]` float32.

    Returns:
        `AttentionState(out, lse)`; lse is the natural logarithm. A row that sees no key has out 0
        and lse -inf. States over disjoint keys merge by their lse.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
        NotImplementedError: no implementation, or not `impl`, can take the problem; says why.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1, before absorption.
    """
    validate.check_tensor("q", q)
    validate.check_tensor("k", k)
    validate.check_tensor("v", v)
    validate.check_tensor("cu_seqlens_q", cu_seqlens_q)
    validate.check_tensor("cu_seqlens_k", cu_seqlens_k)
    if q_rope is not None:
        validate.check_tensor("q_rope", q_rope)
    if k_rope is not None:
        validate.check_tensor("k_rope", k_rope)
    softmax_scale = validate.number("softmax_scale", softmax_scale)
    validate.check_flag("causal", causal)
    if max_seqlen_q is not None:
        max_seqlen_q = validate.integer("max_seqlen_q", max_seqlen_q)
    validate.check_flag("batch_invariant", batch_invariant)
    validate.check_impl(impl)
    if out is None:
        out = q.new_empty(validate_prefill.out_shape(q, v))
    else:
        validate.check_tensor("out", out)
    if lse is None:
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    else:
        validate.check_tensor("lse", lse)
    tensors = (q, q_rope, k, k_rope, v, cu_seqlens_q, cu_seqlens_k, out, lse)
    options = (softmax_scale, causal, max_seqlen_q, impl, batch_invariant)
    if not RECALLED.again(tensors, options):
        torch.ops.mla_triton.prefill(*tensors, *options)
    return AttentionState(out, lse)


RECALLED = recall.Memory(own=slice(9, 9), wide=(0, 1, 2, 3, 4, 7))
"""Earlier calls. They make no tensors of their own. Wide: queries, keys, values and out."""


def forget() -> None:
    """Lets the next call look its config up again."""
    prepare_sized.cache_clear()
    RECALLED.clear()


LIBRARY.define(
    "prefill(Tensor q, Tensor? q_rope, Tensor k, Tensor? k_rope, Tensor v, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, Tensor(a!) out, Tensor(b!) lse, float softmax_scale, bool causal, "
    "SymInt? max_seqlen_q, str? impl, bool batch_invariant=False) -> ()"
)


class Prepared(NamedTuple):
    """What an implementation needs for a problem on a device, found once and kept."""

    config: Any
    kernel: Launcher


def prepare(
    implementation: ModuleType, problem: PrefillProblem, device: Device, index: int | None
) -> Prepared:
    batch = max(1, problem.batch)
    length = configs.length_bucket(cdiv(problem.keys, batch))
    return prepare_sized(implementation, problem, device, index, batch, length)


@lru_cache(maxsize=4096)
def prepare_sized(
    implementation: ModuleType,
    problem: PrefillProblem,
    device: Device,
    index: int | None,
    batch: int,
    length: int,
) -> Prepared:
    """`batch` and `length`, the bucket of the mean keys, are what equal problems may differ in and
    configs are looked up by."""
    config = configs.choose(implementation, problem, device).config
    return Prepared(
        config, launcher(implementation.variant(problem, config, device), device, index)
    )


def _prefill(
    q: torch.Tensor,
    q_rope: torch.Tensor | None,
    k: torch.Tensor,
    k_rope: torch.Tensor | None,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int | None,
    impl: str | None,
    batch_invariant: bool = False,
) -> None:
    if cu_seqlens_k is cu_seqlens_q:
        # A recording tells tensors apart by identity, and the next call's may be two.
        cu_seqlens_k = cu_seqlens_k.detach()
    tensors = (q, q_rope, k, k_rope, v, cu_seqlens_q, cu_seqlens_k, out, lse)
    problem = validate_prefill.prefill(
        *tensors, softmax_scale=softmax_scale, causal=causal, max_seqlen_q=max_seqlen_q,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    if debug.wanted(q):
        debug.check_prefill(*tensors, max_seqlen_q)
    device = devices.of(q.device)
    chosen = select.prefill(problem, device, impl)
    if problem.queries == 0 or problem.batch == 0:
        return
    if chosen.name == "reference":
        exact = reference.prefill(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            softmax_scale=softmax_scale, causal=causal, q_rope=q_rope, k_rope=k_rope,
        )  # fmt: skip
        out.copy_(exact.out)
        lse.copy_(exact.lse)
        return
    ready = prepare(chosen.module, problem, device, q.device.index)
    recording = Recording(tensors)
    chosen.module.launch(
        recording.launching(ready.kernel),
        problem,
        ready.config,
        PrefillTensors(*tensors, softmax_scale),
    )
    options = (softmax_scale, causal, max_seqlen_q, impl, batch_invariant)
    RECALLED.keep(tensors, options, recording, None)


def _prefill_fake(
    q: torch.Tensor,
    q_rope: torch.Tensor | None,
    k: torch.Tensor,
    k_rope: torch.Tensor | None,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int | None,
    impl: str | None,
    batch_invariant: bool = False,
) -> None:
    """The rules alone: results go to `out` and `lse`, which are there."""
    validate_prefill.prefill(
        q, q_rope, k, k_rope, v, cu_seqlens_q, cu_seqlens_k, out, lse,
        softmax_scale=softmax_scale, causal=causal, max_seqlen_q=max_seqlen_q, has_memory=False,
    )  # fmt: skip


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("prefill", _prefill, _key)
torch.library.register_fake("mla_triton::prefill", _prefill_fake, lib=LIBRARY)
