"""Every rule about arguments of prefill is kept: the table of `prefill_rejections`, and what is
accepted. `test_validate.py` holds table, source and docs/errors.md against each other.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy
import pytest
import torch
from judging_rejections import named, rejected
from prefill_rejections import ALWAYS, DEBUG, HEADS, RESULTS, SHAPED, SHAPES, arguments, prefill
from rejections import Rejection

import mla_triton
from mla_triton import validate_prefill


def changes_of(case: Rejection) -> dict[str, Any]:
    return inspect.getclosurevars(case.call).nonlocals["changes"]


@named(ALWAYS)
def test_rejection(case):
    rejected(case)


@named([case for case in (*SHAPES, *RESULTS) if "impl" not in case.message])
def test_the_reference_refuses_the_same_and_again(case):
    """The rules come before the choice of an implementation, and are remembered."""
    for _ in range(2):
        rejected(case._replace(call=prefill(impl="reference", **changes_of(case))))


@named([case for case in SHAPED if "impl" not in case.message])
def test_meta_tensors_are_held_to_the_same_rules(case):
    given = {
        name: torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta"
        ).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments(**changes_of(case)).items()
    }
    with pytest.raises(case.error) as error:
        mla_triton.prefill(**given)
    assert str(error.value) == case.message


@named(DEBUG)
@pytest.mark.parametrize("impl", ["reference", None])
def test_debug_rejection(case, impl, debugging):
    if impl is not None and "changes" in inspect.getclosurevars(case.call).nonlocals:
        case = case._replace(call=prefill(impl=impl, **changes_of(case)))
    rejected(case)


@pytest.mark.parametrize("split", [False, True])
def test_debug_accepts_what_is_right(split, debugging):
    same_as_plain(split, max_seqlen_q=8, out=None, lse=None)


def same_as_plain(split: bool = False, **changes: Any) -> None:
    """A call that looks unusual gives what the ordinary one gives."""
    with torch.no_grad():
        expected = mla_triton.prefill(**arguments(split=split))
        got = mla_triton.prefill(**arguments(split=split, **changes))
    assert torch.equal(got.out, expected.out)
    assert torch.equal(got.lse, expected.lse)


def odd_size_1_strides(tensor: torch.Tensor) -> torch.Tensor:
    strides = [7 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


@pytest.mark.parametrize(
    "changes",
    [
        {"softmax_scale": lambda scale: numpy.float64(scale)},
        {"max_seqlen_q": numpy.int64(8)},
        {"max_seqlen_q": 10**6},
        {"out": None, "lse": None},
        {"lse": lambda t: t.t().contiguous().t()},
        {"out": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)},
        {"q": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)},
        {"split": True, "k_rope": lambda t: torch.cat([t, t[:, :1]], 1)[:, :16]},
    ],
    ids=range(8),
)
def test_accepted(changes):
    same_as_plain(**changes)


@pytest.mark.parametrize("name", ["q", "k", "v", "q_rope", "k_rope", "out"])
def test_what_requires_grad_is_accepted_without_grad(name):
    same_as_plain(split=True, **{name: lambda t: t.requires_grad_()})


def test_one_row_may_have_any_strides():
    given = arguments(q=lambda t: t[:1, :1], k=lambda t: t[:1, :1], v=lambda t: t[:1, :1])
    given |= {
        name: torch.tensor([0, 1], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")
    }
    given |= {"out": None, "lse": None}
    expected = mla_triton.prefill(**given)
    odd = {name: odd_size_1_strides(given[name]) for name in ("q", "k", "v")}
    assert torch.equal(mla_triton.prefill(**given | odd).out, expected.out)


def test_rules_are_gone_through_once_for_calls_that_are_alike():
    mla_triton.prefill(**arguments())
    before = validate_prefill.known_problem.cache_info()
    mla_triton.prefill(**arguments(softmax_scale=0.5))
    after = validate_prefill.known_problem.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.mark.parametrize("name", ["q", "k", "v", "q_rope", "k_rope", "out"])
def test_alignment_is_part_of_a_problem(name):
    """Each tensor whose rows are read or written in wide steps decides."""
    given = arguments(split=True)

    def problem() -> Any:
        tensors = [given[n] for n in (
            "q", "q_rope", "k", "k_rope", "v", "cu_seqlens_q", "cu_seqlens_k", "out", "lse"
        )]  # fmt: skip
        return validate_prefill.prefill(*tensors, softmax_scale=1.0, causal=True, max_seqlen_q=None)

    assert problem().aligned
    wide = torch.zeros(*given[name].shape[:-1], given[name].shape[-1] + 16, dtype=torch.float16)
    given[name] = wide[..., 1:-15]
    assert not problem().aligned
    given[name] = wide[..., 8:-8]
    assert problem().aligned
    assert given["q"].shape[1] == HEADS
