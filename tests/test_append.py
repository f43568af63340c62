"""Append: byte for byte what the reference writes, and nothing anywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_operators import fixed, launchers_made, needs_compiler, needs_kernels, no_waiting
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_triton
from mla_triton import LatentCache, reference, validate_append
from mla_triton import device as devices
from mla_triton.cache import FP8_DS_MLA
from mla_triton.kernels.common import token_config
from mla_triton.kernels.common.launch import Launcher
from mla_triton.kernels.portable import append as portable
from mla_triton.ops import append as operation
from mla_triton.testing.caches import (
    FORMS,
    PACKED,
    AppendInputs,
    CacheMemory,
    append_excess,
    append_inputs,
)
from mla_triton.testing.strategies import append_problems

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAN, INF = float("nan"), float("inf")
by_form = pytest.mark.parametrize("form", FORMS)


def append(inputs: AppendInputs, **options: Any) -> CacheMemory:
    """What the call leaves in a copy of the cache."""
    made = inputs.fresh()
    arguments, own = made.call_arguments()
    mla_triton.append(*arguments, **own, **options)
    return made.memory


# -- to the byte


@settings(max_examples=120)
@given(append_problems())
def test_appends_are_the_reference_byte_for_byte(inputs):
    """Canaries before and behind the cache and in every other slot included."""
    assert append(inputs).differs(inputs.expected()) == 0


@by_form
@pytest.mark.parametrize("tokens", [0, 1, 7, 128])
def test_numbers_of_tokens(tokens, form, device):
    inputs = append_inputs(form=form, tokens=tokens, pages=9, device=device)
    written = append(inputs)
    assert written.differs(inputs.expected()) == 0
    assert (written.differs(inputs.memory) > 0) == (len(inputs.written) > 0)


@pytest.mark.parametrize(
    "form", [form for form in FORMS if not (form in PACKED or "pair" in form or form == "groups")]
)
def test_a_cache_without_rotary_keys(form, device):
    inputs = append_inputs(form=form, rope=0, latent=128, device=device)
    assert inputs.rope is None
    assert append(inputs).differs(inputs.expected()) == 0


@by_form
def test_strange_numbers_are_stored_alike(form, device):
    """NaN, infinities and the largest numbers: bytes of e4m3 and scales are the reference's."""
    inputs = append_inputs(form=form, dtype=torch.float32, cache_dtype=torch.float32, device=device)
    largest = torch.finfo(torch.float32).max
    for n, strange in enumerate([NAN, -NAN, INF, -INF, largest, -largest, 1e-45, -0.0]):
        inputs.latent[n::8, 3::97] = strange
        inputs.rope[n::8, 5::31] = strange
    # A NaN in 16 bit has many forms.
    got, expected = append(inputs), inputs.expected()
    if form in ("groups", "fp8_ds_mla", "fp8_v4"):
        got, expected = (LatentCache(*made.cache) for made in (got, expected))
        assert torch.equal(got.ckv.view(torch.uint8), expected.ckv.view(torch.uint8))
        assert torch.equal(got.scales.view(torch.uint8), expected.scales.view(torch.uint8))
        torch.testing.assert_close(got.kpe, expected.kpe, rtol=0, atol=0, equal_nan=True)
    else:
        assert got.differs(expected) == 0


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("form", ["fp8_ds_mla", "fp8_v4", "fp8_v41"])
def test_scales_at_every_power_of_two(form, power_of_two, device):
    """448 * 2^k, where the next one begins, and its neighbours; groups without a finite number."""
    exact = 448 * 2.0 ** torch.arange(-158, 120, dtype=torch.float64)
    powers = exact.float()
    near = [torch.nextafter(powers, torch.tensor(end)) for end in (INF, 0.0)]
    largest = torch.cat([powers, *near, torch.tensor([NAN, INF])])
    latent = 512 if form == "fp8_ds_mla" else 448
    groups = latent // {"fp8_ds_mla": 128, "fp8_v4": 64, "fp8_v41": 32}[form]
    largest = torch.cat([largest, largest.new_ones(-len(largest) % groups)]).view(-1, groups)
    inputs = append_inputs(
        form=form, latent=latent, dtype=torch.float32, tokens=len(largest),
        pages=1 + len(largest) // 16, power_of_two=power_of_two, device=device,
    )  # fmt: skip
    share = torch.linspace(-1, 1, latent // groups)
    values = largest[..., None] * torch.where(share.abs() < 1, share / 2, share)
    inputs.latent.copy_(values.flatten(1))
    got, expected = (LatentCache(*made.cache) for made in (append(inputs), inputs.expected()))
    assert torch.equal(got.scales.view(torch.uint8), expected.scales.view(torch.uint8))
    assert torch.equal(got.ckv.view(torch.uint8), expected.ckv.view(torch.uint8))


def test_what_has_the_caches_dtype_is_kept_bit_for_bit(device):
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(-1, 512)
    cache = torch.zeros(1, 128, 512, dtype=torch.bfloat16, device=device)
    slots = torch.arange(128, device=device)
    mla_triton.append(cache, every.view(torch.bfloat16), None, slots)
    assert torch.equal(cache[0].view(torch.int16), every)


# -- slots


@by_form
@pytest.mark.parametrize("impl", [None, "reference"])
def test_slots_outside_the_cache_are_not_written(impl, form, device):
    inputs = append_inputs(form=form, tokens=6, slot_dtype=torch.int64, device=device)
    capacity = inputs.memory.capacity
    for wrong in (-1, -capacity, capacity, 2**31, 2**32, 2**62, -(2**63)):
        inputs.slots[:] = wrong
        assert append(inputs, impl=impl).differs(inputs.memory) == 0


@by_form
def test_of_tokens_with_one_slot_each_byte_is_one_of_theirs(form, device):
    """And the reference keeps the last whole; no other slot is touched by any of them."""
    inputs = append_inputs(form=form, tokens=30, pages=2, page_size=8, device=device)
    inputs.slots.copy_(torch.arange(30, device=device) % 5 + 3)
    alone = []
    for token in range(30):
        one = AppendInputs(
            inputs.memory, inputs.latent[token : token + 1], inputs.rope[token : token + 1],
            inputs.slots[token : token + 1], inputs.options,
        )  # fmt: skip
        alone.append(one.expected())
    got = append(inputs)
    for place, buffer in enumerate(got.buffers):
        untouched = inputs.memory.buffers[place]
        candidates = torch.stack([memory.buffers[place] for memory in alone])
        writes = (candidates != untouched).any(0)
        assert torch.equal(buffer[~writes], untouched[~writes])
        assert (candidates == buffer).any(0)[writes].all()
    last = append(inputs, impl="reference")
    for token in range(25, 30):
        slot = inputs.slots[token : token + 1].long()
        expected = alone[token].values(slot, inputs.rope.shape[1])
        assert torch.equal(last.values(slot, inputs.rope.shape[1]), expected)


# -- norm and rotation


@settings(max_examples=60)
@given(append_problems(latents=[256], ropes=[64]), st.data())
def test_fused_norm_and_rotation_are_within_their_budget(inputs, data):
    recipe = inputs.recipe | {
        "norm": data.draw(st.sampled_from([None, *DTYPES])),
        "rotation": data.draw(st.sampled_from(["interleaved", "half"])),
        "angles": data.draw(st.sampled_from(DTYPES)),
    }
    fused = append_inputs(**recipe)
    got = append(fused)
    assert append_excess(got, fused) <= 0
    # What is not written is as it was.
    rest = fused.expected()
    mine, theirs = (
        [buffer == before for buffer, before in zip(m.buffers, fused.memory.buffers, strict=True)]
        for m in (got, rest)
    )
    for one, other in zip(mine, theirs, strict=True):
        # A canary's value may be a number's, too: one byte in some hundred.
        assert (one != other).sum() <= 0.02 * one.numel() + 2


FAULTS = {
    "no weight": {"norm_weight": None},
    "another eps": {"norm_eps": 0.3},
    "no rotation": {"cos_sin": None, "positions": None},
    "the other pairs": {"rope_style": "half"},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", ["fused", "fp8_ds_mla", "fp8_v41"])
def test_the_budget_rejects(form, fault, device):
    inputs = append_inputs(form=form, norm=torch.float32, rotation="interleaved", device=device)
    assert append_excess(append(inputs), inputs) <= 0
    wrong = AppendInputs(
        inputs.memory, inputs.latent, inputs.rope, inputs.slots, inputs.options | FAULTS[fault]
    )
    assert append_excess(append(wrong), inputs) > 0


def test_a_rotation_by_nothing_changes_nothing(device):
    inputs = append_inputs(form="pair", rope=64, device=device)
    still = torch.cat([torch.ones(3, 32), torch.zeros(3, 32)], -1).to(device)
    positions = torch.zeros(20, dtype=torch.int32, device=device)
    for style in ("interleaved", "half"):
        turned = AppendInputs(
            inputs.memory, inputs.latent, inputs.rope, inputs.slots,
            {"cos_sin": still, "positions": positions, "rope_style": style},
        )  # fmt: skip
        assert append(turned).differs(append(inputs)) == 0


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_a_rotation_is_one_of_complex_numbers(style):
    """By an independent formula: each pair is a number that is multiplied by exp(i angle)."""
    angle = torch.linspace(-3, 3, 5 * 4, dtype=torch.float64).view(5, 4)
    rope = torch.randn(5, 8, dtype=torch.float64)
    pairs = rope.view(5, 4, 2) if style == "interleaved" else rope.view(5, 2, 4).mT
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)
    )
    expected = turned.flatten(1) if style == "interleaved" else turned.mT.flatten(1)
    table = torch.cat([angle.cos(), angle.sin()], -1)
    torch.testing.assert_close(reference.rotated(rope, table, style, torch.float64), expected)


def test_positions_outside_the_table_are_clamped(device):
    """Never an access outside of it; the wrong position has the nearest angle."""
    inputs = append_inputs(form="pair", rotation="half", tokens=8, device=device)
    last = len(inputs.options["cos_sin"]) - 1
    wrong = torch.tensor([-1, -(2**62), last + 1, 2**62, 0, 1, last, 2], device=device)
    clamped = inputs.options | {"positions": wrong.clamp(0, last)}
    inputs.options["positions"] = wrong
    right = AppendInputs(inputs.memory, inputs.latent, inputs.rope, inputs.slots, clamped)
    assert append(inputs).differs(append(right)) == 0


# -- where things lie


def test_tokens_may_be_columns_of_one_projection(device):
    """`kv_a` as a product leaves it: latent and rotary key side by side."""
    whole = torch.randn(20, 576 + 1536, dtype=torch.bfloat16, device=device)
    latent, rope, _ = whole.split([512, 64, 1536], -1)
    inputs = append_inputs(form="fp8_ds_mla", device=device)
    apart = AppendInputs(inputs.memory, latent.clone(), rope.clone(), inputs.slots, {})
    assert append(AppendInputs(inputs.memory, latent, rope, inputs.slots, {})).differs(
        append(apart)
    ) == 0  # fmt: skip


def test_a_cache_of_other_strides(device):
    """Pages of several layers side by side: `[pages, layers, page_size, columns]`."""
    layers = torch.zeros(5, 3, 16, 576, dtype=torch.bfloat16, device=device)
    inputs = append_inputs(form="fused", device=device)
    plain = torch.zeros(5, 16, 576, dtype=torch.bfloat16, device=device)
    mla_triton.append(layers[:, 1], inputs.latent, inputs.rope, inputs.slots)
    mla_triton.append(plain, inputs.latent, inputs.rope, inputs.slots)
    assert torch.equal(layers[:, 1], plain)
    assert not layers[:, ::2].any()


# -- what runs


def test_groups_that_no_kernel_takes_run_on_the_reference():
    """Where the interpreter is on they are refused by name; on a GPU, by itself."""
    memory = torch.zeros(2, 4, 96, dtype=torch.uint8).view(torch.float8_e4m3fn)
    cache = LatentCache(memory, None, torch.zeros(2, 4, 2))
    tokens = torch.randn(3, 96)
    slots = torch.arange(3)
    mla_triton.append(cache, tokens, None, slots)
    assert cache.scales[0, :3].all()
    if devices.interpreting():
        with pytest.raises(NotImplementedError, match="must be of a power of two of columns, got"):
            mla_triton.append(cache, tokens, None, slots, impl="portable")


def described(inputs: AppendInputs) -> Any:
    (cache, latent, rope, slots), options = inputs.call_arguments()
    whole = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
    return validate_append.append(
        whole, latent, rope, slots, options.get("norm_weight"), options.get("cos_sin"),
        options.get("positions"), "half", True,
    )  # fmt: skip


@pytest.mark.parametrize("label", ["8.0", "8.9", "9.0", "gfx942"])
@by_form
def test_there_is_a_config_for_every_form(form, label):
    device = devices.from_label(label)
    for tokens in (1, 2000):
        problem = described(append_inputs(form=form, tokens=tokens, rotation="half"))
        config = portable.heuristic(problem, device)
        assert portable.is_valid(config, problem, device)[0]
        assert portable.why_not(problem, device) is None


def test_configs_that_cannot_be_are_refused():
    device = devices.from_label("9.0")
    problem = described(append_inputs(dtype=torch.float32))
    for config, rule in (
        (portable.Config(3, 1), "rows must be a power of two in [1, 16], got 3"),
        (portable.Config(4, 8), "num_warps must be one of (1, 2, 4), got 8"),
        (portable.Config(16, 1), "needs 512 registers a thread for elements, at most 192 are"),
    ):
        assert portable.is_valid(config, problem, device) == (False, rule)
    assert token_config.words(portable.Config(1, 1), problem, device) == 32


# -- as an operator


def operands(inputs: AppendInputs) -> list[Any]:
    (cache, latent, rope, slots), options = inputs.call_arguments()
    parts = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
    extra = [options.get(name) for name in ("norm_weight", "cos_sin", "positions")]
    style, power = options.get("rope_style", "half"), options.get("power_of_two_scales", True)
    return [*parts, latent, rope, slots, *extra, 1e-5, style, power, None]


OPERATED: dict[str, dict[str, Any]] = {
    "fused": {"form": "fused"},
    "pair, all fused": {"form": "pair", "norm": torch.float32, "rotation": "half"},
    "groups": {"form": "groups"},
}


@needs_compiler
@pytest.mark.parametrize("form", OPERATED)
def test_opcheck(form, device):
    inputs = append_inputs(**OPERATED[form], page_size=4, device=device)
    given_ones = operands(inputs)
    # Canaries of e4m3 are ordinary numbers; those of float32 are tiny ones.
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    if form == "groups":
        # Of e4m3 opcheck cannot compare tensors.
        utils = ("test_faketensor",)
    torch.library.opcheck(torch.ops.mla_triton.append.default, given_ones, test_utils=utils)


@by_form
def test_the_operator_is_the_function(form, device):
    inputs = append_inputs(form=form, norm=torch.bfloat16, rotation="half", device=device)
    through = inputs.fresh()
    torch.ops.mla_triton.append(*operands(through))
    assert through.memory.differs(append(inputs)) == 0


@needs_compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, device):
    inputs = append_inputs(form="fused", norm=torch.float32, rotation="half", device=device)
    expected = append(inputs)
    made = inputs.fresh()

    def step(cache, latent, rope, slots, options):
        before = cache.float().nan_to_num().sum()
        mla_triton.append(cache, latent + 0, rope, slots, **options)
        return before, cache + 1

    arguments, options = made.call_arguments()
    _, after = fixed(step, backend)(*arguments, options)
    assert made.memory.differs(expected) == 0
    assert torch.equal((after - 1).isnan(), (expected.cache + 1 - 1).isnan())


@needs_compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_packed_pages_in_a_compiled_step(backend, device):
    """The views of packed pages are made inside."""
    inputs = append_inputs(form="fp8_ds_mla", page_size=4, device=device)
    arguments, _ = inputs.call_arguments()

    def step(pages, latent, rope, slots):
        mla_triton.append(FP8_DS_MLA.views(pages, 4), latent, rope, slots)
        return pages

    expected, got = (torch.zeros(5, 4 * 656, dtype=torch.uint8, device=device) for _ in range(2))
    step(expected, *arguments[1:])
    assert expected.any()
    fixed(step, backend)(got, *arguments[1:])
    assert torch.equal(got, expected)


@by_form
def test_tensors_without_memory(form):
    """The rules alone, on the meta device and as a compiler sees them."""
    inputs = append_inputs(form=form)
    (cache, *rest), options = inputs.call_arguments()
    parts = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
    meta = LatentCache(*(None if part is None else part.to("meta") for part in parts))
    mla_triton.append(meta, *(tensor.to("meta") for tensor in rest), **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        mla_triton.append(cache, *rest, **options)


@needs_kernels
@by_form
def test_nothing_waits_for_the_device(form, device, monkeypatch):
    inputs, launched = append_inputs(form=form, rotation="half", device=device), []
    monkeypatch.setattr(Launcher, "__call__", lambda self, *_: launched.append(self))
    with monkeypatch.context() as patch:
        no_waiting(patch)
        append(inputs)
    assert len(launched) == 1


@needs_kernels
def test_calls_that_differ_in_size_share_their_kernels(device, monkeypatch):
    made = launchers_made(monkeypatch)
    operation.prepare.cache_clear()
    for tokens, pages in ((5, 5), (6, 9), (1, 1), (300, 40)):
        append(append_inputs(form="fp8_ds_mla", tokens=tokens, pages=pages, device=device))
        if tokens == 5:
            made.clear()
    assert made == []
