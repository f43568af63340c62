"""The reference means what it says: ordinary MLA, torch's own attention, and nothing read that a
kernel must not read.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_triton import reference
from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.state import AttentionState
from mla_triton.testing import DecodeInputs, decode_inputs

UNIT = torch.finfo(torch.float64).eps / 2
KV_LENS = [0, 1, 2, 16, 37, 64]


def decode(inputs: DecodeInputs, **changes: Any) -> AttentionState:
    arguments, options = inputs.call_arguments()
    return reference.decode(*arguments, **options, **changes)


def small(**changes: Any) -> DecodeInputs:
    options = {"kv_lens": KV_LENS, "heads": 3, "latent": 32, "rope": 8, "page_size": 16}
    return decode_inputs(**{**options, "dtype": torch.float32, **changes})


def worst_case(operations: int) -> float:
    """Higham's gamma: the relative error that so many roundings one after another cannot exceed."""
    return operations * UNIT / (1 - operations * UNIT)


# Against ordinary attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("s_q", "kv_len"), [(1, 1), (1, 50), (4, 50), (5, 3)])
def test_absorbed_equals_unabsorbed(s_q: int, kv_len: int, causal: bool) -> None:
    heads, nope, latent, rope, v = 4, 24, 32, 8, 20
    inputs = small(kv_lens=[kv_len], s_q=s_q, heads=heads, latent=latent, rope=rope, causal=causal)
    generator = torch.Generator().manual_seed(1)
    normal = {"generator": generator, "dtype": torch.float64}
    w_uk = torch.randn(heads, nope, latent, **normal) * nope**-0.5
    w_uv = torch.randn(heads, v, latent, **normal) * latent**-0.5
    q_nope = torch.randn(s_q, heads, nope, **normal)
    assert inputs.q_rope is not None
    keys = reference.gather_keys(inputs.cache, inputs.page_table, 0, kv_len).double()
    c_kv, k_pe = keys[:, :latent], keys[:, latent:]
    q_rope = inputs.q_rope[0].double()

    ordinary = reference.attention(
        q_nope, q_rope, c_kv, k_pe, w_uk, w_uv, softmax_scale=0.2, causal=causal
    )
    absorbed = decode(
        replace(
            inputs,
            q_nope=reference.absorb_queries(q_nope, w_uk)[None],
            q_rope=q_rope[None],
            softmax_scale=0.2,
        )
    )
    out = reference.project_values(absorbed.out[0], w_uv)

    # Both sums of a logit have these products in them, each rounded no more often than this.
    terms = torch.einsum("qhd,hdl,nl->qhn", q_nope.abs(), w_uk.abs(), c_kv.abs())
    terms += torch.einsum("qhd,nd->qhn", q_rope.abs(), k_pe.abs())
    logit_error = 2 * worst_case(nope + latent + rope + 1) * 0.2 * terms.amax(-1)
    softmax_error = logit_error + 2 * worst_case(kv_len + 8) * (1 + ordinary.lse.abs())
    seen = ordinary.lse.isfinite()
    assert torch.equal(seen, absorbed.lse[0].isfinite())
    assert ((ordinary.lse - absorbed.lse[0]).abs() <= softmax_error)[seen].all()
    largest = torch.einsum("hvl,nl->hvn", w_uv.abs(), c_kv.abs()).amax(-1)
    out_error = 2 * (softmax_error + worst_case(kv_len + latent))[..., None] * largest
    assert ((ordinary.out - out).abs() <= out_error)[seen].all()
    assert (out[~seen] == 0).all()
    assert (ordinary.out[~seen] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s_q", [1, 3])
@pytest.mark.parametrize("value_dim", [None, 40])
def test_equals_scaled_dot_product_attention(s_q: int, causal: bool, value_dim: int | None) -> None:
    inputs = small(kv_lens=[37], s_q=s_q, causal=causal, value_dim=value_dim)
    assert inputs.q_rope is not None
    query = torch.cat([inputs.q_nope, inputs.q_rope], -1).double().transpose(1, 2)
    keys = reference.gather_keys(inputs.cache, inputs.page_table, 0, 37).double()
    mask = torch.ones(s_q, 37, dtype=torch.bool).tril(37 - s_q) if causal else None
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        keys.expand(1, 3, -1, -1),
        keys[:, : value_dim or 32].expand(1, 3, -1, -1),
        attn_mask=mask,
        scale=inputs.softmax_scale,
    )
    logit_error = worst_case(41) * inputs.softmax_scale * (query.abs() @ keys.abs().T).amax(-1)
    bound = 2 * 2 * (logit_error + worst_case(2 * 37 + 8))[..., None] * keys.abs().amax()
    got = decode(inputs).out.transpose(1, 2)
    assert ((got - expected).abs() <= bound).all()
    # The bound is one that the mask of a neighbour does not keep.
    if causal:
        shifted = decode(replace(inputs, kv_lens=inputs.kv_lens - 1)).out.transpose(1, 2)
        assert ((shifted - expected).abs() > bound).any()


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float64])
def test_computes_and_returns_in_the_chosen_precision(compute_dtype: torch.dtype) -> None:
    inputs = small()
    state = decode(inputs, compute_dtype=compute_dtype)
    assert state.out.dtype == state.lse.dtype == compute_dtype
    exact = decode(inputs)
    assert torch.equal(state.out, exact.out.to(compute_dtype)) == (compute_dtype == torch.float64)


# Rows and lengths


def test_rows_that_see_nothing_are_empty() -> None:
    inputs = small(kv_lens=[0, 2, 5], s_q=4)
    state = decode(inputs)
    # Query i of 4 sees kv_len - 3 + i keys.
    visible = torch.tensor([[max(0, n - 3 + i) for i in range(4)] for n in (0, 2, 5)])
    assert torch.equal(state.lse[..., 0] == float("-inf"), visible == 0)
    assert (state.out[visible == 0] == 0).all()
    assert (state.out[visible > 0] != 0).all()


def test_a_single_key_is_returned_as_it_is() -> None:
    inputs = small(kv_lens=[1])
    key = reference.gather_keys(inputs.cache, inputs.page_table, 0, 1)
    assert torch.equal(decode(inputs).out[0, 0], key[:, :32].double().expand(3, -1))


@pytest.mark.parametrize("table", ["dense", "csr"])
@pytest.mark.parametrize("max_kv_len", [None, 20])
def test_lengths_are_clamped_to_what_can_be_read(table: str, max_kv_len: int | None) -> None:
    inputs = small(kv_lens=[32, 32], table=table)
    if table == "dense":
        inputs = replace(inputs, page_table=inputs.page_table[:, :2])  # type: ignore[index]
    capacity = 32 if max_kv_len is None else max_kv_len
    clamped = replace(inputs, kv_lens=torch.tensor([-5, 1000]), max_kv_len=max_kv_len)
    plain = replace(inputs, kv_lens=torch.tensor([0, capacity]))
    for one, other in zip(decode(clamped), decode(plain), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", ["fused", "pair"])
def test_ragged_equals_requests_one_by_one(layout: str) -> None:
    q_lens = [2, 0, 1, 5, 3, 1]
    inputs = small(q_lens=q_lens, layout=layout)
    state, start = decode(inputs), 0
    for request, count in enumerate(q_lens):
        rows = slice(start, start + count)
        start += count
        one = replace(
            inputs,
            q_nope=inputs.q_nope[None, rows],
            q_rope=inputs.q_rope[None, rows],  # type: ignore[index]
            page_table=inputs.page_table[request : request + 1],  # type: ignore[index]
            kv_lens=inputs.kv_lens[request : request + 1],
            cu_seqlens_q=None,
        )
        for whole, alone in zip(state, decode(one), strict=True):
            assert torch.equal(whole[rows], alone[0])
    assert start == len(inputs.q_nope)


# What is read


@pytest.mark.parametrize("logits", ["normal", "large", "equal_keys", "dominant_key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_poison_is_never_read(dtype: torch.dtype, logits: str) -> None:
    inputs = small(dtype=dtype, s_q=2, logits=logits, strided=True)
    arguments, options = inputs.call_arguments()
    for state in (decode(inputs), reference.decode_same_precision(*arguments, **options)):
        assert state.out.isfinite().all()
        assert not state.lse.isnan().any()


def test_nan_in_a_visible_key_is_seen() -> None:
    inputs = small(kv_lens=[20, 20])
    assert isinstance(inputs.cache, torch.Tensor)
    page = int(inputs.page_table[1, 1])  # type: ignore[index, arg-type]
    inputs.cache[page, 3] = float("nan")
    state = decode(inputs)
    assert state.out[0].isfinite().all()
    assert state.out[1].isnan().all()
    assert state.lse[1].isnan().all()


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("table", ["dense", "csr"])
@pytest.mark.parametrize("layout", ["fused", "pair"])
@pytest.mark.parametrize("strided", [False, True])
def test_paging_does_not_matter(page_size: int, table: str, layout: str, strided: bool) -> None:
    plain = small()
    paged = small(page_size=page_size, table=table, layout=layout, strided=strided)
    for request, length in enumerate(KV_LENS):
        keys = reference.gather_keys(paged.cache, paged.page_table, request, length)
        assert keys.shape == (length, 40)
        expected = reference.gather_keys(plain.cache, plain.page_table, request, length)
        assert torch.equal(keys, expected)
    for one, other in zip(decode(paged), decode(plain), strict=True):
        assert torch.equal(one, other)


def test_gather_follows_the_table() -> None:
    cache = torch.arange(4 * 2 * 3).view(4, 2, 3)
    tables = [
        torch.tensor([[3, 1], [0, 2**31 - 1]], dtype=torch.int32),
        CSRPageTable(torch.tensor([0, 2, 3]), torch.tensor([3, 1, 0, 2**31 - 1])),
    ]
    for table in tables:
        keys = reference.gather_keys(cache, table, 0, 3)
        assert torch.equal(keys, torch.stack([cache[3, 0], cache[3, 1], cache[1, 0]]))
        assert torch.equal(reference.gather_keys(cache, table, 1, 1), cache[0, :1])
        assert reference.gather_keys(cache, table, 1, 0).shape == (0, 3)


def test_a_pair_without_rope_is_its_latents() -> None:
    fused = small(rope=0)
    pair = small(rope=0, layout="pair")
    assert pair.q_rope is None
    assert isinstance(pair.cache, LatentCache)
    assert pair.cache.kpe is None
    for one, other in zip(decode(pair), decode(fused), strict=True):
        assert torch.equal(one, other)


# The same-precision run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_precision_rounds_in_its_own_dtype(dtype: torch.dtype) -> None:
    inputs = small(dtype=dtype)
    arguments, options = inputs.call_arguments()
    state, exact = reference.decode_same_precision(*arguments, **options), decode(inputs)
    assert state.out.dtype == dtype
    assert state.lse.dtype == torch.float32
    # It rounds: the probabilities too, or the result would be the oracle's to within one rounding.
    assert not torch.equal(state.out, exact.out.to(dtype))
    # Once each the probabilities and the result, in dtype; the rest, in float32, is in the logits
    # (40 products, and the scale) and the sums (64 keys).
    largest = torch.nan_to_num(inputs.cache).abs().amax().double()  # type: ignore[arg-type]
    query = torch.cat([inputs.q_nope, inputs.q_rope], -1).double()  # type: ignore[list-item]
    logit = inputs.softmax_scale * query.abs().sum(-1).amax() * largest
    float32 = torch.finfo(torch.float32).eps / 2
    bound = (torch.finfo(dtype).eps + float32 * (2 * 41 * logit + 2 * 64 + 8)) * largest
    assert (state.out - exact.out).abs().amax() <= bound


def test_tf32_drops_the_bits_that_tensor_cores_do_not_read() -> None:
    inputs = small()
    arguments, options = inputs.call_arguments()

    def short(tensor: torch.Tensor) -> torch.Tensor:
        """Its 10 leading bits of mantissa."""
        scale = 2.0 ** (tensor.frexp().exponent - 11)
        return (tensor / scale).trunc() * scale

    q_nope, q_rope, cache, *rest = arguments
    truncated = (short(q_nope), short(q_rope), short(cache), *rest)
    got = reference.decode_same_precision(*arguments, **options, allow_tf32=True)
    again = reference.decode_same_precision(*truncated, **options, allow_tf32=True)
    assert torch.equal(got.out, again.out)
    assert torch.equal(got.lse, again.lse)
    # The probabilities lose theirs as well, which leaves the lse alone.
    operands_alone = reference.decode_same_precision(*truncated, **options)
    assert torch.equal(got.lse, operands_alone.lse)
    assert not torch.equal(got.out, operands_alone.out)
    plain = reference.decode_same_precision(*arguments, **options)
    assert not torch.equal(got.lse, plain.lse)


def choose_for_all(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)


def choose_by_backend(precision: str) -> None:
    coarse = precision != "highest"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if coarse else "ieee"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if coarse else "ieee"


# Newer versions of torch have a choice for each backend; 2.6 has one for all.
PER_BACKEND = hasattr(torch.backends.mkldnn, "matmul")


def chosen_precisions() -> list[str]:
    if not PER_BACKEND:
        return [torch.get_float32_matmul_precision()]
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return [backend.fp32_precision for backend in backends]


@pytest.mark.parametrize("choose", [choose_for_all, *[choose_by_backend] * PER_BACKEND])
def test_matmul_precision_of_the_program_is_kept_and_not_used(
    choose: Callable[[str], None],
) -> None:
    inputs = small()
    arguments, options = inputs.call_arguments()
    expected = reference.decode_same_precision(*arguments, **options)
    try:
        choose("medium")
        chosen = chosen_precisions()
        assert chosen == (["tf32", "bf16"] if PER_BACKEND else ["medium"])
        got = reference.decode_same_precision(*arguments, **options)
        assert chosen_precisions() == chosen
    finally:
        choose("highest")
    assert torch.equal(got.out, expected.out)


def test_the_reference_stands_alone() -> None:
    imported = set()
    for path in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
    ours = {name for name in imported if name.startswith("mla_triton")}
    assert "torch" in imported
    assert not [name for name in imported if name.split(".")[0] == "triton"]
    allowed = ("mla_triton.reference", "mla_triton.cache", "mla_triton.state")
    assert not [name for name in ours if not name.startswith(allowed)]
