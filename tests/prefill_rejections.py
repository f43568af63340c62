"""Every rule about arguments of prefill: a call that breaks it, and the exact message.

`tests/test_validate.py` makes the calls, together with those of `rejections`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from rejections import GRAD, STRIDE, TURING, Call, Rejection, empty, int32, spaced, to_meta

import mla_triton
from mla_triton import select
from mla_triton.problem import PrefillProblem
from mla_triton.testing import prefill_inputs

QK, ROPE, VALUE, HEADS, KV_HEADS, TOKENS = 48, 16, 32, 4, 2, 11


def arguments(*, device: str = "cpu", split: bool = False, **changes: Any) -> dict[str, Any]:
    """Of a prefill that keeps every rule; a change may be a function of the argument it replaces.

    `split` gives the rotary columns of queries and keys as tensors of their own.
    """
    inputs = prefill_inputs(
        q_lens=[8, 3], k_lens=[9, 7], heads=HEADS, kv_heads=KV_HEADS, qk=QK, v_dim=VALUE, rope=ROPE,
        split_q=split, split_k=split, dtype=torch.float16, device=device,
    )  # fmt: skip
    positional, options = inputs.call_arguments()
    given = dict(zip(("q", "k", "v"), positional, strict=True)) | options | inputs.output_buffers()
    for name, change in changes.items():
        is_function = callable(change) and not isinstance(change, torch.Tensor)
        given[name] = change(given[name]) if is_function else change
    return given


def prefill(**changes: Any) -> Call:
    return lambda: mla_triton.prefill(**arguments(**changes))


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments().items() if key != name}


def sharing(name: str, other: str, dtype: torch.dtype = torch.float16) -> Call:
    """A call whose result `name` lies in the memory of another argument."""

    def call() -> Any:
        given = arguments()
        size = given[name].numel() * given[name].element_size()
        memory = given[other].view(torch.uint8).flatten()[:size]
        given[name] = memory.view(dtype).view(given[name].shape)
        return mla_triton.prefill(**given)

    return call


def problem(**changes: Any) -> PrefillProblem:
    given = {
        "dtype": torch.float16, "heads": 4, "kv_heads": 4, "qk_dim": 192, "value_dim": 128,
        "q_nope": 192, "k_nope": 128, "causal": True, "usual_queries": 128,
    }  # fmt: skip
    return PrefillProblem(**(given | changes))


# fmt: off
TYPES = [
    *(
        Rejection(f"prefill: {name} is no tensor", prefill(**{name: [1.0]}), TypeError,
            f"{name} must be a torch.Tensor, got list")
        for name in (
            "q", "k", "v", "q_rope", "k_rope", "cu_seqlens_q", "cu_seqlens_k", "out", "lse"
        )
    ),
    Rejection("prefill: impl of wrong type", prefill(impl=1), TypeError,
        "impl must be a str or None, got int"),
    Rejection("prefill: causal is no bool", prefill(causal=1), TypeError,
        "causal must be True or False, got int"),
    Rejection("prefill: max_seqlen_q is no integer", prefill(max_seqlen_q=8.0), TypeError,
        "max_seqlen_q must be an integer, got float"),
    Rejection("prefill: max_seqlen_q is on the device",
        prefill(max_seqlen_q=torch.tensor(8)), TypeError,
        "max_seqlen_q must be an integer, got Tensor"),
    Rejection("prefill: softmax_scale is missing",
        lambda: mla_triton.prefill(**without("softmax_scale")), TypeError,
        "prefill() missing 1 required keyword-only argument: 'softmax_scale'"),
    Rejection("prefill: softmax_scale is None", prefill(softmax_scale=None), TypeError,
        "softmax_scale must be a number, got NoneType"),
]

DTYPES = [
    *(
        Rejection(f"prefill: q is {dtype}", prefill(q=lambda q, dtype=dtype: q.to(dtype)),
            TypeError, f"q must be float16, bfloat16 or float32, got {dtype}")
        for dtype in (torch.float64, torch.float8_e4m3fn)
    ),
    *(
        Rejection(f"prefill: {name} of another dtype",
            prefill(split=True, **{name: lambda t: t.bfloat16()}), TypeError,
            f"{name} must have q's dtype torch.float16, got torch.bfloat16")
        for name in ("q_rope", "k", "k_rope", "v", "out")
    ),
    *(
        Rejection(f"prefill: {name} of int64", prefill(**{name: lambda t: t.long()}), TypeError,
            f"{name} must be int32, got torch.int64")
        for name in ("cu_seqlens_q", "cu_seqlens_k")
    ),
    Rejection("prefill: lse of another dtype", prefill(lse=lambda t: t.half()), TypeError,
        "lse must be float32, got torch.float16"),
]

DEVICES = [
    *(
        Rejection(f"prefill: {name} elsewhere",
            prefill(split=True, **{name: to_meta}), ValueError,
            f"{name} must be on q's device cpu, got meta")
        for name in (
            "q_rope", "k", "k_rope", "v", "cu_seqlens_q", "cu_seqlens_k", "out", "lse"
        )
    ),
]

SHAPES = [
    Rejection("prefill: q of two dimensions",
        prefill(q=lambda q: q[0], out=None, lse=None), ValueError,
        "q must be [tokens, heads, columns] with at least one head and one column, got shape "
        "(4, 48)"),
    Rejection("prefill: q without dimensions",
        prefill(q=lambda q: q[0, 0, 0], out=None, lse=None), ValueError,
        "q must be [tokens, heads, columns] with at least one head and one column, got shape ()"),
    Rejection("prefill: q with a batch", prefill(q=lambda q: q[None]), ValueError,
        "q must be [tokens, heads, columns] with at least one head and one column, got shape "
        "(1, 11, 4, 48)"),
    Rejection("prefill: k without heads", prefill(k=lambda k: k[:, :0]), ValueError,
        "k must be [tokens, heads, columns] with at least one head and one column, got shape "
        "(21, 0, 48)"),
    Rejection("prefill: heads that do not divide", prefill(q=lambda q: q[:, :3]), ValueError,
        "q must have a multiple of k's 2 heads, got 3"),
    Rejection("prefill: q_rope of other heads",
        prefill(split=True, q_rope=lambda t: t[:, :2]), ValueError,
        "q_rope must be [11, 4, rope] like q, got shape (11, 2, 16)"),
    Rejection("prefill: k_rope with heads",
        prefill(split=True, k_rope=lambda t: t[:, None]), ValueError,
        "k_rope must be [21, rope], one for all heads, got shape (21, 1, 16)"),
    Rejection("prefill: k_rope of fewer tokens",
        prefill(split=True, k_rope=lambda t: t[:5]), ValueError,
        "k_rope must be [21, rope], one for all heads, got shape (5, 16)"),
    Rejection("prefill: keys of another width", prefill(k=lambda k: k[..., :32]), ValueError,
        "k must be as wide as q, 48 columns, got 32"),
    Rejection("prefill: a rotary part too much",
        prefill(k_rope=lambda _: torch.zeros(21, 16).half()), ValueError,
        "k and k_rope must be as wide as q, 48 columns, got 64"),
    Rejection("prefill: keys of another width than both parts of the queries",
        prefill(split=True, k_rope=None), ValueError,
        "k must be as wide as q and q_rope, 48 columns, got 32"),
    Rejection("prefill: values of fewer tokens", prefill(v=lambda v: v[:3]), ValueError,
        "v must be [21, 2, 1 or more columns] like k, got shape (3, 2, 32)"),
    Rejection("prefill: too many rows",
        prefill(
            device="meta", q=empty(2**24, 128, QK), k=empty(5, 128, QK), v=empty(5, 128, VALUE),
            out=None, lse=None,
        ), ValueError,
        "q must have at most 2147483647 rows (query tokens x heads), got 16777216 x 128"),
    Rejection("prefill: too many keys",
        prefill(device="meta", k=empty(2**31, 2, QK), v=empty(2**31, 2, VALUE)), ValueError,
        "k must have at most 2147483647 tokens, got 2147483648"),
    Rejection("prefill: no offsets", prefill(cu_seqlens_q=lambda t: t[:0]), ValueError,
        "cu_seqlens_q must be contiguous [batch + 1], got shape (0,) and strides (1,)"),
    Rejection("prefill: offsets with gaps", prefill(cu_seqlens_q=spaced), ValueError,
        "cu_seqlens_q must be contiguous [batch + 1], got shape (3,) and strides (2,)"),
    Rejection("prefill: offsets of another batch",
        prefill(cu_seqlens_k=int32(0, 16)), ValueError,
        "cu_seqlens_k must be contiguous [batch + 1] = [3], got shape (2,) and strides (1,)"),
    Rejection("prefill: negative max_seqlen_q", prefill(max_seqlen_q=-1), ValueError,
        "max_seqlen_q must be 0 or more, got -1"),
    *(
        Rejection(f"prefill: softmax_scale is {scale}", prefill(softmax_scale=scale), ValueError,
            f"softmax_scale must be finite in float32, got {scale}")
        for scale in (math.nan, math.inf)
    ),
    Rejection("prefill: impl unknown", prefill(impl="flash"), ValueError,
        "impl must be one of sm90, portable, reference, got 'flash'"),
]

RESULTS = [
    Rejection("prefill: out of another shape", prefill(out=lambda t: t[..., :16]), ValueError,
        "out must be (11, 4, 32), got shape (11, 4, 16)"),
    Rejection("prefill: lse of another shape", prefill(lse=lambda t: t.t()), ValueError,
        "lse must be (11, 4), got shape (4, 11)"),
    Rejection("prefill: out expanded",
        prefill(out=lambda t: t[:, :1].expand(-1, HEADS, -1)), ValueError,
        "out must be laid out without overlap, got strides (128, 0, 1)"),
    *(
        Rejection(f"prefill: {name} with gaps", prefill(split=True, **{name: spaced}), ValueError,
            f"{name} {STRIDE} {got}")
        for name, got in (
            ("q", (256, 64, 2)), ("q_rope", (128, 32, 2)), ("k", (128, 64, 2)),
            ("k_rope", (32, 2)), ("v", (128, 64, 2)), ("out", (256, 64, 2)),
        )
    ),
    *(
        Rejection(f"prefill: {name} requires grad",
            prefill(split=True, **{name: lambda t: t.requires_grad_()}), ValueError,
            f"{name} {GRAD}")
        for name in ("q", "q_rope", "k", "k_rope", "v", "out")
    ),
]

ELSEWHERE = [
    Rejection("prefill: no kernel for the card",
        lambda: select.prefill(problem(), TURING, "portable"), NotImplementedError,
        "impl 'portable' cannot run this prefill: it needs capability 8.0 or later, this card has "
        "7.5"),
    Rejection("prefill: no implementation for the card",
        lambda: select.prefill(problem(), TURING), NotImplementedError,
        "no implementation of prefill can run on 7.5: sm90: it is written for capability 9.0, this "
        "card has 7.5; portable: it needs capability 8.0 or later, this card has 7.5; reference: "
        "it synchronises and copies; on a GPU it runs only when asked for (impl='reference')"),
]

# Found with MLA_TRITON_DEBUG=1.
DEBUG = [
    Rejection("prefill: offsets that do not start at 0",
        prefill(cu_seqlens_q=int32(1, 8, 11)), ValueError,
        "cu_seqlens_q must start at 0, got 1"),
    Rejection("prefill: offsets that decrease",
        prefill(cu_seqlens_k=int32(0, 9, 7)), ValueError,
        "cu_seqlens_k must not decrease, got 9 then 7 at index 2"),
    Rejection("prefill: offsets that end behind the keys",
        prefill(cu_seqlens_k=int32(0, 9, 22)), ValueError,
        "cu_seqlens_k must end within the 21 tokens of k, got 22"),
    Rejection("prefill: offsets that end behind the queries",
        prefill(cu_seqlens_q=int32(0, 9, 12)), ValueError,
        "cu_seqlens_q must end within the 11 tokens of q, got 12"),
    Rejection("prefill: a hint that is too small", prefill(max_seqlen_q=7), ValueError,
        "max_seqlen_q must be at least the longest sequence's queries, 8, got 7"),
    Rejection("prefill: out in q", sharing("out", "q"), ValueError,
        "out must not share memory with q, got tensors that overlap"),
    Rejection("prefill: lse in v", sharing("lse", "v", torch.float32), ValueError,
        "lse must not share memory with v, got tensors that overlap"),
]
# fmt: on

SHAPED = [*SHAPES, *RESULTS]
ALWAYS = [*TYPES, *DTYPES, *DEVICES, *SHAPED, *ELSEWHERE]
REJECTIONS = [*ALWAYS, *DEBUG]
