"""The debug switch: what is verified with it, by value, and that nothing is without it."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import cache_rejections
import pytest
import torch
from judging_rejections import named, needs_kernels, rejected, same_as_plain
from rejections import (
    BATCH,
    DEBUG,
    DEBUG_INTERPRETED,
    HEADS,
    LATENT,
    arguments,
    decode,
    make_plan,
)

import mla_triton
from mla_triton import debug

ROOT = Path(__file__).parent.parent


@named(DEBUG)
@pytest.mark.parametrize("impl", ["reference", None])
def test_debug_rejection(case, impl, debugging):
    if impl is None:
        rejected(case)
        return
    variables = inspect.getclosurevars(case.call).nonlocals
    if "changes" in variables:
        rejected(case._replace(call=decode(impl=impl, **variables["changes"])))


@needs_kernels
@named(cache_rejections.DEBUG)
def test_debug_rejection_of_the_cache(case, debugging):
    rejected(case)


def test_debugging_lets_the_cache_be_used(debugging):
    """With -1 where nothing is meant, several times; and a page copied to itself."""
    ints = cache_rejections.ints
    cache_rejections.append(slot_mapping=ints(-1, 11, 0, -1, 3))()
    cache_rejections.turned(slot_mapping=ints(4, -1, 0, 2, 3), positions=ints(8, 99, 0, 8, 0))()
    cache_rejections.gather(starts=ints(7, 9))()
    cache_rejections.gather(
        cu_seqlens_k=ints(0, 0, 4), page_table=ints(9, 9, 9, 9, 2, 0).view(2, 3), starts=ints(0, 5)
    )()
    cache_rejections.copy(source_pages=ints(-1, 0), target_pages=ints(2, 2))()
    cache_rejections.copied_within(ints(1, 0), ints(1, 2))()


@named(DEBUG_INTERPRETED)
def test_debug_rejection_on_the_way_to_the_kernels(case, debugging):
    rejected(case)


@pytest.mark.parametrize(
    "changes",
    [{}, {"ragged": True}, {"csr": True}, {"pair": True}, {"out": None, "lse": None}],
    ids=str,
)
def test_debug_accepts_what_is_right(changes, debugging):
    same_as_plain(**changes)
    if "ragged" not in changes:
        mla_triton.decode(**arguments(**changes, plan=make_plan()))


def test_debug_tells_interleaved_memory_from_shared(debugging):
    """Queries and results as columns of one buffer lie apart, though their ranges do not."""
    given = arguments()
    buffer = torch.zeros(BATCH, 1, HEADS, 2 * LATENT, dtype=torch.float16)
    buffer[..., :LATENT] = given["q_nope"]
    given |= {"q_nope": buffer[..., :LATENT], "out": buffer[..., LATENT:]}
    mla_triton.decode(**given)
    given["out"] = buffer[..., LATENT - 1 : -1]
    with pytest.raises(ValueError, match="out must not share memory with q_nope"):
        mla_triton.decode(**given)


@needs_kernels
def test_without_the_switch_values_are_left_alone(monkeypatch):
    monkeypatch.delenv("MLA_TRITON_DEBUG", raising=False)
    debug.switched_on.cache_clear()
    assert not debug.switched_on()
    for case in (*DEBUG, *cache_rejections.DEBUG):
        case.call()
    debug.switched_on.cache_clear()


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes"])
def test_the_switch_is_read_once(monkeypatch, value):
    monkeypatch.setenv("MLA_TRITON_DEBUG", value)
    debug.switched_on.cache_clear()
    try:
        assert debug.wanted(torch.empty(1))
        monkeypatch.setenv("MLA_TRITON_DEBUG", "0")
        assert debug.wanted(torch.empty(1))
        debug.switched_on.cache_clear()
        assert not debug.wanted(torch.empty(1))
    finally:
        monkeypatch.undo()
        debug.switched_on.cache_clear()


def test_nothing_is_verified_while_a_graph_is_captured(debugging, monkeypatch):
    class OnGPU:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not debug.wanted(OnGPU())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert debug.wanted(OnGPU())


def test_an_ordinary_call_does_not_load_what_tests_need():
    script = """if True:
        import sys, torch, mla_triton
        def int32(*values): return torch.tensor(values, dtype=torch.int32)
        q, cache = torch.zeros(1, 1, 2, 128), torch.zeros(2, 16, 128)
        mla_triton.decode(q, None, cache, int32(0)[None], int32(1), softmax_scale=1.0)
        print([name for name in sys.modules if name.startswith("mla_triton.testing")])
    """
    environment = dict(os.environ, MLA_TRITON_DEBUG="0")
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "[]", ran.stderr
