"""MLA as it is trained: keys and values expanded from the latents, a pair for every head.

`absorb_queries` and `project_values` lead from there to the absorbed form and back, so that
`project_values(decode(absorb_queries(q, w_uk), ...).out, w_uv)` equals `attention(q, ...).out`.
"""

from __future__ import annotations

import torch

from mla_triton.reference.decode import softmax, visible_keys
from mla_triton.state import AttentionState


def absorb_queries(q_nope: torch.Tensor, w_uk: torch.Tensor) -> torch.Tensor:
    """Queries against expanded keys, as queries against latents.

    `q_nope` is `[..., heads, nope]`, `w_uk` `[heads, nope, latent]`. Returns `[..., heads,
    latent]`.
    """
    return torch.einsum("...hd,hdl->...hl", q_nope, w_uk)


def project_values(out: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """Attention over latents, as attention over expanded values.

    `out` is `[..., heads, latent]`, `w_uv` `[heads, v, latent]`. Returns `[..., heads, v]`.
    """
    return torch.einsum("...hl,hvl->...hv", out, w_uv)


def attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor | None,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    compute_dtype: torch.dtype = torch.float64,
) -> AttentionState:
    """Ordinary multi-head attention of one request.

    `q_nope` `[s_q, heads, nope]`, `q_rope` `[s_q, heads, rope]` or None; `c_kv` `[kv_len, latent]`,
    `k_pe` `[kv_len, rope]` or None, shared by all heads; `w_uk` `[heads, nope, latent]`, `w_uv`
    `[heads, v, latent]`. Causal masks are aligned to the last key. Returns out `[s_q, heads, v]`
    and lse `[s_q, heads]` in `compute_dtype`.
    """
    latents = c_kv.to(compute_dtype)
    query = q_nope.to(compute_dtype).transpose(0, 1)
    keys = torch.einsum("nl,hdl->hnd", latents, w_uk.to(compute_dtype))
    values = torch.einsum("nl,hvl->hnv", latents, w_uv.to(compute_dtype))
    if q_rope is not None and k_pe is not None:
        query = torch.cat([query, q_rope.to(compute_dtype).transpose(0, 1)], dim=-1)
        shared = k_pe.to(compute_dtype).expand(len(w_uk), -1, -1)
        keys = torch.cat([keys, shared], dim=-1)
    seen = visible_keys(q_nope.shape[0], len(c_kv), causal, c_kv.device)
    heads = [softmax(query[h, :, None], keys[h], seen, softmax_scale) for h in range(len(w_uk))]
    out = torch.stack([w.squeeze(1) @ v for (w, _), v in zip(heads, values, strict=True)], dim=1)
    return AttentionState(out, torch.cat([lse for _, lse in heads], dim=1))
