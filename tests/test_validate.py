"""Every rule about arguments is kept: the table of `rejections`, and what is accepted.

Every refusal in the source is reached by a case, every case has its row in docs/errors.md, and
every row its case; so the three cannot drift apart.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cache_rejections
import numpy
import prefill_rejections
import pytest
import torch
from cache_rejections import CACHE
from judging_rejections import named, needs_kernels, rejected, same_as_plain
from merge_rejections import MERGE
from quantised_rejections import QUANTISED
from rejections import (
    ALWAYS,
    BATCH,
    DEBUG,
    DEBUG_INTERPRETED,
    DECODE_RESULTS,
    DECODE_SHAPES,
    HEADS,
    INTERPRETED,
    LATENT,
    REJECTIONS,
    ROPE,
    Rejection,
    arguments,
    decode,
    int32,
    make_plan,
    spaced,
)

import mla_triton
from mla_triton import debug, validate
from mla_triton import device as devices
from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.testing import decode_inputs

ROOT = Path(__file__).parent.parent


@named([*ALWAYS, *QUANTISED, *MERGE, *CACHE])
def test_rejection(case):
    rejected(case)


@needs_kernels
@named(INTERPRETED)
def test_rejection_on_the_way_to_the_kernels(case):
    rejected(case)


def test_the_reference_refuses_the_same():
    """The rules come before the choice of an implementation."""
    for case in (*DECODE_SHAPES, *DECODE_RESULTS):
        if "impl" not in case.message:
            given = inspect.getclosurevars(case.call).nonlocals["changes"]
            with pytest.raises(case.error) as error:
                decode(impl="reference", **given)()
            assert str(error.value) == case.message


def test_without_the_interpreter_the_cpu_has_no_kernels():
    script = """if True:
        import torch, mla_triton
        from mla_triton import testing
        inputs = testing.decode_inputs(kv_lens=[3], heads=2, latent=128, rope=32)
        arguments, options = inputs.call_arguments()
        assert mla_triton.decode(*arguments, **options).out.isfinite().all()
        plan = mla_triton.plan(inputs.kv_lens, heads=2, latent=128, rope=32)
        assert plan.schedule is None
        mla_triton.decode(*arguments, **options, plan=plan)
        for call in (
            lambda: mla_triton.decode(*arguments, **options, impl="portable"),
            lambda: mla_triton.plan(inputs.kv_lens, heads=2, impl="portable"),
            lambda: mla_triton.decode(
                *arguments, **options, plan=mla_triton.plan(inputs.kv_lens, heads=3)
            ),
        ):
            try:
                call()
            except (NotImplementedError, ValueError) as error:
                print(f"{type(error).__name__}: {error}")
    """
    environment = dict(os.environ, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    refused = (
        "NotImplementedError: impl 'portable' cannot run this decode: the tensors are on the CPU "
        "and Triton's interpreter is off (TRITON_INTERPRET=1)"
    )
    assert ran.stdout.splitlines() == [
        refused,
        refused,
        "ValueError: plan must be made for this call's heads 2, value_dim 128, "
        "got heads 3, value_dim 512",
    ]


# -- what is accepted


@pytest.mark.parametrize(
    "changes",
    [
        {"softmax_scale": lambda scale: numpy.float64(scale)},
        {"softmax_scale": lambda scale: torch.tensor(scale, dtype=torch.float64).item()},
        {"max_kv_len": numpy.int64(64)},
        {"max_kv_len": 40},
        {"max_kv_len": 64},
        {"value_dim": numpy.int32(LATENT)},
        {"out": None},
        {"lse": None},
        {"csr": True, "max_kv_len": 96},
        {"ragged": True, "causal": True},
        {"impl": "portable"} if devices.interpreting() else {"impl": None},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_accepted_options(changes):
    same_as_plain(**changes)


@pytest.mark.parametrize("scale", [0, 0.0, -0.1, 1e-40, 1])
def test_any_finite_scale_is_taken(scale):
    mla_triton.decode(**arguments(softmax_scale=scale))


@pytest.mark.parametrize("name", ["q_nope", "q_rope", "cache", "out"])
def test_what_requires_grad_is_accepted_without_grad(name):
    same_as_plain(**{name: lambda t: t.requires_grad_()})
    with torch.inference_mode():
        mla_triton.decode(**arguments(**{name: torch.nn.Parameter}))


def wider(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[..., :1]], -1)


def narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with one column between rows."""
    return wider(tensor)[..., :-1]


def odd_size_1_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor with a stride of 7 where there is one entry alone."""
    strides = [7 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_nope": odd_size_1_strides, "q_rope": odd_size_1_strides},
        {"out": odd_size_1_strides, "lse": odd_size_1_strides},
        {"page_table": wider},
        {"page_table": lambda t: torch.cat([t, t], 1)[:, :4]},
        {"page_table": lambda t: t.t().contiguous().t().contiguous()},
        {"q_nope": lambda q: q.transpose(0, 2).contiguous().transpose(0, 2)},
        {"cache": lambda c: torch.stack([c, c], 1)[:, 1]},
        {"cache": lambda c: c.transpose(0, 1).contiguous().transpose(0, 1)},
        {"pair": True, "cache": lambda c: LatentCache(narrowed(c.ckv), narrowed(c.kpe))},
        {"out": narrowed, "lse": spaced},
        {"out": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)},
        {"csr": True, "page_table": lambda t: t._replace(indices=wider(t.indices))},
    ],
    ids=range(12),
)  # fmt: skip
def test_accepted_layouts(changes):
    same_as_plain(**changes)


def test_one_request_may_have_any_strides():
    inputs = decode_inputs(kv_lens=[20], heads=3, latent=128, rope=32, dtype=torch.float32)
    positional, options = inputs.call_arguments()
    expected = mla_triton.decode(*positional, **options)
    odd = [odd_size_1_strides(value) if value.dim() in (1, 2, 4) else value for value in positional]
    got = mla_triton.decode(*odd, **options)
    assert torch.equal(got.out, expected.out)


def test_requests_may_share_one_row_of_the_page_table():
    given = arguments(kv_lens=int32(40, 40))
    given["page_table"] = given["page_table"][:1].expand(BATCH, -1)
    given["q_nope"] = given["q_nope"][:1].expand(BATCH, -1, -1, -1)
    given["q_rope"] = given["q_rope"][:1].expand(BATCH, -1, -1, -1)
    state = mla_triton.decode(**given)
    assert state.out.isfinite().all()
    assert torch.equal(state.out[0], state.out[1])


def test_an_empty_rope_is_no_rope():
    given = arguments(cache=lambda c: c[..., :LATENT], q_rope=None)
    expected = mla_triton.decode(**given)
    given |= {"q_rope": torch.empty(BATCH, 1, HEADS, 0, dtype=torch.float16), "out": None}
    got = mla_triton.decode(**given)
    assert torch.equal(got.out, expected.out)
    pair = LatentCache(given["cache"], given["cache"][..., :0])
    assert torch.equal(mla_triton.decode(**given | {"cache": pair}).out, expected.out)
    alone = LatentCache(given["cache"])
    assert torch.equal(mla_triton.decode(**given | {"cache": alone}).out, expected.out)


@pytest.mark.parametrize("shape", [(0, 1), (2, 0), (0, 0)])
def test_nothing_to_compute(shape):
    batch, s_q = shape
    state = mla_triton.decode(
        torch.empty(batch, s_q, HEADS, LATENT),
        torch.empty(batch, s_q, HEADS, ROPE),
        torch.empty(1, 1, LATENT + ROPE),
        torch.empty(batch, 1, dtype=torch.int32),
        torch.empty(batch, dtype=torch.int32),
        softmax_scale=0.1,
    )
    assert state.out.shape == (batch, s_q, HEADS, LATENT)
    assert state.lse.shape == (batch, s_q, HEADS)


def test_nothing_to_compute_for_ragged_queries():
    for batch in (0, 2):
        state = mla_triton.decode(
            torch.empty(0, HEADS, LATENT),
            None,
            torch.empty(1, 1, LATENT),
            CSRPageTable(torch.zeros(batch + 1, dtype=torch.int32), int32()),
            torch.zeros(batch, dtype=torch.int32),
            softmax_scale=0.1,
            cu_seqlens_q=torch.zeros(batch + 1, dtype=torch.int32),
        )
        assert state.out.shape == (0, HEADS, LATENT)


def test_an_empty_call_is_held_to_the_rules():
    with pytest.raises(ValueError, match="impl must be one of"):
        mla_triton.decode(**arguments(ragged=True, impl="none"))
    nothing = torch.empty(0, 1, HEADS, LATENT)
    with pytest.raises(ValueError, match="page_table must be"):
        mla_triton.decode(
            nothing, None, torch.empty(1, 1, LATENT), int32(), int32(), softmax_scale=0.1
        )


def test_a_plan_of_no_requests():
    made = make_plan(kv_lens=int32())
    made.update(int32())
    ragged = make_plan(kv_lens=int32(), cu_seqlens_q=int32(0), queries=0)
    ragged.update(int32(), int32(0))


def test_a_plan_takes_integers_of_any_kind():
    made = make_plan(heads=numpy.int64(HEADS), max_kv_len=numpy.int32(64))
    assert made.key == make_plan(max_kv_len=64).key
    assert all(type(number) is int for number in made.key)
    same_as_plain(plan=made)


def test_any_plan_of_the_problem_serves_the_reference():
    for made in (make_plan(), make_plan(impl="reference"), make_plan(parts=3)):
        mla_triton.decode(**arguments(plan=made, impl="reference"))


@needs_kernels
def test_a_plan_is_shared_by_calls_that_differ_in_what_it_leaves_open():
    made = make_plan(dtype=torch.bfloat16, max_kv_len=64)
    for changes in ({}, {"pair": True}, {"csr": True}, {"max_kv_len": 50}, {"softmax_scale": 2.0}):
        expected = mla_triton.decode(**arguments(**changes))
        got = mla_triton.decode(**arguments(**changes, plan=made))
        torch.testing.assert_close(got, expected)


# -- calls that are alike are checked once


def test_rules_are_gone_through_once_for_calls_that_are_alike():
    mla_triton.decode(**arguments())
    before = validate.known_problem.cache_info()
    mla_triton.decode(**arguments(softmax_scale=0.5))
    after = validate.known_problem.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@named([case for case in (*DECODE_SHAPES, *DECODE_RESULTS) if "grad" not in case.name])
def test_a_rejection_is_repeated(case):
    rejected(case)
    rejected(case)


def test_a_call_that_was_fine_may_not_be_with_grad():
    given = arguments()
    mla_triton.decode(**given)
    given["q_nope"].requires_grad_()
    with pytest.raises(ValueError, match="must not require grad"):
        mla_triton.decode(**given)
    with torch.no_grad():
        mla_triton.decode(**given)


@pytest.mark.parametrize("offset", [0, 1])
def test_alignment_is_part_of_a_call(offset):
    """A tensor that begins elsewhere in memory is another problem."""
    given = arguments(out=None, lse=None)
    memory = torch.empty(given["q_nope"].numel() + 8, dtype=torch.float16)
    base = -memory.data_ptr() % 16 // 2
    moved = memory[base + offset :][: given["q_nope"].numel()].view(given["q_nope"].shape)
    moved.copy_(given["q_nope"])
    ckv, kpe, scales = validate.unpack_cache(given["cache"])
    out = torch.empty_like(given["q_nope"])
    problem = validate.decode(
        moved, given["q_rope"], ckv, kpe, scales, given["page_table"], None, given["kv_lens"], None,
        out, torch.empty(out.shape[:-1]), softmax_scale=1.0, causal=True, value_dim=None,
        max_kv_len=None, allow_tf32=False,
    )  # fmt: skip
    assert problem.aligned is (offset == 0)


@pytest.mark.parametrize(("offset", "columns"), [(0, 4), (1, 4), (1, 1)])
def test_alignment_of_scales_is_that_of_each_token_alone(offset, columns):
    """Two scales for all tokens are no rows."""
    is_grouped = columns == 4
    inputs = decode_inputs(
        kv_lens=[5], dtype=torch.bfloat16, stored="fp8_groups" if is_grouped else "fp8"
    )
    scales = inputs.cache.scales
    memory = torch.empty(scales.numel() + 8)
    base = -memory.data_ptr() % 16 // 4
    moved = memory[base + offset :][: scales.numel()].view(scales.shape)
    cache = inputs.cache._replace(scales=moved)
    q_nope, q_rope, _, pages, kv_lens = inputs.call_arguments()[0]
    out = torch.empty_like(q_nope)
    problem = validate.decode(
        q_nope, q_rope, *cache, pages, None, kv_lens, None, out, torch.empty(out.shape[:-1]),
        softmax_scale=1.0, causal=True, value_dim=None, max_kv_len=None, allow_tf32=False,
    )  # fmt: skip
    assert problem.aligned is (offset == 0 or not is_grouped)


# -- source, table and documentation agree

EVERY = [
    *REJECTIONS,
    *QUANTISED,
    *MERGE,
    *CACHE,
    *cache_rejections.DEBUG,
    *prefill_rejections.REJECTIONS,
]
FOUND_BY_DEBUGGING = [
    *DEBUG,
    *DEBUG_INTERPRETED,
    *prefill_rejections.DEBUG,
    *cache_rejections.DEBUG,
]
SOURCES = (
    "validate.py",
    "validate_plan.py",
    "validate_merge.py",
    "validate_stored.py",
    "validate_append.py",
    "validate_gather.py",
    "validate_copy.py",
    "validate_prefill.py",
    "debug.py",
    "select.py",
    "ops/decode.py",
    "ops/plan.py",
    "testing/inputs.py",
)
PAGE = ROOT / "docs" / "errors.md"


def refusals(path: Path) -> list[range]:
    """Lines of every `fail(...)` and `raise ...(...)` in a source file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if isinstance(node, ast.Raise) or name == "fail":
            found.append(range(node.lineno, node.end_lineno + 1))
    return found


@needs_kernels
def test_every_refusal_in_the_source_has_a_case(monkeypatch):
    reached = set()
    for case in EVERY:
        debug.switched_on.cache_clear()
        monkeypatch.setenv("MLA_TRITON_DEBUG", str(int(case in FOUND_BY_DEBUGGING)))
        with pytest.raises(case.error) as error:
            case.call()
        reached |= {(str(entry.path), entry.lineno + 1) for entry in error.traceback}
    debug.switched_on.cache_clear()
    for name in SOURCES:
        path = ROOT / "mla_triton" / name
        lines = refusals(path)
        assert lines, name
        for where in lines:
            assert any((str(path), line) in reached for line in where), f"{name}:{where.start}"


def test_names_of_cases_are_unique():
    names = [case.name for case in EVERY]
    assert len(names) == len(set(names))


class Row(NamedTuple):
    templates: tuple[str, ...]
    """Messages, with … for what changes."""
    error: str
    way_out: str

    def fits(self, case: Rejection) -> bool:
        patterns = (
            ".+".join(re.escape(piece) for piece in template.split("…"))
            for template in self.templates
        )
        same = any(re.fullmatch(pattern, case.message) for pattern in patterns)
        return same and case.error.__name__ == self.error


def rows() -> list[Row]:
    """Rows of the page's tables: (arguments, rule, error, way out) or (message, error, way out)."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| `"):
            continue
        *message, error, way_out = cells
        if len(message) == 2:
            names = re.findall(r"`([^`]+)`", message[0])
            templates = tuple(f"{name} must {message[1]}, got …" for name in names)
        else:
            templates = (message[0].strip("`"),)
        found.append(Row(templates, error.strip("`"), way_out))
    return found


def test_every_case_has_its_row_in_the_documentation():
    table = rows()
    for case in EVERY:
        assert sum(row.fits(case) for row in table) == 1, case


def test_every_row_in_the_documentation_has_its_case():
    for row in rows():
        assert row.way_out
        for template in row.templates:
            one = row._replace(templates=(template,))
            assert any(one.fits(case) for case in EVERY), template
