"""The operator of prefill as PyTorch sees it: opcheck, compilers, fake tensors, and no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prefill_rejections import SHAPED, arguments
from test_operators import fixed, launchers_made, needs_compiler, needs_kernels, no_waiting
from test_validate_prefill import changes_of
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_triton
from mla_triton.kernels.common.launch import Launcher
from mla_triton.ops import prefill as operation
from mla_triton.testing.prefill_problems import PrefillInputs, prefill_inputs

LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "shared rope": {"split_k": True},
    "two parts": {"split_k": True, "split_q": True},
    "grouped": {"kv_heads": 2},
    "strided": {"strided": 1},
    "full": {"causal": False},
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def make(device: torch.device | str, **options: Any) -> PrefillInputs:
    given = {"q_lens": [4, 0, 7], "k_lens": [9, 3, 7], "dtype": torch.float32}
    sizes = {"heads": 4, "qk": 48, "rope": 16, "v_dim": 32}
    return prefill_inputs(**(given | sizes | options), device=device)


def call(inputs: PrefillInputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A call with something around it, for a compiler to get hold of."""
    positional, own = inputs.call_arguments()
    state = mla_triton.prefill(*positional, **own, **options)
    return state.out * 2, state.lse + 1


@needs_compiler
@by_layout
def test_opcheck(layout, device):
    i = make(device, **LAYOUTS[layout])
    out = {name: torch.zeros_like(t) for name, t in i.output_buffers().items()}
    torch.library.opcheck(
        torch.ops.mla_triton.prefill.default,
        (
            i.q, i.q_rope, i.k, i.k_rope, i.v, i.cu_seqlens_q, i.cu_seqlens_k, out["out"],
            out["lse"], i.softmax_scale, i.causal, None, None,
        ),
    )  # fmt: skip


def test_the_operator_is_defined_for_both_devices():
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("mla_triton::prefill", key)


@needs_compiler
@by_layout
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_equals_eager(backend, layout, device):
    inputs = make(device, **LAYOUTS[layout])
    torch.testing.assert_close(fixed(call, backend)(inputs), call(inputs), rtol=0, atol=0)


@needs_compiler
def test_compiled_by_inductor(device):
    inputs = make(device, split_k=True)
    torch.testing.assert_close(fixed(call, "inductor")(inputs), call(inputs), rtol=0, atol=0)


@needs_compiler
def test_one_compilation_serves_every_batch(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = fixed(call, counter, dynamic=True)
    # Sizes that happen to be equal in the first call are not taken to be so in all.
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for lens in ([4, 5], [3, 2, 9], [70], [1, 0, 2, 40]):
            inputs = make(device, q_lens=lens, k_lens=[n + 3 for n in lens])
            torch.testing.assert_close(compiled(inputs), call(inputs), rtol=0, atol=0)
            if lens == [4, 5]:
                compilations = counter.frame_count
    assert counter.frame_count == compilations


@needs_compiler
def test_compiled_writes_to_the_buffers_it_is_given(device):
    inputs = make(device, strided=1)
    buffers = inputs.output_buffers()
    positional, options = inputs.call_arguments()

    def step(positional, options, out, lse):
        before = out.isnan().sum()
        state = mla_triton.prefill(*positional, **options, out=out, lse=lse)
        return before, state.out + 1

    before, got = fixed(step, "aot_eager")(positional, options, **buffers)
    expected = mla_triton.prefill(*positional, **options)
    assert before == buffers["out"].numel(), "a read may not move behind the call"
    assert torch.equal(buffers["out"], expected.out)
    assert torch.equal(buffers["lse"], expected.lse)
    assert torch.equal(got, expected.out + 1)


@needs_compiler
@pytest.mark.parametrize("name", ["q", "k_rope"])
def test_a_compiled_call_refuses_what_requires_grad(name, device):
    given = arguments(split=True, device=device, out=None, lse=None)
    given[name].requires_grad_()

    def step(given):
        return mla_triton.prefill(**given).out

    with pytest.raises(torch._dynamo.exc.TorchRuntimeError) as error:
        fixed(step)(given)
    assert f"{name} must not require grad while grad is enabled" in str(error.value)
    with torch.no_grad():
        assert torch.equal(fixed(step)(given), step(given))


@needs_compiler
@pytest.mark.parametrize(
    "name",
    ["prefill: keys of another width", "prefill: out expanded", "prefill: softmax_scale is nan"],
)
def test_a_compiler_tells_of_a_broken_rule(name):
    (case,) = (case for case in SHAPED if case.name == name)
    given = arguments(**changes_of(case))

    def step(given):
        return mla_triton.prefill(**given).out

    with pytest.raises(Exception) as error:  # noqa: PT011  # wrapped, in a compiler's own way
        fixed(step)(given)
    assert case.message in str(error.value)


@by_layout
def test_meta_and_fake_tensors(layout):
    inputs = make("cpu", **LAYOUTS[layout])
    expected = call(inputs)
    for got, like in zip(call(inputs.to("meta")), expected, strict=True):
        assert got.is_meta
        assert (got.shape, got.dtype) == (like.shape, like.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert call(inputs)[0].shape == expected[0].shape


@needs_kernels
@by_layout
def test_no_call_waits_for_the_device(layout, device, monkeypatch):
    launched = []
    monkeypatch.setattr(
        Launcher, "__call__", lambda self, *_: launched.append(self.variant.function.__name__)
    )
    positional, options = make(device, **LAYOUTS[layout]).call_arguments()
    with monkeypatch.context() as patch:
        no_waiting(patch)
        mla_triton.prefill(*positional, **options)
        mla_triton.prefill(*positional, **options, max_seqlen_q=7)
    assert launched == ["prefill_kernel"] * 2


@needs_kernels
def test_calls_that_differ_in_lengths_share_their_kernel(device, monkeypatch):
    """What changes from one step to the next makes no new launcher, and so compiles nothing."""
    made = launchers_made(monkeypatch)
    operation.forget()
    for lens in ([65], [70, 90], [66, 3, 200]):
        positional, options = make(device, q_lens=lens, k_lens=lens).call_arguments()
        mla_triton.prefill(*positional, **options, max_seqlen_q=max(lens))
    assert len(set(made)) <= 1
