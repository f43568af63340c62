"""`flashinfer.mla`: absorbed attention over a paged latent cache, planned once for many layers."""

from __future__ import annotations

from itertools import pairwise

import torch

import mla_triton
from mla_triton import CSRPageTable, LatentCache, Plan
from mla_triton.compat.conventions import (
    bound_of,
    check_rank,
    check_tensors,
    int32,
    only,
    set_empty,
    to_base_2,
)
from mla_triton.validate import DTYPES, fail, number

__all__ = ["BatchMLAPagedAttentionWrapper"]

LSE_MODES = ("none", "base2", "basee")


class BatchMLAPagedAttentionWrapper:
    """Decode and incremental prefill of a batch: `plan` once a step, `run` once a layer.

    As in FlashInfer, `plan` reads how many query tokens each request has, and so waits for the
    device where `qo_indptr` lives there; `run` waits for nothing. Without CUDA graphs it reads the
    lengths, too, for the bound of them that configs are chosen by.

    With `use_cuda_graph`, `plan` writes to the buffers that are given here, and to the schedule
    that an earlier `run` has made. So a captured `run` is replayed with the lengths and pages of
    the latest `plan`; and with its division of the queries, if it was captured with requests that
    differ in query tokens.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        """
        Args:
            float_workspace_buffer: says on which device; nothing is kept in it.
            qo_indptr, kv_indptr, kv_indices, kv_len_arr: int32 buffers for `plan`, with
                `use_cuda_graph`: `[batch + 1]`, `[batch + 1]`, the most pages there will be, and
                `[batch]`.
            backend: any name; what runs is chosen by `mla_triton.decode`.
        """
        check_tensors(float_workspace_buffer=float_workspace_buffer)
        self.device = float_workspace_buffer.device
        self._use_cuda_graph = use_cuda_graph
        if use_cuda_graph:
            check_tensors(
                qo_indptr=qo_indptr,
                kv_indptr=kv_indptr,
                kv_indices=kv_indices,
                kv_len_arr=kv_len_arr,
            )
            assert qo_indptr is not None
            assert kv_indptr is not None
            assert kv_indices is not None
            assert kv_len_arr is not None
            count = kv_len_arr.shape[0] + 1
            self._cu_seqlens_q = qo_indptr[:count]
            self._page_table = CSRPageTable(kv_indptr[:count], kv_indices)
            self._kv_lens = kv_len_arr
        self._is_planned = False
        self._is_captured = False
        self._s_q: int | None = None
        """Query tokens of each request, where all have as many."""
        self._shapes: tuple[object, ...] = ()
        self._plan: Plan | None = None

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
        *,
        lse_mode: str = "none",
    ) -> None:
        """Takes the lengths of a step, and what all layers have in common.

        Args:
            qo_indptr: `[batch + 1]`, where each request's query tokens begin.
            kv_indptr, kv_indices: the pages of all requests, one request after another.
            kv_len_arr: `[batch]`, keys of each request.
            lse_mode: "basee" for natural logarithms, else they are to base 2.

        The four may be on the CPU, of another integer type and, but for `kv_len_arr`, longer than
        they need be.

        Raises:
            NotImplementedError: `use_profiler`, or quantised values: a dtype that is not of 16 or
                32 bits, or one of the cache that is not that of the queries.
            TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
                value.
        """
        only("use_profiler", use_profiler, False)
        if q_data_type not in DTYPES:
            rule = "be float16, bfloat16 or float32"
            fail(NotImplementedError, "q_data_type", rule, q_data_type)
        only("kv_data_type", kv_data_type, q_data_type, why=" like q_data_type")
        if lse_mode not in LSE_MODES:
            fail(ValueError, "lse_mode", f"be one of {', '.join(LSE_MODES)}", lse_mode)
        check_tensors(
            qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_indices=kv_indices, kv_len_arr=kv_len_arr
        )
        count = kv_len_arr.shape[0] + 1
        for name, given in (("qo_indptr", qo_indptr), ("kv_indptr", kv_indptr)):
            if given.dim() != 1 or given.shape[0] < count:
                rule = f"be [batch + 1] = [{count}] or longer"
                fail(ValueError, name, rule, f"shape {tuple(given.shape)}")
        qo_indptr, kv_indptr = qo_indptr[:count], kv_indptr[:count]
        s_q = self._as_captured(qo_indptr.tolist())
        if self._use_cuda_graph:
            self._check_room(kv_indices, kv_len_arr)
            self._cu_seqlens_q.copy_(qo_indptr)
            self._page_table.indptr.copy_(kv_indptr)
            self._page_table.indices[: kv_indices.shape[0]].copy_(kv_indices)
            self._kv_lens.copy_(kv_len_arr)
            self._max_kv_len = None
        else:
            self._cu_seqlens_q = int32(qo_indptr, self.device)
            self._page_table = CSRPageTable(
                int32(kv_indptr, self.device), int32(kv_indices, self.device)
            )
            self._kv_lens = int32(kv_len_arr, self.device)
            capacity = kv_indices.shape[0] * page_size
            self._max_kv_len = min(bound_of(kv_len_arr.tolist()), capacity)
        shapes = (s_q, num_heads, head_dim_ckv, head_dim_kpe, q_data_type)
        if self._plan is not None and self._use_cuda_graph and shapes == self._shapes:
            ragged = self._plan.problem.ragged
            self._plan.update(self._kv_lens, self._cu_seqlens_q if ragged else None)
        else:
            self._plan = None
        self._s_q, self._shapes = s_q, shapes
        self._heads, self._latent, self._rope = num_heads, head_dim_ckv, head_dim_kpe
        self._page_size = page_size
        self._causal = bool(causal)
        self._scale = number("sm_scale", sm_scale)
        self._dtype = q_data_type
        self._is_natural = lse_mode == "basee"
        self._is_planned = True

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        ckv_scale: float | None = None,
        ckv_scale_arr: torch.Tensor | None = None,
        kpe_scale: float | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer.

        Args:
            q_nope, q_pe: `[tokens, num_heads, head_dim_ckv]` and `[tokens, num_heads,
                head_dim_kpe]`.
            ckv_cache, kpe_cache: `[pages, page_size, head_dim_ckv]` and `[pages, page_size,
                head_dim_kpe]`, any strides but the last. `kpe_cache` and `q_pe` have no columns, or
                are anything, where `head_dim_kpe` is 0.
            out, lse: buffers for the result; `lse` is written whether or not it is returned.
            return_lse_base_on_e: natural logarithms rather than those to base 2.

        Returns:
            out `[tokens, num_heads, head_dim_ckv]`, or with `return_lse` (out, lse `[tokens,
            num_heads]` float32). A row that sees no key has out 0 and lse -inf.

        Raises:
            NotImplementedError: an argument asks for a profiler, a page table without `plan`, or
                scales of quantised values.
            TypeError, ValueError: an argument breaks a rule, or not what `plan` was told; the
                message names argument, rule and value.
        """
        refused = {
            "profiler_buffer": profiler_buffer,
            "kv_len": kv_len,
            "page_table": page_table,
            "o_scale": o_scale,
            "ckv_scale": ckv_scale,
            "ckv_scale_arr": ckv_scale_arr,
            "kpe_scale": kpe_scale,
        }
        for name, value in refused.items():
            only(name, value, None)
        if not self._is_planned:
            fail(ValueError, "run", "follow a call of plan", "none")
        has_rope = self._rope > 0
        self._check_arguments(q_nope, q_pe, ckv_cache, kpe_cache)
        is_lse_wanted = return_lse or lse is not None
        if out is None:
            out = torch.empty_like(q_nope, memory_format=torch.contiguous_format)
        if lse is None:
            lse = q_nope.new_empty(q_nope.shape[:-1], dtype=torch.float32)
        check_tensors(out=out, lse=lse)
        if not ckv_cache.shape[0] or not self._page_table.indices.shape[0]:
            set_empty(out, lse)
        else:
            q_rope = q_pe if has_rope else None
            cache = LatentCache(ckv_cache, kpe_cache if has_rope else None)
            self._decode(q_nope, q_rope, cache, out, lse)
        if is_lse_wanted and not (return_lse_base_on_e or self._is_natural):
            to_base_2(lse)
        return (out, lse) if return_lse else out

    def _decode(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor | None,
        cache: LatentCache,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        tokens, batch = q_nope.shape[0], self._kv_lens.shape[0]
        if self._s_q is None or tokens != batch * self._s_q:
            sizes, cu_seqlens_q = None, self._cu_seqlens_q
        else:
            # Equal requests need no offsets, and a kernel without them is a little faster.
            sizes, cu_seqlens_q = (batch, self._s_q), None
        if self._plan is None or self._plan.problem.queries != tokens:
            self._plan = mla_triton.plan(
                self._kv_lens,
                heads=self._heads,
                latent=self._latent,
                rope=self._rope,
                dtype=self._dtype,
                s_q=1 if sizes is None else sizes[1],
                cu_seqlens_q=cu_seqlens_q,
                queries=tokens if sizes is None else None,
            )
        if q_nope.is_cuda and torch.cuda.is_current_stream_capturing():
            self._is_captured = True

        def divided(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() == 0 or tensor.shape[0] != tokens:
                rule = f"have q_nope's {tokens} tokens"
                fail(ValueError, name, rule, f"shape {tuple(tensor.shape)}")
            return tensor if sizes is None else tensor.unflatten(0, sizes)

        mla_triton.decode(
            divided("q_nope", q_nope),
            None if q_rope is None else divided("q_pe", q_rope),
            cache,
            self._page_table,
            self._kv_lens,
            softmax_scale=self._scale,
            causal=self._causal,
            cu_seqlens_q=cu_seqlens_q,
            max_kv_len=self._max_kv_len,
            plan=self._plan,
            out=divided("out", out),
            lse=divided("lse", lse),
        )

    def _as_captured(self, bounds: list[int]) -> int | None:
        """Query tokens of each request for the next run, None where they differ.

        A run that was captured with one number has it in its kernels; one that was captured ragged
        reads it, and stays ragged. Raises ValueError where a replay would not follow.
        """
        s_q = _common_step(bounds)
        if not self._is_captured:
            return s_q
        if self._s_q is not None and s_q != self._s_q:
            rule = f"give each request the {self._s_q} query tokens of the captured run"
            fail(ValueError, "qo_indptr", rule, "others" if s_q is None else s_q)
        if self._plan is not None and bounds[-1] > self._plan.problem.queries:
            rule = f"end within the {self._plan.problem.queries} tokens of the captured run"
            fail(ValueError, "qo_indptr", rule, bounds[-1])
        return self._s_q

    def _check_room(self, kv_indices: torch.Tensor, kv_len_arr: torch.Tensor) -> None:
        """Raises ValueError where buffers are not for such a batch."""
        batch, room = self._kv_lens.shape[0], self._page_table.indices.shape[0]
        if kv_len_arr.shape[0] != batch:
            fail(ValueError, "kv_len_arr", f"be as long as its buffer, {batch}", len(kv_len_arr))
        if kv_indices.shape[0] > room:
            fail(ValueError, "kv_indices", f"fit its buffer of {room}", len(kv_indices))

    def _check_arguments(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
    ) -> None:
        """Raises TypeError and ValueError where a layer is not what `plan` was told."""
        given = {"q_nope": (q_nope, self._latent), "ckv_cache": (ckv_cache, self._latent)}
        if self._rope:
            given |= {"q_pe": (q_pe, self._rope), "kpe_cache": (kpe_cache, self._rope)}
        for name, (tensor, width) in given.items():
            check_tensors(**{name: tensor})
            is_query = name.startswith("q")
            places = ("tokens", "num_heads") if is_query else ("pages", "page_size")
            check_rank(name, tensor, ", ".join((*places, "head_dim")))
            if tensor.dtype != self._dtype:
                fail(TypeError, name, f"have the dtype of plan, {self._dtype}", tensor.dtype)
            sizes = (self._heads if is_query else self._page_size, width)
            if tuple(tensor.shape[1:]) != sizes:
                rule = f"be [{places[0]}, {sizes[0]}, {sizes[1]}], as plan was told"
                fail(ValueError, name, rule, f"shape {tuple(tensor.shape)}")


def _common_step(bounds: list[int]) -> int | None:
    """How far all neighbours are apart, where that is one number, not 0, counted from 0."""
    steps = {end - begin for begin, end in pairwise(bounds)}
    return steps.pop() if len(steps) == 1 and bounds[0] == 0 and 0 not in steps else None
