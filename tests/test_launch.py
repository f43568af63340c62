"""The launch path without a GPU: what reaches Triton's launcher, and in which order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton

from mla_triton import device as devices
from mla_triton.kernels.common import combine
from mla_triton.kernels.common.launch import Launcher, Recording, Variant, target_of
from mla_triton.kernels.common.schedule import result_size
from mla_triton.kernels.common.tensors import DecodeTensors, strides
from mla_triton.kernels.portable import decode as portable
from mla_triton.testing import compilation

CARD = devices.from_label("9.0")


class Runner:
    """Stands in for Triton's launcher, of a kernel that takes no scratch memory."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = False
    launch_pdl = True

    def __init__(self, launches: list[tuple]) -> None:
        self.launches = launches

    def __call__(self, *arguments) -> None:
        self.launches.append(arguments)

    def launch(self, *arguments) -> None:
        """The compiled part of it: takes flags and scratch memory as well."""
        assert arguments[5:9] == (False, True, None, None)
        self.launches.append(arguments[:5] + arguments[9:])


class Compiled:
    """Stands in for Triton's CompiledKernel: remembers what it is launched with."""

    function = "function"
    packed_metadata = "packed"

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.run = Runner(self.launches)

    def launch_metadata(self, grid, stream, *arguments) -> str:
        return f"metadata of {grid}"


@pytest.fixture
def compiled(monkeypatch) -> Compiled:
    """The kernel that every variant compiles to, on a GPU that is not there."""
    made = Compiled()
    monkeypatch.setattr(Variant, "compile", lambda self, device: made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver = SimpleNamespace(get_current_stream=lambda index: f"stream of {index}")
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return made


def decode_launch() -> tuple[Launcher, list]:
    problem = compilation.problem()
    geometry = portable.geometry(problem, CARD)
    config = portable.heuristic(problem, CARD)
    q = torch.empty(64, 1, 16, 576, dtype=torch.bfloat16)
    tensors = DecodeTensors(
        q_nope=q[..., :512],
        q_rope=q[..., 512:],
        ckv=torch.empty(2, 64, 576, dtype=torch.bfloat16),
        kpe=None,
        scales=None,
        pages=torch.zeros(64, 7, dtype=torch.int32),
        indptr=None,
        kv_lens=torch.zeros(64, dtype=torch.int32),
        cu_seqlens_q=None,
        schedule=torch.zeros(result_size(geometry), dtype=torch.int32),
        planned_kv_len=448,
        partial_out=torch.empty(geometry.partial_rows, 512),
        partial_lse=torch.empty(geometry.partial_rows),
        out=torch.empty(64, 1, 16, 512, dtype=torch.bfloat16),
        lse=torch.empty(64, 1, 16),
        softmax_scale=0.5,
    )
    launcher = Launcher(portable.variant(problem, config, geometry, CARD), CARD, 0)
    return launcher, portable.arguments(problem, geometry, tensors)


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_arguments_reach_the_kernel_by_name(compiled, monkeypatch, version):
    """By the compiled part of Triton's launcher in the version where it is known, else by all."""
    monkeypatch.setattr(triton, "__version__", version)
    launcher, arguments = decode_launch()
    launcher((3, 4, 1), arguments)
    (launch,) = compiled.launches
    assert launch[:9] == (3, 4, 1, "stream of 0", "function", "packed", None, None, None)
    names = launcher.variant.function.arg_names
    got = dict(zip(names, launch[9:], strict=True))
    assert got["q_nope"] == arguments[0].data_ptr()
    assert got["q_rope"] == got["q_nope"] + 512 * 2
    assert got["kpe"] is None
    assert (got["q_nope_stride_b"], got["q_nope_stride_h"]) == (16 * 576, 576)
    assert (got["ckv_stride_page"], got["kpe_stride_page"]) == (64 * 576, 0)
    assert (got["out_stride_h"], got["lse_stride_b"], got["table_size"]) == (512, 16, 7)
    assert (got["batch"], got["s_q"], got["queries"], got["heads"]) == (64, 1, 64, 16)
    assert got["planned_kv_len"] == 448
    assert got["scale_log2"] == pytest.approx(0.5 * 1.4426950408889634)
    assert {got[name] for name, _ in launcher.variant.constants} == {None}


def test_a_profilers_hook_gets_its_metadata(compiled, monkeypatch):
    launcher, arguments = decode_launch()
    chain = SimpleNamespace(calls=[print])
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", chain)
    launcher((3, 4, 1), arguments)
    assert compiled.launches[0][6:8] == ("metadata of (3, 4, 1)", chain)


def test_a_kernel_with_scratch_memory_goes_through_all_of_the_launcher(compiled):
    compiled.run.global_scratch_size = 16
    compiled.run.launch = None
    launcher, arguments = decode_launch()
    launcher((3, 4, 1), arguments)
    assert len(compiled.launches) == 1


def test_other_backends_go_through_all_of_the_launcher(compiled):
    launcher, arguments = decode_launch()
    launcher.device = devices.from_label("gfx942")
    compiled.run = lambda *arguments: compiled.launches.append(arguments)
    launcher((3, 4, 1), arguments)
    assert len(compiled.launches) == 1


def test_a_recording_is_replayed_with_other_addresses(compiled):
    launcher, arguments = decode_launch()
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    recording = Recording(tensors)
    recording.launching(launcher)((3, 4, 1), arguments)
    recording.launching(launcher)((1, 1, 1), arguments)
    assert recording.is_replayable
    others = [torch.empty_like(tensor) for tensor in tensors]
    recording.replay([tensor.data_ptr() for tensor in others])
    first, second, *again = compiled.launches
    for made, expected in zip(again, (first, second), strict=True):
        moved = {t.data_ptr(): o.data_ptr() for t, o in zip(tensors, others, strict=True)}
        assert made[:9] == expected[:9]
        assert made[9:] == tuple(moved.get(value, value) for value in expected[9:])


def test_a_tensor_given_twice_is_not_replayed(compiled):
    one, other = torch.empty(1), torch.empty(1)
    assert Recording([one, other, None, None]).is_replayable
    assert not Recording([one, other, one]).is_replayable


def test_interpreted_launches_are_not_replayed():
    launcher, _ = decode_launch()
    launcher.index = None
    recording = Recording([])
    recording._steps.append((launcher, (1, 1, 1), [], ()))
    assert not recording.is_replayable


def test_another_device_is_made_current(compiled, monkeypatch):
    visited = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    class Guard:
        def __init__(self, index):
            visited.append(index)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(torch.cuda, "device", Guard)
    launcher, arguments = decode_launch()
    launcher((1, 1, 1), arguments)
    assert visited == [0]
    assert len(compiled.launches) == 1


@pytest.mark.parametrize("module", [portable, combine])
def test_variants_name_every_argument_in_order(module):
    problem = compilation.problem()
    geometry = portable.geometry(problem, CARD)
    if module is combine:
        merge = combine.heuristic(problem, geometry, CARD)
        variant = combine.variant(problem, merge, CARD)
    else:
        config = portable.heuristic(problem, CARD)
        variant = portable.variant(problem, config, geometry, CARD)
    names = [name for name, _ in variant.types] + [name for name, _ in variant.constants]
    assert names == list(variant.function.arg_names)
    kinds = [kind.startswith("*") for _, kind in variant.types]
    assert kinds == sorted(kinds, reverse=True), "pointers come first"


def test_strides_are_of_request_token_and_head():
    uniform = torch.empty(2, 3, 5, 7)
    assert strides(uniform, ragged=False) == (105, 35, 7)
    assert strides(uniform[0], ragged=True) == (0, 35, 7)
    assert strides(None, ragged=False) == (0, 0, 0)


def test_only_gpus_have_machine_code():
    with pytest.raises(ValueError, match="device must be a GPU to compile for, got interpreter"):
        target_of(devices.INTERPRETER)
