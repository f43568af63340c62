"""Calls of decode over a quantised cache that break a rule, each with what it has to be told."""

import torch

import mla_triton
from mla_triton import testing
from mla_triton.cache import LatentCache
from tests.rejections import Rejection

LATENT, ROPE = 128, 32


def quantised(stored, dtype=torch.bfloat16, layout="pair", **changes):
    """A decode over a cache that keeps every rule, but for what the changes make of its parts."""

    def call():
        inputs = testing.decode_inputs(
            kv_lens=[40, 17], heads=2, latent=LATENT, rope=ROPE, page_size=16, dtype=dtype,
            stored=stored, layout=layout,
        )  # fmt: skip
        (q_nope, q_rope, cache, *rest), options = inputs.call_arguments()
        parts = {
            name: change(getattr(cache, name))
            for name, change in changes.items()
            if name in LatentCache._fields
        }
        cache = cache._replace(**parts)
        if "q_nope" in changes:
            q_nope, q_rope = changes["q_nope"](q_nope), changes["q_nope"](q_rope)
        mla_triton.decode(q_nope, q_rope, cache, *rest, **options)

    return call


def double(tensor):
    return tensor.double()


def spread(tensor):
    """The same numbers, each with a place between it and the next."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


QUANTISED = [
    Rejection("scales are no tensor", quantised("fp8", scales=lambda s: 1.0), TypeError,
        "cache.scales must be a torch.Tensor, got float"),
    Rejection("e4m3 without scales", quantised("fp8", layout="fused", scales=lambda s: None),
        ValueError, "cache.scales must be given if, and only if, cache.ckv is float8_e4m3fn, "
        "got no tensor beside torch.float8_e4m3fn"),
    Rejection("a pair of e4m3 without scales", quantised("fp8", scales=lambda s: None),
        ValueError, "cache.scales must be given if, and only if, cache.ckv is float8_e4m3fn, "
        "got no tensor beside torch.float8_e4m3fn"),
    Rejection("scales beside 16-bit latents", quantised("fp8", ckv=lambda c: c.bfloat16()),
        ValueError, "cache.scales must be given if, and only if, cache.ckv is float8_e4m3fn, "
        "got a tensor beside torch.bfloat16"),
    Rejection("bytes that are not said to be e4m3",
        quantised("fp8", ckv=lambda c: c.view(torch.uint8)), TypeError,
        "cache.ckv must be float16, bfloat16, float32 or float8_e4m3fn, got torch.uint8"),
    Rejection("float32 queries of a quantised cache", quantised("fp8", q_nope=lambda q: q.float()),
        TypeError,
        "q_nope must be float16 or bfloat16 where the cache is quantised, got torch.float32"),
    Rejection("scales in float64", quantised("fp8", scales=double), TypeError,
        "cache.scales must be float32, or uint8 (e8m0) for groups, got torch.float64"),
    Rejection("three scales", quantised("fp8", scales=lambda s: torch.ones(3)), ValueError,
        "cache.scales must be float32 [2], one for latents and one for rotary keys, or of groups, "
        "got torch.float32 of shape (3,)"),
    Rejection("two scales apart", quantised("fp8", scales=lambda s: s.repeat_interleave(2)[::2]),
        ValueError,
        "cache.scales must have a contiguous last dimension (stride 1), got strides (2,)"),
    Rejection("16-bit rotary keys with one scale", quantised("fp8", kpe=lambda k: k.bfloat16()),
        TypeError,
        "cache.kpe must be float8_e4m3fn, as cache.ckv, beside one scale for each, "
        "got torch.bfloat16"),
    Rejection("scales of tokens in float64", quantised("fp8_groups", scales=double), TypeError,
        "cache.scales must be float32, or uint8 (e8m0) for groups, got torch.float64"),
    Rejection("groups that do not divide a latent",
        quantised("fp8_groups", scales=lambda s: torch.cat([s, s, s], -1)), ValueError,
        "cache.scales must be [2], or [9, 16, groups] with a divisor of 128 groups, "
        "got shape (9, 16, 3)"),
    Rejection("scales of fewer pages", quantised("fp8_groups", scales=lambda s: s[:4]), ValueError,
        "cache.scales must be [2], or [9, 16, groups] with a divisor of 128 groups, "
        "got shape (4, 16, 1)"),
    Rejection("scales that are not side by side",
        quantised("fp8_groups", scales=lambda s: spread(torch.cat([s, s], -1))), ValueError,
        "cache.scales must have a contiguous last dimension (stride 1), got strides (64, 4, 2)"),
    Rejection("rotary keys behind latents with scales of groups",
        quantised("fp8", layout="fused", scales=lambda s: torch.ones(9, 16, 1)), ValueError,
        "cache must have rotary keys of their own, cache.kpe, where each token has scales, got "
        "None"),
    Rejection("rotary keys of another dtype than the queries",
        quantised("fp8_groups", kpe=lambda k: k.half()), TypeError,
        "cache.kpe must have q_nope's dtype torch.bfloat16, got torch.float16"),
]  # fmt: skip
