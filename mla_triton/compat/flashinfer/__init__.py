"""FlashInfer's interface, as far as it is about MLA. Its modules are here by the same names."""

from mla_triton.compat.flashinfer import cascade, mla, page, prefill
from mla_triton.compat.flashinfer.cascade import merge_state, merge_state_in_place, merge_states
from mla_triton.compat.flashinfer.mla import BatchMLAPagedAttentionWrapper
from mla_triton.compat.flashinfer.page import (
    append_paged_mla_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
)
from mla_triton.compat.flashinfer.prefill import (
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)

__all__ = [
    "BatchMLAPagedAttentionWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "append_paged_mla_kv_cache",
    "cascade",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "mla",
    "page",
    "prefill",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]
