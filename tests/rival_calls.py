"""Calls of `mla_triton.compat` as the libraries' own users make them, each judged by its budget.

The truth they are held against is written down here, in float64, and knows nothing of the package's
oracle. Problems are the hostile ones of `mla_triton.testing`: NaN in all slots that no request
owns, page ids of 2**31 - 1, requests without keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch

import mla_triton
from mla_triton.compat import flash_mla, flashinfer, sglang, vllm
from mla_triton.state import AttentionState
from mla_triton.testing import assert_within_budget, decode_inputs, merge_inputs, prefill_inputs
from mla_triton.testing.budget import Inputs, budget_of
from mla_triton.testing.merges import MergeInputs
from mla_triton.testing.prefill_problems import PrefillInputs
from mla_triton.testing.problems import DecodeInputs

INF = float("inf")
LN_2 = math.log(2)


# -- the truth


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[heads, width]` over `[n, width]` and `[n, value]`: out `[heads, value]`, lse `[heads]`."""
    if not len(keys):
        empty = query.new_full(query.shape[:1], -INF)
        return query.new_zeros(len(query), values.shape[1]), empty
    logits = scale * keys @ query.T
    peak = logits.max(0).values
    weights = torch.exp(logits - peak)
    total = weights.sum(0)
    return (weights / total).T @ values, peak + total.log()


def true_decode(inputs: DecodeInputs) -> AttentionState:
    lengths = inputs.kv_lens.tolist()
    out = inputs.q_nope.double()
    lse = out.new_zeros(out.shape[:-1])
    latent = out.shape[-1]
    query = out if inputs.q_rope is None else torch.cat([out, inputs.q_rope.double()], -1)
    cache = inputs.cache
    if isinstance(cache, mla_triton.LatentCache):
        cache = cache.ckv if cache.kpe is None else torch.cat([cache.ckv, cache.kpe], -1)
    page_size = cache.shape[1]
    for request, length in enumerate(lengths):
        table = inputs.page_table
        if isinstance(table, mla_triton.CSRPageTable):
            begin, end = table.indptr[request : request + 2].tolist()
            pages = table.indices[begin:end]
        else:
            pages = table[request]
        slots = [(int(pages[n // page_size]), n % page_size) for n in range(length)]
        keys = torch.stack([cache[slot] for slot in slots]) if slots else cache[0, :0]
        keys = keys.double()
        rows: Any = request
        if inputs.cu_seqlens_q is not None:
            rows = slice(*inputs.cu_seqlens_q[request : request + 2].tolist())
        s_q = len(query[rows])
        for token in range(s_q):
            seen = max(0, length - s_q + token + 1) if inputs.causal else length
            own = attend(
                query[rows][token], keys[:seen], keys[:seen, :latent], inputs.softmax_scale
            )
            out[rows][token], lse[rows][token] = own
    return AttentionState(out, lse)


def true_prefill(inputs: PrefillInputs) -> AttentionState:
    q, k, v = inputs.q.double(), inputs.k.double(), inputs.v.double()
    out, lse = q.new_zeros(*q.shape[:2], v.shape[2]), q.new_zeros(q.shape[:2])
    group = q.shape[1] // k.shape[1]
    spans = (pairwise(x.tolist()) for x in (inputs.cu_seqlens_q, inputs.cu_seqlens_k))
    for (q_begin, q_end), (k_begin, k_end) in zip(*spans, strict=True):
        for row in range(q_begin, q_end):
            end = k_end - (q_end - 1 - row) if inputs.causal else k_end
            span = slice(k_begin, max(k_begin, end))
            for head in range(q.shape[1]):
                keys, values = k[span, head // group], v[span, head // group]
                own = attend(q[row, head, None], keys, values, inputs.softmax_scale)
                out[row, head], lse[row, head] = own[0][0], own[1][0]
    return AttentionState(out, lse)


def true_merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> AttentionState:
    """Of natural logarithms in float64."""
    lse = torch.stack(list(lses)).logsumexp(0)
    out = torch.zeros_like(outs[0], dtype=torch.float64)
    for state_out, state_lse in zip(outs, lses, strict=True):
        weight = torch.where(state_lse == -INF, 0.0, (state_lse - lse).exp())[..., None]
        out += torch.where(weight == 0, 0.0, weight * state_out.double())
    return AttentionState(out, lse)


def judge(
    out: torch.Tensor, lse: torch.Tensor, inputs: Inputs, truth: AttentionState | None = None
) -> None:
    """Holds a result, its lse a natural logarithm, against the truth: that of inputs by default."""
    if truth is None:
        on_cpu = inputs.to("cpu")
        truth = true_prefill(on_cpu) if isinstance(on_cpu, PrefillInputs) else true_decode(on_cpu)
    truth = AttentionState(*(tensor.to(out.device) for tensor in truth))
    budget = replace(budget_of(inputs), exact=truth)
    assert_within_budget(AttentionState(out, lse.float()), inputs, budget)


def as_natural(lse: torch.Tensor) -> torch.Tensor:
    assert lse.dtype == torch.float32
    return lse.double() * LN_2


def like_nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan"))


def joined(inputs: DecodeInputs) -> torch.Tensor:
    """The queries in one tensor, as libraries with fused caches have them."""
    parts = [inputs.q_nope] if inputs.q_rope is None else [inputs.q_nope, inputs.q_rope]
    return torch.cat(parts, dim=-1)


# -- FlashMLA


def grouped(kv_heads: int, **recipe: Any) -> list[DecodeInputs]:
    """Problems of the same pages and lengths, one for each KV head."""
    first = decode_inputs(**recipe)
    found = []
    for seed in range(kv_heads):
        generator = torch.Generator().manual_seed(seed)

        def noise(tensor: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
            return torch.where(tensor.isnan(), tensor, drawn)

        rope = None if first.q_rope is None else noise(first.q_rope)
        one = replace(first, q_nope=noise(first.q_nope), q_rope=rope, cache=noise(first.cache))
        found.append(one)
    return found


def flash_mla_decode(
    kv_heads: int = 1,
    metas: Sequence[flash_mla.FlashMLASchedMeta] | None = None,
    scale: float | None = None,
    **recipe: Any,
) -> None:
    problems = grouped(kv_heads, **recipe)
    q = torch.cat([joined(one) for one in problems], dim=2)
    k_cache = torch.stack([one.cache for one in problems], dim=2)
    used = q.shape[-1] ** -0.5 if scale is None else scale
    problems = [replace(one, softmax_scale=used) for one in problems]
    first, latent = problems[0], problems[0].q_nope.shape[-1]
    meta, num_splits = flash_mla.get_mla_metadata() if metas is None else (metas[0], None)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, k_cache, first.page_table, first.kv_lens, latent, meta, num_splits,
        softmax_scale=scale, causal=first.causal,
    )  # fmt: skip
    batch, s_q, heads, _ = q.shape
    assert out.shape == (batch, s_q, heads, latent)
    assert lse.shape == (batch, heads, s_q)
    assert lse.is_contiguous()
    assert not (lse == -INF).any()
    lse = torch.where(lse == INF, -INF, lse).transpose(1, 2)
    group = heads // kv_heads
    for kv_head, one in enumerate(problems):
        mine = slice(kv_head * group, (kv_head + 1) * group)
        judge(out[:, :, mine], lse[:, :, mine], one)


def flash_mla_prefill(**recipe: Any) -> None:
    inputs = prefill_inputs(**recipe)
    lengths = inputs.cu_seqlens_q.diff()
    out, lse = flash_mla.flash_attn_varlen_func(
        inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
        int(lengths.max()), int(inputs.cu_seqlens_k.diff().max()), causal=inputs.causal,
    )  # fmt: skip
    assert lse.shape == inputs.q.shape[:2]
    judge(out, lse, inputs)


# -- FlashInfer


class MLACase:
    """A problem, and the arguments of `plan` and `run` that it makes.

    `indptr_on` is where the offsets live, `too_long` by how many entries they are longer than they
    need be, `index_dtype` their type.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        indptr_on: torch.device | str | None = None,
        too_long: int = 0,
        index_dtype: torch.dtype = torch.int32,
        **recipe: Any,
    ) -> None:
        self.inputs = decode_inputs(layout="pair", table="csr", device=device, **recipe)
        inputs = self.inputs
        self.q_nope = inputs.q_nope
        self.is_uniform = inputs.cu_seqlens_q is None
        if inputs.cu_seqlens_q is None:
            batch, s_q = self.q_nope.shape[:2]
            self.q_nope = self.q_nope.flatten(0, 1)
            qo_indptr = torch.arange(batch + 1, dtype=torch.int32, device=device) * s_q
        else:
            qo_indptr = inputs.cu_seqlens_q
        empty = self.q_nope[..., :0]
        self.q_pe = empty if inputs.q_rope is None else inputs.q_rope.view(*empty.shape[:2], -1)
        ckv, kpe = inputs.cache.ckv, inputs.cache.kpe
        self.caches = ckv, ckv[..., :0] if kpe is None else kpe
        rest = torch.full((too_long,), 2**30, dtype=torch.int32, device=device)
        offsets = (qo_indptr, inputs.page_table.indptr)
        self.metadata = (
            *(torch.cat([x, rest]).to(indptr_on or device, index_dtype) for x in offsets),
            inputs.page_table.indices.to(index_dtype),
            inputs.kv_lens.to(index_dtype),
        )

    def changed(self, kv_lens: Sequence[int], q_lens: Sequence[int] | None = None) -> MLACase:
        """The same queries and caches of another step: requests have no more keys than here, and
        ragged ones share the query tokens out differently."""
        inputs = self.inputs
        device, page_size = self.q_nope.device, self.caches[0].shape[1]
        indptr, indices = inputs.page_table
        counts = [-(-length // page_size) for length in kv_lens]
        begins = indptr.tolist()
        pages = [indices[a : a + count] for a, count in zip(begins, counts, strict=False)]
        table = mla_triton.CSRPageTable(_offsets(counts).to(device), torch.cat(pages))
        lengths = torch.tensor(kv_lens, dtype=torch.int32, device=device)
        other = copy(self)
        offsets = None if q_lens is None else _offsets(q_lens).to(device)
        other.inputs = replace(inputs, page_table=table, kv_lens=lengths, cu_seqlens_q=offsets)
        qo_indptr = self.metadata[0] if offsets is None else offsets
        other.metadata = (qo_indptr, table.indptr, table.indices, lengths)
        return other

    @property
    def batch(self) -> int:
        return self.inputs.kv_lens.shape[0]

    @property
    def facts(self) -> tuple[Any, ...]:
        """What `plan` takes behind the four index tensors."""
        ckv, kpe = self.caches
        dtype, inputs = self.inputs.dtype, self.inputs
        return (
            self.q_nope.shape[1], ckv.shape[2], kpe.shape[2], ckv.shape[1], inputs.causal,
            inputs.softmax_scale, dtype, dtype,
        )  # fmt: skip

    def wrapper(self, **options: Any) -> flashinfer.BatchMLAPagedAttentionWrapper:
        workspace = torch.empty(1024, dtype=torch.int8, device=self.q_nope.device)
        return flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, **options)

    def buffered_wrapper(self) -> flashinfer.BatchMLAPagedAttentionWrapper:
        """For CUDA graphs, with more room for pages than this case needs."""

        def buffer(size: int) -> torch.Tensor:
            return torch.full((size,), 2**30, dtype=torch.int32, device=self.q_nope.device)

        return self.wrapper(
            use_cuda_graph=True,
            qo_indptr=buffer(self.batch + 1),
            kv_indptr=buffer(self.batch + 1),
            kv_indices=buffer(2 * self.metadata[2].shape[0] + 7),
            kv_len_arr=buffer(self.batch),
        )

    def run(self, wrapper: Any, **options: Any) -> Any:
        return wrapper.run(self.q_nope, self.q_pe, *self.caches, **options)

    def judge(self, out: torch.Tensor, natural_lse: torch.Tensor) -> None:
        rows = self.inputs.q_nope.shape[:-1]
        assert out.shape == self.q_nope.shape
        assert natural_lse.shape == self.q_nope.shape[:-1]
        judge(out.view(*rows, -1), natural_lse.view(rows), self.inputs)


def _offsets(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32)


def flashinfer_mla(
    *, buffered: bool = False, backend: str = "auto", use_natural: bool = False, **recipe: Any
) -> None:
    case = MLACase(**recipe)
    wrapper = case.buffered_wrapper() if buffered else case.wrapper(backend=backend)
    wrapper.plan(*case.metadata, *case.facts)
    out, lse = case.run(wrapper, return_lse=True, return_lse_base_on_e=use_natural)
    case.judge(out, lse if use_natural else as_natural(lse))

    own_out, own_lse = like_nan(out), like_nan(lse)
    assert case.run(wrapper, out=own_out, lse=own_lse) is own_out
    case.judge(own_out, as_natural(own_lse))
    assert torch.equal(case.run(wrapper), out)


def flashinfer_ragged(*, layout: str = "NHD", indptr_on: Any = None, **recipe: Any) -> None:
    inputs = prefill_inputs(**recipe)
    q, k, v = inputs.q, inputs.k, inputs.v
    device = q.device
    workspace = torch.empty(1024, dtype=torch.int8, device=device)
    wrapper = flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper(
        workspace, layout, backend="fa2"
    )
    offsets = (x.to(indptr_on or device) for x in (inputs.cu_seqlens_q, inputs.cu_seqlens_k))
    wrapper.plan(
        *offsets, q.shape[1], k.shape[1], q.shape[2], head_dim_vo=v.shape[2],
        causal=inputs.causal, q_data_type=inputs.dtype,
    )  # fmt: skip
    given = (q, k, v) if layout == "NHD" else (q, k.transpose(0, 1), v.transpose(0, 1))
    out, lse = wrapper.run_return_lse(*given)
    judge(out, as_natural(lse), inputs)
    own_out, own_lse = like_nan(out), like_nan(lse)
    assert wrapper.run(*given, out=own_out, lse=own_lse) is own_out
    judge(own_out, as_natural(own_lse), inputs)


def flashinfer_single(*, q_len: int, k_len: int, layout: str = "NHD", **recipe: Any) -> None:
    inputs = prefill_inputs(q_lens=[q_len], k_lens=[k_len], **recipe)
    k, v = inputs.k[:k_len], inputs.v[:k_len]
    if layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    out, lse = flashinfer.single_prefill_with_kv_cache(
        inputs.q, k, v, causal=inputs.causal, kv_layout=layout, backend="fa3", return_lse=True
    )
    judge(out, as_natural(lse), inputs)
    alone = flashinfer.single_prefill_with_kv_cache(
        inputs.q, k, v, causal=inputs.causal, kv_layout=layout
    )
    assert torch.equal(alone, out)
    again = flashinfer.single_prefill_with_kv_cache_return_lse(
        inputs.q, k, v, causal=inputs.causal, kv_layout=layout
    )
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


def base_2_states(**recipe: Any) -> tuple[MergeInputs, list[torch.Tensor], AttentionState]:
    """A merge, the base-2 lse of its states, and the truth about those: they are rounded."""
    inputs = merge_inputs(**recipe)
    scores = [(state.lse.double() / LN_2).float() for state in inputs.states]
    truth = true_merge(
        [state.out for state in inputs.states], [score.double() * LN_2 for score in scores]
    )
    return inputs, scores, truth


def flashinfer_merge_two(**recipe: Any) -> None:
    inputs, (s_a, s_b), truth = base_2_states(**recipe)
    v_a, v_b = (state.out for state in inputs.states)
    v, s = flashinfer.merge_state(v_a, s_a, v_b, s_b)
    judge(v, as_natural(s), inputs, truth)


def flashinfer_merge_in_place(**recipe: Any) -> None:
    inputs, (s, s_other), truth = base_2_states(**recipe)
    v, v_other = (state.out.clone() for state in inputs.states)
    kept_v, kept_s = v.clone(), s.clone()
    mask = inputs.mask
    assert flashinfer.merge_state_in_place(v, s, v_other, s_other, mask) is None
    if mask is not None:
        assert torch.equal(v[~mask].nan_to_num(7.0), kept_v[~mask].nan_to_num(7.0))
        assert torch.equal(s[~mask], kept_s[~mask])
        first = AttentionState(kept_v.double(), kept_s.double() * LN_2)
        keep = ~mask[:, None]
        truth = AttentionState(
            torch.where(keep[..., None], first.out, truth.out),
            torch.where(keep, first.lse, truth.lse),
        )
    judge(v, as_natural(s), inputs, truth)


def flashinfer_merge_many(**recipe: Any) -> None:
    inputs, scores, truth = base_2_states(**recipe)
    v = torch.stack([state.out for state in inputs.states], dim=1)
    merged, s = flashinfer.merge_states(v, torch.stack(scores, dim=1))
    judge(merged, as_natural(s), inputs, truth)


# -- vLLM and SGLang


def vllm_decode(
    *, lse_dtype: torch.dtype = torch.float32, index_dtype: torch.dtype = torch.int32, **recipe: Any
) -> None:
    inputs = decode_inputs(**recipe)
    q, latent = joined(inputs).squeeze(1), inputs.q_nope.shape[-1]
    k_buffer = inputs.cache.unsqueeze(2)
    page_size = k_buffer.shape[1]
    if page_size == 1:
        k_buffer = k_buffer.squeeze(1)
    out = like_nan(inputs.q_nope.squeeze(1))
    lse = torch.full(q.shape[:2], float("nan"), dtype=lse_dtype, device=q.device)
    splits = 4
    attn_logits = torch.empty(*q.shape[:2], splits, latent + 1, device=q.device)
    done = vllm.decode_attention_fwd(
        q, k_buffer, k_buffer[..., :latent], out, lse,
        inputs.page_table.to(index_dtype), inputs.kv_lens.to(index_dtype),
        attn_logits, splits, inputs.softmax_scale, page_size,
    )  # fmt: skip
    assert done is None
    if lse_dtype == torch.float32:
        judge(out.unsqueeze(1), lse.unsqueeze(1), inputs)
        return
    again = torch.empty(q.shape[:2], device=q.device)
    vllm.decode_attention_fwd(
        q, k_buffer, k_buffer[..., :latent], out, again, inputs.page_table, inputs.kv_lens,
        None, 1, inputs.softmax_scale, page_size, is_mla=True,
    )  # fmt: skip
    judge(out.unsqueeze(1), again.unsqueeze(1), inputs)
    assert torch.equal(lse, again.to(lse_dtype))


def vllm_merge(*, with_context: int | None = None, in_place: bool = False, **recipe: Any) -> None:
    inputs = merge_inputs(**recipe)
    prefix, suffix = inputs.states
    truth = true_merge([prefix.out, suffix.out], [prefix.lse.double(), suffix.lse.double()])
    # As vLLM holds them: heads first, and in one of the two +inf where a row is empty.
    prefix_lse = torch.where(prefix.lse == -INF, INF, prefix.lse).T.contiguous()
    suffix_lse = suffix.lse.T.contiguous()
    output = prefix.out.clone() if in_place else like_nan(prefix.out)
    prefix_out = output if in_place else prefix.out
    output_lse = like_nan(prefix_lse)
    given = (output, prefix_out, prefix_lse, suffix.out, suffix_lse, output_lse)
    assert vllm.merge_attn_states(*given, with_context) is None
    if with_context is not None:
        assert torch.equal(output[with_context:], suffix.out[with_context:])
        assert torch.equal(output_lse[:, with_context:], suffix_lse[:, with_context:])
        truth.out[with_context:] = suffix.out[with_context:].double()
        truth.lse[with_context:] = suffix.lse[with_context:].double()
    judge(output, output_lse.T, inputs, truth)


def sglang_merge(*, with_buffers: bool, **recipe: Any) -> None:
    inputs, (s_a, s_b), truth = base_2_states(**recipe)
    v_a, v_b = (state.out for state in inputs.states)
    buffers = (like_nan(v_a), like_nan(s_a)) if with_buffers else ()
    v, s = sglang.merge_state(v_a, s_a, v_b, s_b, *buffers)
    judge(v, as_natural(s), inputs, truth)
    assert not buffers or (v is buffers[0] and s is buffers[1])


def sglang_merge_v2(*, with_buffers: bool, **recipe: Any) -> None:
    inputs = merge_inputs(**recipe)
    first, second = inputs.states
    truth = true_merge([first.out, second.out], [first.lse.double(), second.lse.double()])
    s_a = torch.where(first.lse == -INF, INF, first.lse)
    kept = s_a.clone()
    buffers = (like_nan(first.out), like_nan(s_a)) if with_buffers else ()
    v, s = sglang.merge_state_v2(first.out, s_a, second.out, second.lse, *buffers)
    judge(v, s, inputs, truth)
    assert torch.equal(s_a, kept)
    assert not buffers or (v is buffers[0] and s is buffers[1])


def sglang_decode(*, index_dtype: torch.dtype = torch.int32, **recipe: Any) -> None:
    inputs = decode_inputs(page_size=1, table="csr", **recipe)
    q, latent = joined(inputs).squeeze(1), inputs.q_nope.shape[-1]
    k_buffer = inputs.cache.squeeze(1).unsqueeze(1)
    out = like_nan(inputs.q_nope.squeeze(1))
    longer = torch.full((3,), 2**30, dtype=torch.int32, device=q.device)
    attn_lse = torch.full((*q.shape[:2], 8), float("nan"), device=q.device)
    done = sglang.decode_attention_fwd(
        q, k_buffer, k_buffer[..., :latent], out,
        torch.cat([inputs.page_table.indptr, longer]), inputs.page_table.indices.to(index_dtype),
        torch.empty(0, device=q.device), attn_lse, None, 8, inputs.softmax_scale,
    )  # fmt: skip
    assert done is None
    truth = true_decode(inputs.to("cpu"))
    lse = truth.lse.to(q.device)  # which SGLang does not return
    judge(out.unsqueeze(1), lse, inputs, truth)
