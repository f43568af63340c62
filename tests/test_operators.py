"""The operators as PyTorch sees them: opcheck, compilers, fake tensors, export, and no waiting."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rejections import ALWAYS, REJECTIONS, Rejection, arguments
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_triton
from mla_triton import device as devices
from mla_triton import validate
from mla_triton.kernels.common.launch import Launcher, Variant
from mla_triton.testing import decode_inputs
from mla_triton.testing.problems import DecodeInputs

try:
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

    COMPILER = True
except ImportError:  # of a PyTorch that was made for an older Triton than there is
    COMPILER = False

ROOT = Path(__file__).parent.parent
SIZES = {"heads": 4, "latent": 128, "rope": 32}

LAYOUTS: dict[str, dict[str, Any]] = {
    "fused": {},
    "without rope": {"rope": 0},
    "pair": {"layout": "pair"},
    "CSR": {"table": "csr"},
    "pair and CSR": {"layout": "pair", "table": "csr"},
    "ragged": {"q_lens": [2, 3]},
    "two query tokens": {"s_q": 2},
    "rope inside": {"latent": 96, "value_dim": 128},
    "strided": {"strided": 1},
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
needs_kernels = pytest.mark.skipif(
    not (devices.interpreting() or torch.cuda.is_available()), reason="nothing to launch"
)
needs_compiler = pytest.mark.skipif(not COMPILER, reason="torch.compile cannot be imported")


def make(device: torch.device | str, **options: Any) -> DecodeInputs:
    given = {"kv_lens": [40, 17], "page_size": 16, "dtype": torch.float32, **SIZES}
    return decode_inputs(**(given | options), device=device)


def plan_of(inputs: DecodeInputs, **options: Any) -> mla_triton.Plan:
    q = inputs.q_nope
    ragged = inputs.cu_seqlens_q is not None
    return mla_triton.plan(
        inputs.kv_lens,
        heads=q.shape[-2],
        latent=q.shape[-1],
        rope=0 if inputs.q_rope is None else inputs.q_rope.shape[-1],
        dtype=q.dtype,
        s_q=1 if ragged else q.shape[1],
        cu_seqlens_q=inputs.cu_seqlens_q,
        queries=q.shape[0] if ragged else None,
        value_dim=inputs.value_dim,
        **options,
    )


def operands(inputs: DecodeInputs, plan: mla_triton.Plan | None = None) -> list[Any]:
    """What the operator takes for a call with these inputs."""
    out = {name: torch.zeros_like(t) for name, t in inputs.output_buffers().items()}
    return [
        inputs.q_nope,
        inputs.q_rope,
        *validate.unpack_cache(inputs.cache),
        *validate.unpack_page_table(inputs.page_table),
        inputs.kv_lens,
        inputs.cu_seqlens_q,
        plan and plan.schedule,
        plan and plan.partial_out,
        plan and plan.partial_lse,
        out["out"],
        out["lse"],
        inputs.softmax_scale,
        inputs.causal,
        inputs.value_dim,
        inputs.max_kv_len,
        False,
        plan and plan.key,
        None,
    ]


def call(inputs: DecodeInputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A call with something around it, for a compiler to get hold of."""
    positional, own = inputs.call_arguments()
    state = mla_triton.decode(*positional, **own, **options)
    return state.out * 2, state.lse + 1


def fixed(call: Callable[..., Any], backend: Any = "eager", **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend=backend, **options)


# -- opcheck


@needs_compiler
@by_layout
def test_opcheck_of_decode(layout, device):
    torch.library.opcheck(
        torch.ops.mla_triton.decode.default, operands(make(device, **LAYOUTS[layout]))
    )


@needs_compiler
@needs_kernels
@pytest.mark.parametrize("layout", ["fused", "pair and CSR", "ragged"])
def test_opcheck_of_decode_with_a_plan(layout, device):
    inputs = make(device, **LAYOUTS[layout])
    plan = plan_of(inputs)
    for buffer in (plan.partial_out, plan.partial_lse):
        buffer.zero_()
    torch.library.opcheck(torch.ops.mla_triton.decode.default, operands(inputs, plan))


@needs_compiler
@needs_kernels
@pytest.mark.parametrize("layout", ["fused", "ragged"])
def test_opcheck_of_schedule(layout, device):
    inputs = make(device, **LAYOUTS[layout])
    plan = plan_of(inputs)
    torch.library.opcheck(
        torch.ops.mla_triton.schedule.default,
        (inputs.kv_lens, inputs.cu_seqlens_q, torch.zeros_like(plan.schedule), plan.key),
    )


def test_operators_are_defined_once_and_for_both_devices():
    for name in ("mla_triton::decode", "mla_triton::schedule"):
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


# -- compilers


@needs_compiler
@by_layout
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_equals_eager(backend, layout, device):
    inputs = make(device, **LAYOUTS[layout])
    torch.testing.assert_close(fixed(call, backend)(inputs), call(inputs), rtol=0, atol=0)


@needs_compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_writes_to_the_buffers_it_is_given(backend, device):
    inputs = make(device, strided=1)
    buffers = inputs.output_buffers()

    def step(inputs, out, lse):
        state = mla_triton.decode(
            *inputs.call_arguments()[0], softmax_scale=1.0, out=out[0], lse=lse[0]
        )
        return state.out + 1

    got = fixed(step, backend)(inputs, [buffers["out"]], [buffers["lse"]])
    expected = mla_triton.decode(*inputs.call_arguments()[0], softmax_scale=1.0)
    assert torch.equal(buffers["out"], expected.out)
    assert torch.equal(buffers["lse"], expected.lse)
    assert torch.equal(got, expected.out + 1)


class Attention(torch.nn.Module):
    """Absorbed attention of one layer: projections to latent queries and from latent values."""

    def __init__(self, heads: int, latent: int, rope: int, head_dim: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = torch.nn.Linear(64, heads * (head_dim + rope), bias=False)
        self.absorb = torch.nn.Parameter(torch.randn(heads, head_dim, latent) / latent**0.5)
        self.output = torch.nn.Linear(heads * head_dim, 64, bias=False)
        self.split = [head_dim, rope]

    def forward(self, x, cache, page_table, kv_lens, plan=None):
        query = self.query(x).unflatten(-1, (-1, sum(self.split)))
        q_nope, q_rope = query.split(self.split, -1)
        q_nope = torch.einsum("bshd,hdl->bshl", q_nope, self.absorb)
        state = mla_triton.decode(
            q_nope, q_rope, cache, page_table, kv_lens, softmax_scale=0.1, plan=plan
        )
        return self.output(torch.einsum("bshl,hdl->bshd", state.out, self.absorb).flatten(-2))


@needs_compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["fused", "pair and CSR"])
def test_a_compiled_module(backend, layout, device):
    inputs = make(device, **LAYOUTS[layout])
    module = Attention(**SIZES).to(device)
    given = (torch.randn(2, 1, 64, device=device), inputs.cache, inputs.page_table, inputs.kv_lens)
    with torch.no_grad():
        expected = module(*given)
        torch.testing.assert_close(fixed(module, backend)(*given), expected)
        plan = plan_of(inputs)
        torch.testing.assert_close(fixed(module, backend)(*given, plan), expected)


@needs_compiler
@pytest.mark.parametrize("kind", ["no plan", "a plan", "a plan made inside"])
@pytest.mark.parametrize("layout", ["fused", "CSR"])
def test_one_compilation_serves_every_batch(kind, layout, device):
    counter = CompileCounterWithBackend("aot_eager")

    def step(inputs, plan):
        if kind == "a plan made inside":
            plan = plan_of(inputs)
        return call(inputs, plan=plan)

    compiled = fixed(step, counter, dynamic=True)
    # Sizes that happen to be equal in the first call are not taken to be so in all.
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for batch in (2, 3, 5, 8, 9):
            inputs = make(device, kv_lens=[70] * batch, **LAYOUTS[layout])
            plan = plan_of(inputs) if kind == "a plan" else None
            torch.testing.assert_close(compiled(inputs, plan), call(inputs), rtol=0, atol=0)
            if batch == 2:
                compilations = counter.frame_count
    assert counter.frame_count == compilations


@needs_compiler
def test_sizes_become_dynamic_by_themselves(device):
    """The second batch size is compiled for all that follow."""
    counter = CompileCounter()
    compiled = fixed(call, counter)
    for batch in (2, 3, 5, 8):
        inputs = make(device, kv_lens=[9] * batch)
        torch.testing.assert_close(compiled(inputs), call(inputs), rtol=0, atol=0)
    assert counter.frame_count == 2


@needs_compiler
@pytest.mark.parametrize(
    ("stored", "widths"),
    [
        ("fp8", {"latent": 128, "rope": 32}),
        ("fp8_ds_mla", {"latent": 512, "rope": 64}),
        ("fp8_v4", {"latent": 448, "rope": 64, "value_dim": 512}),
    ],
)
def test_a_plan_of_a_format_made_inside(stored, widths, device):
    inputs = make(device, stored=stored, dtype=torch.bfloat16, **widths)

    def step(inputs):
        return call(inputs, plan=plan_of(inputs, cache_format=stored))

    made = fixed(step, "aot_eager")(inputs)
    torch.testing.assert_close(made, call(inputs), rtol=0, atol=0)


@needs_compiler
@needs_kernels
def test_a_compiled_update_of_a_plan(device):
    inputs = make(device, kv_lens=[400, 17])
    plan = plan_of(inputs)
    lengths = inputs.kv_lens.clone()

    def step(inputs, plan, lengths):
        plan.update(lengths)
        return call(inputs, plan=plan)

    expected = call(inputs)
    plan.update(torch.zeros_like(lengths))
    torch.testing.assert_close(fixed(step, "aot_eager")(inputs, plan, lengths), expected)


@needs_compiler
def test_functions_that_read_a_result_see_it(device):
    """The operator's effect is on `out` alone: a compiler may not move a read before it."""
    inputs = make(device)
    out = torch.zeros_like(inputs.q_nope)

    def step(inputs, out):
        before = out.sum()
        mla_triton.decode(*inputs.call_arguments()[0], softmax_scale=1.0, out=out)
        return before, out.abs().sum()

    before, after = fixed(step, "aot_eager")(inputs, out)
    assert before == 0
    assert after > 0


@needs_compiler
def test_export(device):
    inputs = make(device)

    class Step(torch.nn.Module):
        def forward(self, q_nope, q_rope, cache, page_table, kv_lens):
            return mla_triton.decode(
                q_nope, q_rope, cache, page_table, kv_lens, softmax_scale=1.0
            ).out

    given = inputs.call_arguments()[0]
    expected = Step()(*given)
    batch, pages = torch.export.Dim("batch", min=2), torch.export.Dim("pages", min=2)
    dynamic = ({0: batch}, {0: batch}, {0: pages}, {0: batch}, {0: batch})
    for shapes in (None, dynamic):
        exported = torch.export.export(Step(), given, dynamic_shapes=shapes)
        assert any("mla_triton.decode" in str(node.target) for node in exported.graph.nodes)
        assert torch.equal(exported.module()(*given), expected)
        assert torch.equal(exported.run_decompositions().module()(*given), expected)
    larger = make(device, kv_lens=[9, 40, 17]).call_arguments()[0]
    assert torch.equal(exported.module()(*larger), Step()(*larger))


# -- autograd


@needs_compiler
@pytest.mark.parametrize("name", ["q_nope", "q_rope", "cache"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_refuses_what_requires_grad(backend, name, device):
    given = arguments(device=device, out=None, lse=None)
    given[name].requires_grad_()

    def step(given):
        return mla_triton.decode(**given).out

    with pytest.raises(torch._dynamo.exc.TorchRuntimeError) as error:
        fixed(step, backend)(given)
    assert f"{name} must not require grad while grad is enabled" in str(error.value)
    with torch.no_grad():
        assert torch.equal(fixed(step, backend)(given), step(given))


def test_no_gradient_flows_without_grad(device):
    given = arguments(device=device, out=None, lse=None)
    given["q_nope"].requires_grad_()
    with torch.no_grad():
        state = mla_triton.decode(**given)
    assert not state.out.requires_grad
    assert not state.lse.requires_grad


def test_a_module_that_is_trained_passes_its_queries_detached(device):
    """Queries that come out of a projection with weights require grad."""
    inputs = make(device)
    module = Attention(**SIZES).to(device)
    given = (torch.randn(2, 1, 64, device=device), inputs.cache, inputs.page_table, inputs.kv_lens)
    with pytest.raises(ValueError, match="q_nope must not require grad while grad is enabled"):
        module(*given)
    with torch.inference_mode():
        assert module(*given).shape == (2, 1, 64)


# -- tensors without memory


@by_layout
def test_meta_tensors(layout):
    inputs = make("cpu", **LAYOUTS[layout])
    expected = call(inputs)
    state = call(inputs.to("meta"))
    for got, like in zip(state, expected, strict=True):
        assert got.is_meta
        assert (got.shape, got.dtype) == (like.shape, like.dtype)


@by_layout
def test_fake_tensors(layout):
    inputs = make("cpu", **LAYOUTS[layout])
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = call(inputs)
    assert state[0].shape == call(inputs)[0].shape


def changes_of(case: Rejection) -> dict[str, Any]:
    return inspect.getclosurevars(case.call).nonlocals["changes"]


def to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta"
        ).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: to_meta(item) for name, item in value.items()}
    if isinstance(value, (mla_triton.LatentCache, mla_triton.CSRPageTable)):
        return type(value)(*map(to_meta, value))
    return value


# Calls of decode alone, on one device, whose message does not come from the choice of what runs.
SHAPED = [
    case
    for case in ALWAYS
    if case.call.__qualname__.startswith("decode.")
    and "device" not in case.message
    and "impl" not in case.name
]


@pytest.mark.parametrize("case", SHAPED, ids=lambda case: case.name)
def test_meta_tensors_are_held_to_the_same_rules(case):
    given = to_meta(arguments(**changes_of(case)))
    with pytest.raises(case.error) as error:
        mla_triton.decode(**given)
    assert str(error.value) == case.message


def test_enough_rules_are_held_on_meta():
    assert len(SHAPED) > len(REJECTIONS) / 3


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        "q_rope of other heads",
        "a cache without rope",
        "rotary keys of fewer pages",
        "page table narrower than max_kv_len",
        "kv_lens of int64",
        "out expanded",
        "lse of another shape",
        "softmax_scale is nan",
    ],
)
def test_a_compiler_tells_of_a_broken_rule(name):
    (case,) = (case for case in ALWAYS if case.name == name)
    given = arguments(**changes_of(case))

    def step(given):
        return mla_triton.decode(**given).out

    with pytest.raises(Exception) as error:  # noqa: PT011  # wrapped, in a compiler's own way
        fixed(step)(given)
    assert case.message in str(error.value)


# -- nothing waits for the device


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whatever would copy from the device to the host raises."""

    def refuse(name: str) -> Callable[..., Any]:
        def method(*_: Any, **__: Any) -> Any:
            raise AssertionError(f"Tensor.{name} waits for the device")

        return method

    for name in (
        "item", "tolist", "cpu", "numpy", "nonzero", "to", "__bool__", "__int__", "__float__",
        "__index__", "__len__", "__iter__", "__getitem__", "__array__", "equal",
    ):  # fmt: skip
        monkeypatch.setattr(torch.Tensor, name, refuse(name))
    for name in ("equal", "nonzero", "unique", "cat", "stack"):
        monkeypatch.setattr(torch, name, refuse(name))


@needs_kernels
@by_layout
@pytest.mark.parametrize("planned", [False, True])
def test_no_call_waits_for_the_device(planned, layout, device, monkeypatch):
    launched = []
    monkeypatch.setattr(
        Launcher, "__call__", lambda self, *_: launched.append(self.variant.function.__name__)
    )
    inputs = make(device, **LAYOUTS[layout])
    positional, options = inputs.call_arguments()
    plan = plan_of(inputs) if planned else None
    launched.clear()
    with monkeypatch.context() as patch:
        no_waiting(patch)
        mla_triton.decode(*positional, **options, plan=plan)
        assert launched == ["schedule_kernel"] * (not planned) + ["decode_kernel", "combine_kernel"]
        launched.clear()
        plan = plan_of(inputs)
        plan.update(inputs.kv_lens, inputs.cu_seqlens_q)
        assert launched == ["schedule_kernel"] * 2


@pytest.mark.parametrize("name", ["item", "tolist", "__bool__", "__index__"])
def test_waiting_is_noticed(name, monkeypatch):
    with monkeypatch.context() as patch:
        no_waiting(patch)
        with pytest.raises(AssertionError, match="waits for the device"):
            getattr(torch.ones(1), name)()


# -- kernels are compiled once


def launchers_made(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """The variants that launchers are made for from now on; nothing is launched."""
    made: list[Variant] = []
    init = Launcher.__init__

    def count(self: Launcher, variant: Variant, *rest: Any) -> None:
        made.append(variant)
        init(self, variant, *rest)

    monkeypatch.setattr(Launcher, "__init__", count)
    monkeypatch.setattr(Launcher, "__call__", lambda *_: None)
    return made


@needs_kernels
def test_calls_that_differ_in_size_share_their_kernels(device, monkeypatch):
    """What changes from one step to the next makes no new launcher, and so compiles nothing."""
    made = launchers_made(monkeypatch)
    for batch, pages in ((5, 3), (6, 3), (7, 9), (9, 200)):
        inputs = make(device, kv_lens=[9] * batch)
        table = torch.zeros(batch, pages, dtype=torch.int32, device=device)
        positional, options = inputs.call_arguments()
        mla_triton.decode(*positional[:3], table, positional[4], **options)
        if batch == 5:
            made.clear()
    assert made == []
    for lens in ([3, 2], [7, 1], [1, 1, 30]):
        inputs = make(device, kv_lens=[9] * len(lens), q_lens=lens)
        positional, options = inputs.call_arguments()
        mla_triton.decode(*positional, **options)
        if lens == [3, 2]:
            made.clear()
    assert made == []


def test_the_package_loads_no_compiler():
    """`torch._dynamo` takes as long to import as everything else together."""
    script = "import sys, mla_triton; print('torch._dynamo' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == "False", ran.stderr
