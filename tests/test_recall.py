"""Calls that are like an earlier one: recognised by all that the host knows, and by nothing less.

On a card that is not there: launches are remembered instead of made.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton

import mla_triton
from mla_triton import debug
from mla_triton import device as devices
from mla_triton.kernels.common.launch import Launcher
from mla_triton.ops import decode as operation
from mla_triton.ops import plan as planning
from mla_triton.testing import decode_inputs

CARD = devices.from_label("9.0")


@pytest.fixture
def launches(monkeypatch):
    """(kernel, addresses) of the launches made for CPU tensors, as if they were on a card."""
    made: list[tuple[str, tuple]] = []
    init = Launcher.__init__

    def of_the_card(self, variant, device, index):
        init(self, variant, device, 0)

    def launch(self, stream, hooks, grid, addresses, numbers):
        made.append((self.variant.function.__name__, tuple(addresses)))

    monkeypatch.setattr(devices, "of", lambda _: CARD)
    monkeypatch.setattr(Launcher, "__init__", of_the_card)
    monkeypatch.setattr(Launcher, "launch", launch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver = SimpleNamespace(get_current_stream=lambda _: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    caches = (operation.prepare, planning.launcher, planning.schedule_launcher)
    for cache in caches:
        cache.cache_clear()
    yield made
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def operator_calls(monkeypatch):
    """Counts the calls that go the ordinary way, through the checks."""
    made = []
    checks = operation.validate.decode
    monkeypatch.setattr(
        operation.validate, "decode", lambda *a, **k: made.append(1) or checks(*a, **k)
    )
    return made


def inputs(**changes):
    recipe = {"kv_lens": (100, 0, 5), "heads": 16, "dtype": torch.bfloat16} | changes
    return decode_inputs(**recipe)


def call(problem, **more):
    arguments, options = problem.call_arguments()
    return mla_triton.decode(*arguments, **options, **more)


def plan_of(problem, **options):
    return mla_triton.plan(problem.kv_lens, heads=problem.q_nope.shape[-2], **options)


def addresses(*tensors):
    return {tensor.data_ptr() for tensor in tensors if tensor is not None}


@pytest.mark.parametrize("planned", [True, False])
def test_the_next_layer_launches_the_same_with_its_own_addresses(launches, operator_calls, planned):
    first, second = inputs(seed=1), inputs(seed=2)
    plan = plan_of(first) if planned else None
    launches.clear()
    call(first, plan=plan)
    expected = [name for name, _ in launches]
    assert expected == [*["schedule_kernel"][planned:], "decode_kernel", "combine_kernel"]
    launches.clear()
    state = call(second, plan=plan)
    assert len(operator_calls) == 1
    assert [name for name, _ in launches] == expected
    given = addresses(*state, *(t for t in second.call_arguments()[0] if t is not None))
    kernels = dict(launches)
    assert given <= set(kernels["decode_kernel"])
    assert addresses(*state) <= set(kernels["combine_kernel"])
    if plan is not None:
        assert addresses(plan.schedule, plan.partial_out) <= set(kernels["decode_kernel"])
    else:
        (_, schedule) = launches[0]
        assert schedule[0] == second.kv_lens.data_ptr()
        assert schedule[2] in kernels["decode_kernel"]
        assert schedule[2] in kernels["combine_kernel"]
    assert not addresses(first.q_nope, first.cache) & set(kernels["decode_kernel"])


DIFFERENCES = {
    "heads": {"heads": 8},
    "batch": {"kv_lens": (100, 0, 5, 7)},
    "query tokens": {"s_q": 2},
    "dtype": {"dtype": torch.float16},
    "page size": {"page_size": 16},
    "page table": {"table": "csr"},
    "cache in two": {"layout": "pair"},
    "strides": {"strided": True},
    "ragged": {"q_lens": (1, 1, 1)},
}


@pytest.mark.parametrize("change", DIFFERENCES.values(), ids=DIFFERENCES)
def test_another_layout_goes_through_the_checks(launches, operator_calls, change):
    call(inputs())
    call(inputs(**change))
    assert len(operator_calls) == 2


OPTIONS = {
    "softmax_scale": {"softmax_scale": 0.25},
    "causal": {"causal": False},
    "max_kv_len": {"max_kv_len": 64},
    "impl": {"impl": "portable"},
    "allow_tf32": {"allow_tf32": True},
    "batch_invariant": {"batch_invariant": True},
}


@pytest.mark.parametrize("change", OPTIONS.values(), ids=OPTIONS)
def test_other_options_go_through_the_checks(launches, operator_calls, change):
    problem = inputs()
    arguments, options = problem.call_arguments()
    for changed in ({}, change):
        mla_triton.decode(*arguments, **(options | changed))
    assert len(operator_calls) == 2
    for changed in ({}, change):
        mla_triton.decode(*arguments, **(options | changed))
    assert len(operator_calls) == 2


def test_a_batch_invariant_call_is_made_again_by_its_own_launches(launches, operator_calls):
    """Whatever lengths are on the device by then: parts are as many as the bound needs."""
    first = inputs(kv_lens=(3000, 0, 5))
    call(first, batch_invariant=True)
    call(first)
    fixed, usual = launches[:3], launches[3:]
    assert [name for name, _ in fixed] == [name for name, _ in usual]
    launches.clear()
    second = replace(
        inputs(kv_lens=(3000, 0, 5), seed=1), kv_lens=torch.tensor([7, 3000, 64]).int()
    )
    state = call(second, batch_invariant=True)
    assert len(operator_calls) == 2
    assert [name for name, _ in launches] == [name for name, _ in fixed]
    assert addresses(*state) <= set(dict(launches)["combine_kernel"])
    assert launches[0][1][0] == second.kv_lens.data_ptr()


def test_a_plan_of_another_cut_goes_through_the_checks(launches, operator_calls):
    problem = inputs()
    for parts in (None, 7, 9):
        call(problem, plan=plan_of(problem, parts=parts))
    assert len(operator_calls) == 3


def test_a_misaligned_tensor_goes_through_the_checks(launches, operator_calls):
    problem = inputs()
    arguments, options = problem.call_arguments()
    call(problem)
    q = arguments[0]
    room = torch.empty(q.numel() + 1, dtype=q.dtype)
    moved = room[1:].view(q.shape)
    assert moved.stride() == q.contiguous().stride()
    mla_triton.decode(q.contiguous(), *arguments[1:], **options)
    before = len(operator_calls)
    mla_triton.decode(moved, *arguments[1:], **options)
    assert len(operator_calls) == before + 1


@pytest.mark.parametrize(("stored", "checked"), [("fp8_groups", 1), ("fp8", 0)])
def test_scales_of_tokens_have_to_be_aligned(launches, operator_calls, stored, checked):
    """Those of each token come in wide steps, and two for all of them do not."""
    problem = inputs(stored=stored, layout="pair")
    arguments, options = problem.call_arguments()
    cache = problem.cache
    room = torch.empty(cache.scales.numel() + 1)
    aligned = cache._replace(scales=torch.empty(cache.scales.shape))
    moved = cache._replace(scales=room[1:].view(cache.scales.shape))
    for known in (cache, aligned):
        mla_triton.decode(*arguments[:2], known, *arguments[3:], **options)
    before = len(operator_calls)
    launches.clear()
    mla_triton.decode(*arguments[:2], moved, *arguments[3:], **options)
    assert len(operator_calls) == before + checked
    assert ("quantised_kernel" in dict(launches)) is not bool(checked)


def test_one_tensor_in_two_places_is_not_remembered(launches, operator_calls):
    problem = inputs()
    lens = problem.kv_lens
    offsets = torch.arange(4, dtype=torch.int32)
    table = mla_triton.CSRPageTable(offsets, problem.page_table[:, 0].contiguous())
    q_nope, q_rope = (q.reshape(3, 16, -1) for q in (problem.q_nope, problem.q_rope))
    for _ in range(2):
        mla_triton.decode(
            q_nope, q_rope, problem.cache, table, lens, softmax_scale=0.1, cu_seqlens_q=offsets
        )
    assert len(operator_calls) == 2


def test_a_tensor_that_requires_grad_is_still_refused(launches):
    call(inputs())
    problem = inputs()
    problem.cache.requires_grad_(True)
    with pytest.raises(ValueError, match="cache must not require grad while grad is enabled"):
        call(problem)
    with torch.no_grad():
        call(problem)


def test_a_subclass_goes_through_the_checks(launches, operator_calls):
    call(inputs())
    problem = inputs()
    call(replace(problem, cache=torch.nn.Parameter(problem.cache, requires_grad=False)))
    assert len(operator_calls) == 2


def test_a_mode_and_a_profiler_see_the_operator(launches, operator_calls):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    problem = inputs()
    call(problem)
    with Watch():
        call(problem)
    assert "mla_triton.decode.default" in seen
    assert len(operator_calls) == 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(problem)
    assert "mla_triton::decode" in {event.key for event in profile.key_averages()}


def test_debugging_checks_every_call(launches, operator_calls, monkeypatch):
    problem = inputs()
    call(problem)
    monkeypatch.setattr(debug, "switched_on", lambda: True)
    monkeypatch.setattr(debug, "check_schedule", lambda *_: None)
    call(problem)
    call(problem)
    assert len(operator_calls) == 3


def test_the_latest_calls_are_remembered(launches, operator_calls):
    size = operation.RECALLED._size
    problems = [inputs(heads=1 + n) for n in range(size + 1)]
    for problem in problems:
        call(problem)
    operator_calls.clear()
    for problem in reversed(problems[1:]):
        call(problem)
    assert not operator_calls
    call(problems[0])
    assert operator_calls
