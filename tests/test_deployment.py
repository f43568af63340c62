"""What a deployment is, and that its problems are those of real calls.

A warm-up compiles for the problems that `Deployment.forms` makes on no memory. Here calls are made
with real tensors, laid out as an engine lays them out, and must give the same problems.
"""

from __future__ import annotations

import json
import re
from itertools import product
from typing import Any

import pytest
import torch

from mla_triton import validate
from mla_triton.cache import FP8_DS_MLA
from mla_triton.cache.formats import PACKED_FORMATS
from mla_triton.models import MODELS
from mla_triton.problem import DecodeProblem
from mla_triton.testing import decode_inputs
from mla_triton.tuning.deployment import (
    LAYOUTS,
    QUERIES,
    TABLES,
    Deployment,
    describe,
    resized,
)

HEADS, LATENT, ROPE, NOPE = 3, 32, 16, 48
V3 = {
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
}


# -- what is typed


def test_without_a_word_it_is_deepseek_v3():
    assert describe() == describe(model="deepseek-v3")
    got = describe()
    assert (got.heads, got.latent, got.rope, got.value_dim) == (128, 512, 64, 512)
    assert (got.nope, got.max_len, got.max_batch) == (128, 160 * 1024, 128)
    assert got.dtypes == (torch.bfloat16,)
    assert (got.s_q, got.page_sizes) == ((1,), (64,))
    assert (got.layouts, got.tables, got.queries) == (("fused",), ("dense",), QUERIES)
    assert (got.ragged, got.causal) == (False, True)


@pytest.mark.parametrize("as_directory", [True, False])
def test_a_models_own_file(tmp_path, as_directory):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"text_config": V3}))
    for path in (file.parent if as_directory else file, str(file)):
        assert describe(from_model=path, tp=8) == describe(model="DeepSeek-V3", tp=8)


def test_ranks_share_the_heads_of_the_model():
    assert describe(tp=8).heads == 16
    assert describe(model="glm-4.7-flash", tp=4).heads == 5


def test_heads_that_are_given_are_those_of_a_rank():
    assert describe(heads=5, tp=8).heads == 5


def test_widths_that_are_given_replace_the_models():
    got = describe(model="MiniCPM3-4B", latent=512)
    assert (got.latent, got.rope, got.value_dim, got.heads) == (512, 32, 512, 40)
    # Of a head with other widths than the model's nothing is known.
    assert got.nope is None
    assert describe(model="MiniCPM3-4B", latent=256, rope=32).nope == MODELS["MiniCPM3-4B"].nope
    assert describe(rope=0).rope == 0


def test_the_value_of_a_model_with_the_rotary_part_inside():
    assert describe(model="DeepSeek-V4-Flash").value_dim == 512
    assert describe(model="DeepSeek-V4-Flash", latent=128).value_dim == 128
    assert describe(latent=448, value_dim=512).value_dim == 512


def test_one_value_or_several():
    got = describe(
        s_q=[2, 1, 2], dtype=["float16", torch.bfloat16], page_size=(1, 64), layout=LAYOUTS,
        table={"csr"}, queries="joined",
    )  # fmt: skip
    assert got.s_q == (2, 1)
    assert got.dtypes == (torch.float16, torch.bfloat16)
    assert got.page_sizes == (1, 64)
    assert (got.layouts, got.tables, got.queries) == (LAYOUTS, ("csr",), ("joined",))


def test_ragged_requests_have_any_average():
    assert describe(s_q=[1, 3], ragged=True).s_q == (1, 2, 3)
    assert describe(s_q=[1, 3]).s_q == (1, 3)


KNOWN_MODELS = ", ".join(MODELS)
AT_LEAST_1 = "must be a whole number of at least 1, got"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "GPT-2"}, f"model must be one of {KNOWN_MODELS}, got 'GPT-2'"),
        (
            {"model": "GLM-5", "from_model": "x"},
            "model must be left out where from_model is given, got 'GLM-5'",
        ),
        ({"model": "GLM-4.7-Flash", "tp": 8}, "tp must divide the 20 heads of the model, got 8"),
        ({"tp": 0}, f"tp {AT_LEAST_1} 0"),
        ({"tp": "8"}, f"tp {AT_LEAST_1} '8'"),
        ({"heads": 0}, f"heads {AT_LEAST_1} 0"),
        ({"heads": 1.5}, f"heads {AT_LEAST_1} 1.5"),
        ({"heads": 129}, "heads must be in [1, 128], got 129"),
        ({"latent": 0}, f"latent {AT_LEAST_1} 0"),
        ({"latent": "512"}, f"latent {AT_LEAST_1} '512'"),
        ({"rope": -1}, "rope must be a whole number of at least 0, got -1"),
        ({"value_dim": 100}, "value_dim must be latent or latent + rope, 512 or 576, got 100"),
        ({"max_batch": 0}, f"max_batch {AT_LEAST_1} 0"),
        ({"max_batch": True}, f"max_batch {AT_LEAST_1} True"),
        ({"max_len": 0}, f"max_len {AT_LEAST_1} 0"),
        ({"max_len": 4096.0}, f"max_len {AT_LEAST_1} 4096.0"),
        ({"s_q": [1, 0]}, f"s_q {AT_LEAST_1} 0"),
        ({"s_q": []}, "s_q must be one value or several, got none"),
        ({"s_q": [], "ragged": True}, "s_q must be one value or several, got none"),
        ({"page_size": ()}, "page_size must be one value or several, got none"),
        ({"page_size": 0}, f"page_size {AT_LEAST_1} 0"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (
            {"dtype": torch.float64},
            "dtype must be one of bfloat16, float16, float32, got torch.float64",
        ),
        ({"layout": "split"}, "layout must be one of fused, pair, got 'split'"),
        ({"table": ["dense", "tree"]}, "table must be one of dense, csr, got 'tree'"),
        ({"queries": ""}, "queries must be one of split, joined, head_major, got ''"),
        ({"queries": []}, "queries must be one value or several, got none"),
        (
            {"cache_format": "int8"},
            "cache_format must be one of 16bit, fp8, fp8_ds_mla, fp8_v4, fp8_v41, got 'int8'",
        ),
        (
            {"cache_format": ["fp8", "fp8_v4"]},
            "cache_format must be one for keys of 512 + 64 with values of 512, got fp8_v4",
        ),
        (
            {"cache_format": "fp8_ds_mla", "model": "DeepSeek-V4-Flash"},
            "cache_format must be one for keys of 448 + 64 with values of 512, got fp8_ds_mla",
        ),
        (
            {"cache_format": "fp8", "dtype": ["bfloat16", "float32"]},
            "cache_format must be 16bit for float32, got fp8",
        ),
        (
            {"cache_format": "fp8_ds_mla", "dtype": "float16"},
            "dtype must be bfloat16 where cache_format is fp8_ds_mla, got float16",
        ),
    ],
    ids=str,
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        describe(**arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "from_model must be a config.json, got {file}: No such file or directory"),
        ("{", "from_model must be JSON, got {file}: Expecting property name"),
        (b"\xff\xfe", "from_model must be JSON, got {file}: 'utf-8' codec"),
        ("[]", "from_model must be a model's config.json, got {file}"),
        ("{}", "from_model {file}: config must have num_attention_heads, a positive whole number"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(file=file))}"):
        describe(from_model=file)


def test_two_tensors_cannot_hold_a_value_with_the_rotary_part_inside():
    with pytest.raises(ValueError, match="cache must be one tensor where value_dim 512 has"):
        list(describe(model="DeepSeek-V4-Flash", layout="pair").forms(1))


# -- problems of a deployment, and of real calls


def small(**changes: Any) -> Deployment:
    """Every form of a call, of widths that fit in little memory."""
    values: dict[str, Any] = {
        "heads": HEADS, "latent": LATENT, "rope": ROPE, "value_dim": LATENT, "nope": NOPE,
        "max_batch": 5, "max_len": 40, "s_q": (1, 2), "dtypes": (torch.float16,),
        "page_sizes": (1, 16), "layouts": LAYOUTS, "tables": TABLES, "queries": QUERIES,
        "ragged": False, "causal": True,
    }  # fmt: skip
    return Deployment(**values | changes)


def queries_of(
    how: str, tokens: int, heads: int, rope: int, dtype: torch.dtype, sliced: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[tokens, heads, ...] queries as a model computes them."""
    if how == "joined":
        both = torch.zeros(tokens, heads, LATENT + rope, dtype=dtype)
        q_nope, q_rope = both.split([LATENT, rope], -1)
        return q_nope, q_rope if rope else None
    projected = torch.zeros(tokens, heads, NOPE + rope, dtype=dtype)
    before, q_rope = projected.split([NOPE, rope], -1)
    w_uk = torch.zeros(heads, NOPE, LATENT, dtype=dtype)
    # A batched product with heads in front, turned round: what absorbs W_UK in every engine.
    q_nope = torch.bmm(before.transpose(0, 1), w_uk).transpose(0, 1)
    if how == "split":
        q_nope = q_nope.contiguous()
    if not sliced:
        q_rope = q_rope.contiguous()
    return q_nope, q_rope if rope else None


def call(
    how: str,
    *,
    batch: int,
    s_q: int,
    layout: str,
    table: str,
    page_size: int,
    length: int,
    ragged: bool = False,
    heads: int = HEADS,
    rope: int = ROPE,
    dtype: torch.dtype = torch.float16,
    kind: torch.dtype | None = None,
    causal: bool = True,
    sliced: bool = False,
) -> DecodeProblem:
    """What a decode of real tensors is to the package; `length` is `max_kv_len`, `kind` the dtype
    of a quantised cache."""
    q_nope, q_rope = queries_of(how, batch * s_q, heads, rope, dtype, sliced)
    if not ragged:
        q_nope = q_nope.unflatten(0, (batch, s_q))
        q_rope = None if q_rope is None else q_rope.unflatten(0, (batch, s_q))
    pages = batch * -(-length // page_size)
    int32 = {"dtype": torch.int32}
    fused = layout == "fused"
    out = torch.empty_like(q_nope, memory_format=torch.contiguous_format)
    return validate.decode(
        q_nope,
        q_rope,
        torch.zeros(pages + 3, page_size, LATENT + rope if fused else LATENT, dtype=kind or dtype),
        None if fused or not rope else torch.zeros(pages + 3, page_size, rope, dtype=kind or dtype),
        None if kind is None else torch.ones(2),
        torch.zeros(batch, pages, **int32) if table == "dense" else torch.zeros(pages, **int32),
        None if table == "dense" else torch.zeros(batch + 1, **int32),
        torch.zeros(batch, **int32),
        torch.zeros(batch + 1, **int32) if ragged else None,
        out,
        torch.empty(q_nope.shape[:-1]),
        softmax_scale=1.0,
        causal=causal,
        value_dim=None,
        max_kv_len=length,
        allow_tf32=False,
    )


def sized_forms(deployment: Deployment, batch: int, length: int) -> set[DecodeProblem]:
    """The forms that warm-up has for a batch."""
    return {resized(form, batch, length) for form in deployment.forms(min(batch, 2))}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "how", ["split", "split, sliced", "joined", "head_major", "head_major, sliced"]
)
@pytest.mark.parametrize("heads", [1, HEADS])
def test_a_real_call_is_one_of_the_forms(how, ragged, heads):
    how, sliced = how.split(",")[0], "," in how
    deployment = small(ragged=ragged, heads=heads, queries=(how,))
    for batch in (1, 2, 5):
        forms = sized_forms(deployment, batch, 33)
        for layout, table, page_size, s_q in product(LAYOUTS, TABLES, (1, 16), (1, 2)):
            real = call(
                how, batch=batch, s_q=s_q, layout=layout, table=table, page_size=page_size,
                length=33, ragged=ragged, heads=heads, sliced=sliced,
            )  # fmt: skip
            assert real in forms
            assert real.max_kv_len == 33


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_call_over_e4m3_with_one_scale_is_one_of_the_forms(layout):
    deployment = small(queries=("split",), cache_formats=("16bit", "fp8"))
    for batch, table, page_size in product((1, 5), TABLES, (1, 16)):
        real = call(
            "split", batch=batch, s_q=2, layout=layout, table=table, page_size=page_size,
            length=33, kind=torch.float8_e4m3fn,
        )  # fmt: skip
        assert real in sized_forms(deployment, batch, 33)
        assert real.storage is not None


@pytest.mark.parametrize("form", PACKED_FORMATS, ids=lambda form: form.name)
def test_a_call_over_a_packed_cache_is_one_of_the_forms(form):
    inside = form is not FP8_DS_MLA
    model = "DeepSeek-V4-Flash" if inside else "DeepSeek-V3"
    deployment = describe(
        model=model, heads=HEADS, max_len=40, page_size=[1, 16], queries="split",
        cache_format=form.name, layout=LAYOUTS if not inside else "fused",
    )  # fmt: skip
    found = list(deployment.forms(2))
    assert len(found) == 2 * len(list(deployment._rope_widths("split"))), "one layout"
    for page_size in (1, 16):
        inputs = decode_inputs(
            kv_lens=[33, 9], heads=HEADS, page_size=page_size, stored=form.name,
            latent=deployment.latent, value_dim=deployment.value_dim,
        )  # fmt: skip
        state = inputs.output_buffers()
        real = validate.decode(
            inputs.q_nope, inputs.q_rope, *inputs.cache, inputs.page_table, None, inputs.kv_lens,
            None, state["out"], state["lse"], softmax_scale=1.0, causal=True,
            value_dim=deployment.value_dim, max_kv_len=None, allow_tf32=False,
        )  # fmt: skip
        assert real in found


@pytest.mark.parametrize("ragged", [False, True])
def test_every_form_is_that_of_a_real_call(ragged):
    """Nor is there one more, for each is a kernel to be compiled."""
    deployment = small(ragged=ragged)
    ways = list(product(QUERIES, LAYOUTS, TABLES, (1, 16), (1, 2)))
    for batch in (1, 2, 5):
        real = {
            call(
                how, batch=batch, s_q=s_q, layout=layout, table=table, page_size=page_size,
                length=33, ragged=ragged, sliced=sliced,
            )
            for how, layout, table, page_size, s_q in ways
            for sliced in {False, how != "joined"}
        }  # fmt: skip
        assert sized_forms(deployment, batch, 33) == real


@pytest.mark.parametrize(
    "changes",
    [
        {"rope": 0},
        {"dtypes": (torch.bfloat16,)},
        {"dtypes": (torch.float32,)},
        {"causal": False},
    ],
    ids=str,
)
def test_other_sizes_and_options(changes):
    deployment = small(**changes)
    more = {
        "rope": deployment.rope, "dtype": deployment.dtypes[0], "causal": deployment.causal,
    }  # fmt: skip
    for batch, how in product((1, 3), QUERIES):
        real = call(
            how, batch=batch, s_q=2, layout="pair", table="dense", page_size=16, length=20, **more
        )
        assert real in sized_forms(deployment, batch, 20)


def test_a_ragged_batch_may_be_of_any_average():
    """Requests of 3, 1 and 1 query tokens: 2 on average, rounded up."""
    deployment = small(ragged=True, s_q=(1, 2, 3), queries=("split",))
    real = call(
        "split", batch=5, s_q=1, layout="fused", table="csr", page_size=16, length=20, ragged=True
    )
    mean_of = {form.mean_s_q for form in deployment.forms(2)}
    assert mean_of == {1, 2, 3}
    assert real in sized_forms(deployment, 5, 20)


def test_resizing_keeps_the_queries_of_a_request():
    for form in small(ragged=True, s_q=(3,)).forms(2):
        other = resized(form, 7, 4096)
        assert (other.batch, other.queries, other.mean_s_q, other.max_kv_len) == (7, 21, 3, 4096)


def test_lengths_are_powers_of_two_up_to_the_longest():
    form = next(small(max_len=4096, tables=("dense",), page_sizes=(16,)).forms(1))
    lengths = small(max_len=4096).lengths
    assert lengths(form) == [1 << n for n in range(13)]
    assert small(max_len=4097).lengths(form)[-1] == 8192
    assert small(max_len=1).lengths(next(small(page_sizes=(1,)).forms(1))) == [1]


def test_a_call_without_a_bound_is_as_long_as_its_table():
    """The last page need not end at a power of two; a CSR table holds the pages of all requests."""
    deployment = small(max_len=64, page_sizes=(48,), max_batch=5)
    for form in deployment.forms(1):
        assert deployment.lengths(form)[-1] == (512 if form.csr else 128)
