"""Tuned rows of prefill: how they are found, held against their rules, tried out and warmed up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tables
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import CARD

from mla_triton import configs, models, select, validate_prefill
from mla_triton import device as devices
from mla_triton.configs import store, validation
from mla_triton.configs.table import Point, Row, items
from mla_triton.kernels.common.tensors import PrefillTensors
from mla_triton.kernels.portable import prefill as portable
from mla_triton.kernels.sm90 import prefill as sm90
from mla_triton.ops import prefill as operation
from mla_triton.problem import PrefillProblem
from mla_triton.state import AttentionState
from mla_triton.testing import PrefillInputs, prefill_compilation, prefill_inputs
from mla_triton.testing.compilation import DTYPES, LABELS
from mla_triton.tuning import modelled, tuner, warm
from mla_triton.tuning import prefill as trials
from mla_triton.tuning.deployment import Deployment, describe
from mla_triton.tuning.memory import Memory

PLAIN = replace(prefill_compilation.problem(), batch=4, queries=4 * 1024, keys=4 * 4000)
"""Of 16 heads, 192 and 128 columns."""
WIDE = portable.Config(64, 64, 4, 2)
"""Valid, and not the heuristic's choice."""
NARROW = sm90.Config(64, 4)
"""The same of the Hopper kernel's."""
KEY = items(
    {
        "causal": True, "dtype": "bfloat16", "heads": 16, "qk": 192, "rope": 64, "s_q": 128,
        "value_dim": 128,
    }
)  # fmt: skip
PROMPTS = {"model": "deepseek-v3", "tp": 8, "max_batch": 4, "max_len": 8192, "prefill_tokens": 4096}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No rows of this machine."""
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path / "rows"))
    configs.forget()
    yield
    configs.forget()


def row(
    batch: int = 4, length: int = 4096, config: Any = WIDE, impl: str = "portable", **changes: Any
) -> Row:
    point = Point("prefill", impl, items(dict(KEY) | changes), batch, length)
    return Row(point, items(vars(config)), 10.0, 12.0, "tuned")


# -- the look-up


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"heads": 20, "kv_heads": 20}, {"heads": 32}),
        ({"kv_heads": 1}, {}),
        ({"usual_queries": 64}, {"s_q": 64}),
        ({"usual_queries": 1}, {"s_q": 64}),
        ({"k_nope": 192}, {"rope": 0}),
        ({"q_nope": 128}, {}),
        ({"causal": False}, {"causal": False}),
        ({"negative_scale": True}, {}),
        ({"dtype": torch.float16}, {"dtype": "float16"}),
    ],
    ids=str,
)
def test_the_key_says_what_decides(changes, expected):
    problem = replace(PLAIN, **changes)
    assert portable.tuning_point(problem, CARD) == (items(dict(KEY) | expected), 4, 4000)


def test_what_is_never_tuned():
    assert portable.tuning_point(replace(PLAIN, dtype=torch.float32), CARD) is None
    assert portable.tuning_point(replace(PLAIN, aligned=False), CARD) is None
    assert portable.tuning_point(PLAIN, devices.from_label("interpreter")) is None


@given(
    batch=st.integers(0, 300),
    keys=st.integers(0, 2**31 - 1),
    queries=st.integers(0, 2**20),
    heads=st.integers(1, 128),
    dtype=st.sampled_from(DTYPES),
    label=st.sampled_from(LABELS),
)
def test_every_problem_has_a_config(batch, keys, queries, heads, dtype, label):
    device = devices.from_label(label)
    problem = replace(
        PLAIN, batch=batch, keys=keys, queries=queries, heads=heads, kv_heads=heads, dtype=dtype
    )
    choice = configs.choose(portable, problem, device)
    assert portable.is_valid(choice.config, problem, device)[0]
    assert choice.source in ("heuristic", "modelled")


def test_a_row_of_the_user_is_taken():
    store.save(CARD, tables.header(CARD), [row()])
    configs.forget()
    choice = configs.choose(portable, PLAIN, CARD)
    assert (choice.config, choice.source) == (WIDE, "user")
    assert choice.reason.startswith("row (batch 4, length 4096) of ")
    near = configs.choose(portable, replace(PLAIN, batch=1, keys=9), CARD)
    assert near.config == WIDE
    assert near.reason.startswith("nearest row (batch 4, length 4096) of ")
    other = configs.choose(portable, replace(PLAIN, causal=False), CARD)
    assert other.source == "heuristic"
    assert other.reason.endswith(
        "no table has its key (implementation, causal, dtype, heads, qk, rope, s_q, value_dim)"
    )


def test_rows_are_their_implementations_own():
    """Under the same key."""
    assert sm90.tuning_point(PLAIN, CARD) == portable.tuning_point(PLAIN, CARD)
    store.save(CARD, tables.header(CARD), [row(config=NARROW, impl="sm90")])
    configs.forget()
    choice = configs.choose(sm90, PLAIN, CARD)
    assert (choice.config, choice.source) == (NARROW, "user")
    assert configs.choose(portable, PLAIN, CARD).source == "heuristic"


def test_points_of_a_card_without_wgmma_are_portables():
    other = devices.from_label("8.0")
    work, _ = tuner.list_work(device=other, **PROMPTS)
    found = [each for each in work if each.point.op == "prefill"]
    assert {each.implementation for each in found} == {portable}
    for each in found:
        tried = set(each.candidates) | {config for config, _ in each.pruned}
        assert tried == {*portable.search_space(each.problem, other), each.heuristic}


def test_calls_of_other_sizes_have_rows_of_their_own():
    """Equal problems may differ in batch and lengths, which rows do not."""
    other = portable.Config(64, 32, 8, 2)
    rows = [row(), row(batch=1), row(batch=1, length=512, config=other)]
    store.save(CARD, tables.header(CARD), rows)
    configs.forget()
    operation.forget()
    found = {}
    for batch, keys in ((4, 16000), (1, 4000), (1, 512), (1, 300), (1, 513), (3, 900)):
        problem = replace(PLAIN, batch=batch, keys=keys)
        assert problem == PLAIN
        found[batch, keys] = operation.prepare(portable, problem, CARD, None).config
    operation.forget()
    assert found == {
        (4, 16000): WIDE, (1, 4000): WIDE, (1, 512): other, (1, 300): other, (1, 513): WIDE,
        (3, 900): WIDE,
    }  # fmt: skip


def test_a_row_that_does_not_fit_is_passed_over():
    huge = portable.Config(128, 128, 8, 4)
    store.save(CARD, tables.header(CARD), [row(config=huge)])
    configs.forget()
    choice = configs.choose(portable, PLAIN, CARD)
    assert choice.source == "heuristic"
    assert "passed over {'block_m': 128, 'block_n': 128, " in choice.reason


# -- the rules of a row


def test_rows_that_break_no_rule():
    hopper = row(config=NARROW, impl="sm90")
    for given_row in (row(), row(s_q=64), row(rope=0), row(heads=1, causal=False), hopper):
        assert validation.broken_rule(given_row, CARD) is None
        problem = validation.problem_of(given_row, CARD)
        assert portable.tuning_point(problem, CARD) == (given_row.point.key, 4, 4096)


@pytest.mark.parametrize(
    ("given_row", "rule"),
    [
        (row(more=1), "key must have causal, dtype, heads, qk, rope, s_q, value_dim, got causal, "),
        (row(causal=1), "key.causal must be bool, got 1"),
        (row(heads=True), "key.heads must be int, got True"),
        (row(dtype="float32"), "key.dtype must be one of bfloat16, float16, got 'float32'"),
        (row(heads=20), "key.heads must be 32, got 20"),
        (row(heads=0), "key.heads must be 1, got 0"),
        (row(s_q=1), "key.s_q must be 64, got 1"),
        (row(s_q=100), "key.s_q must be 128, got 100"),
        (row(rope=192), "key.rope must be in [0, 191], got 192"),
        (row(rope=-1), "key.rope must be in [0, 191], got -1"),
        (row(qk=200), "key must be of a problem that portable takes: queries and keys must have "),
        (row(qk=0), "key must be of a problem that portable takes: queries and keys must have "),
        (row(value_dim=96), "key must be of a problem that portable takes: v must have 16, 32, "),
        (row(config=portable.Config(24, 64, 4, 2)), "cannot be used: block_m must be one of "),
        (row(impl="sm90"), "cannot be used: a config has the integers block_n, stages"),
        (row(config=sm90.Config(32, 2), impl="sm90"), "cannot be used: block_n must be 64 or 128"),
        (
            row(config=NARROW, impl="sm90", qk=96),
            "key must be of a problem that sm90 takes: it is written for 192 and 128 or ",
        ),
        (row(config=portable.Config(128, 128, 8, 4)), "cannot be used: needs "),
    ],
)
def test_every_rule_of_a_row(given_row, rule):
    found = validation.broken_rule(given_row, CARD)
    assert found is not None
    assert rule in found


@pytest.mark.parametrize("label", modelled.LABELS)
def test_the_shipped_rows_are_found(label):
    """By a call of a model that they were modelled for, whatever its batch."""
    device = devices.from_label(label)
    for batch in (1, 3, 500):
        problem = replace(PLAIN, batch=batch, queries=batch * 128, keys=batch * 999)
        choice = configs.choose(portable, problem, device)
        assert (choice.source, choice.config) == ("modelled", portable.heuristic(problem, device))


# -- the deployment


def test_without_prefill_there_is_none():
    deployment = describe(model="deepseek-v3")
    assert deployment.prefill_tokens == 0
    assert list(deployment.prefills(1, 1, 1)) == []
    assert {merge.value_dim for merge in deployment.merges()} == {512}


def test_merges_of_prefills_are_as_wide_as_values():
    assert {merge.value_dim for merge in describe(**PROMPTS).merges()} == {512, 128}


@pytest.mark.parametrize("changes", [{"latent": 256}, {"rope": 32, "heads": 4}])
def test_heads_of_unknown_widths_have_no_prefill(changes):
    rule = "^prefill_tokens must be left out where latent and rope are not the model's: .*, got 512"
    with pytest.raises(ValueError, match=rule):
        describe(prefill_tokens=512, **changes)


@pytest.mark.parametrize("size", [-1, True, "9"])
def test_prefill_tokens_that_are_none(size):
    with pytest.raises(ValueError, match=r"^prefill_tokens must be a whole number of at least 0"):
        describe(prefill_tokens=size)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "GLM-4.7-Flash", "MiniCPM3-4B"])
def test_a_real_call_is_one_of_the_forms(name):
    """Keys and values as views of what `W_UKV` gives, queries whole or in two parts."""
    model = models.named(name)
    deployment = describe(model=name, heads=3, dtype=["bfloat16", "float16"], prefill_tokens=1000)
    nope, rope, v = model.nope, model.rope, model.v
    problems = set()
    for dtype in (torch.bfloat16, torch.float16):
        projected = torch.empty(40, 3, nope + v, dtype=dtype)
        k, values = projected.split([nope, v], -1)
        k_rope = torch.empty(40, 64 + rope, dtype=dtype)[:, 64:]
        query = torch.empty(200, 3, nope + rope, dtype=dtype)
        for q, q_rope in ((query, None), (query[..., :nope], query[..., nope:])):
            for causal in (True, False):
                problem = validate_prefill.prefill(
                    q, q_rope, k, k_rope, values, *[torch.zeros(3, dtype=torch.int32)] * 2,
                    torch.empty(200, 3, v, dtype=dtype), torch.empty(200, 3),
                    softmax_scale=1.0, causal=causal, max_seqlen_q=None,
                )  # fmt: skip
                problems.add(problem)
    assert problems == set(deployment.prefills(2, 200, 40))


def test_forms_of_a_deployment():
    def forms(**changes: Any) -> list[tuple[int, bool]]:
        deployment: Deployment = describe(**PROMPTS | changes)
        return [(form.q_nope, form.causal) for form in deployment.prefills(1, 64, 64)]

    assert forms() == [(192, True), (128, True), (192, False), (128, False)]
    assert forms(causal=False) == [(192, False), (128, False)]
    assert forms(queries="split") == [(128, True), (128, False)]
    assert forms(queries="head_major") == [(192, True), (192, False)]


# -- the tuner's list


def test_points_of_prefill():
    """Whole prompts, or as many queries of each sequence as a step may have."""
    work, skipped = tuner.list_work(device=CARD, **PROMPTS)
    assert skipped == 0
    found = [each for each in work if each.point.op == "prefill"]
    assert len(found) + sum(each.point.op == "decode" for each in work) == len(work)
    sizes = {(e.point.batch, e.point.length, e.problem.queries, e.problem.keys) for e in found}
    assert sizes == {
        (1, 512, 512, 512), (1, 2048, 2048, 2048), (1, 8192, 4096, 8192),
        (4, 512, 2048, 2048), (4, 2048, 4096, 8192),
    }  # fmt: skip
    assert len(found) == 2 * len(sizes)
    for each in found:
        assert each.implementation is sm90
        assert each.heuristic == sm90.heuristic(each.problem, CARD)
        assert NARROW in each.candidates
        assert {config for config, _ in each.pruned}.isdisjoint(each.candidates)
        tried = set(each.candidates) | {config for config, _ in each.pruned}
        assert tried == {*sm90.search_space(each.problem, CARD), each.heuristic}
    text = tuner.describe_point(found[0].point)
    assert text == (
        "prefill sm90 192 (64 shared), 128 bfloat16 full heads 16 s_q 128 batch 1 length 8192"
    )
    assert trials.bytes_of(found[0].problem) == 8192 * (16 * (128 + 128) + 64) * 2


def test_points_that_were_tuned_are_passed_over():
    keys = [dict(KEY), dict(KEY) | {"causal": False}]
    store.save(CARD, tables.header(CARD), [row(1, 512, NARROW, "sm90", **key) for key in keys])
    configs.forget()
    one = PROMPTS | {"batches": [1], "lengths": [512]}
    work, skipped = tuner.list_work(device=CARD, **one)
    assert (len(work), skipped) == (1, 2)
    again, _ = tuner.list_work(device=CARD, again=True, **one)
    assert [w.incumbent for w in again if w.point.op == "prefill"] == [NARROW, NARROW]


def test_more_sequences_than_tokens_have_no_point():
    work, _ = tuner.list_work(device=CARD, **PROMPTS | {"batches": [5000], "lengths": [1]})
    assert {each.point.op for each in work} == {"decode"}


# -- the judge


def tensors_of(inputs: PrefillInputs, causal: bool) -> PrefillTensors:
    (q, k, v), options = inputs.call_arguments()
    del options["softmax_scale"], options["causal"]
    return PrefillTensors(q=q, k=k, v=v, softmax_scale=inputs.softmax_scale,
                          **options, **inputs.output_buffers())  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lens",
    [([150], [150]), ([150, 9, 80], [170, 9, 400]), ([3, 70], [3, 90]), ([80], [30])],
    ids=str,
)
def test_the_judge_looks_at_both_ends(causal, lens):
    """What it asks of some rows is what the whole is there."""
    from mla_triton import reference

    inputs = prefill_inputs(
        q_lens=lens[0], k_lens=lens[1], heads=6, kv_heads=3, qk=48, rope=16, v_dim=16, split_k=True,
        split_q=True, causal=causal,
    )  # fmt: skip
    tensors = tensors_of(inputs, causal)
    arguments, options = inputs.call_arguments()
    whole = reference.prefill(*arguments, **options)
    tensors.out.copy_(whole.out)
    tensors.lse.copy_(whole.lse)
    sample, rows, heads = trials.sample_of(tensors, causal)
    assert heads.tolist() == [0, 1, 4, 5]
    arguments, options = sample.call_arguments()
    part = reference.prefill(*arguments, **options)
    of_whole = AttentionState(whole.out[rows][:, heads], whole.lse[rows][:, heads])
    torch.testing.assert_close(part, of_whole)
    judge = trials.judge_of(tensors, causal)
    assert judge().ok, judge().message
    for wrong in (0, sum(lens[0]) - 1):
        kept = tensors.out[wrong].clone()
        tensors.out[wrong] += 1.0
        assert not judge().ok
        tensors.out[wrong] = kept


@pytest.mark.skipif(not devices.interpreting(), reason="CPU tensors are not taken to the kernels")
@pytest.mark.parametrize("q_nope", [48, 32])
@pytest.mark.parametrize("causal", [True, False])
def test_a_trial_calls_the_kernel_on_every_copy(monkeypatch, causal, q_nope):
    """In the interpreter: what is timed on a GPU is computed, and held against the oracle."""
    monkeypatch.setattr(trials.timing, "cold_copies", lambda size: 2)
    problem = replace(
        PLAIN, heads=4, kv_heads=2, qk_dim=48, q_nope=q_nope, k_nope=32, value_dim=16, batch=3,
        queries=3 * 20, keys=3 * 30, causal=causal,
    )  # fmt: skip
    device = devices.current()
    trial = trials.Trial(portable, problem, device, Memory(torch.device("cpu")))
    config = portable.Config(32, 32, 4, 1)
    report = trial.check(config)
    assert report.ok, report.message
    first, second = (trial.calls(config)[copy]() or trial._out.clone() for copy in (0, 1))
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert not torch.equal(first, second)

    right = portable.launch
    monkeypatch.setattr(
        portable, "launch",
        lambda *given: right(*given[:3], given[3]._replace(softmax_scale=1.0)),
    )  # fmt: skip
    assert not trial.check(config).ok


# -- warm-up


@pytest.mark.parametrize("label", ["8.0", "9.0", "gfx942"])
@given(data=st.data())
def test_every_kernel_of_every_call_is_warmed_up(label, data):
    device = devices.from_label(label)
    key = (label, configs.choose(portable, PLAIN, device).source)
    if key not in WARMED:
        WARMED[key] = set(warm.variants(describe(**PROMPTS), device))
    batch = data.draw(st.integers(1, 4))
    queries = data.draw(st.integers(1, 4096))
    keys = data.draw(st.integers(1, 8192 * batch))
    form: PrefillProblem = data.draw(
        st.sampled_from(list(describe(**PROMPTS).prefills(batch, queries, keys)))
    )
    implementation = select.choose_prefill(form, device).module
    config = configs.choose(implementation, form, device).config
    assert implementation.variant(form, config, device) in WARMED[key]


WARMED: dict[tuple[str, str], set[Any]] = {}
"""Kernels of `PROMPTS` on a card."""


def test_a_tuned_row_is_warmed_up():
    store.save(CARD, tables.header(CARD), [row(batch=2, config=NARROW, impl="sm90")])
    configs.forget()
    wanted = sm90.variant(PLAIN, NARROW, CARD)
    assert wanted in warm.variants(describe(**PROMPTS), CARD)


def test_kernels_are_told_apart():
    kernels = warm.variants(describe(**PROMPTS), CARD)
    names = [warm.name_of(kernel) for kernel in kernels]
    assert len(names) == len(set(names))
    assert sum(name.startswith("prefill_kernel(") for name in names) == 8


def test_a_model_that_no_prefill_takes():
    with pytest.raises(NotImplementedError, match=r"no implementation of prefill can run on 9\.0"):
        warm.variants(describe(model="DeepSeek-V4-Flash", prefill_tokens=512, max_batch=1), CARD)
