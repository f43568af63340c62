"""The launch path without a GPU: what reaches Triton's launcher, and in which order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton

from mla_triton import device as devices
from mla_triton.kernels.common import combine
from mla_triton.kernels.common.launch import Launcher, Variant, target_of
from mla_triton.kernels.common.schedule import result_size
from mla_triton.kernels.common.tensors import DecodeTensors, strides
from mla_triton.kernels.portable import decode as portable
from mla_triton.testing import compilation

CARD = devices.from_label("9.0")


class Compiled:
    """Stands in for Triton's CompiledKernel: remembers what it is launched with."""

    function = "function"
    packed_metadata = "packed"

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def run(self, *arguments) -> None:
        self.launches.append(arguments)

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


def test_arguments_reach_the_kernel_by_name(compiled):
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
        variant = combine.variant(problem, combine.heuristic(problem, geometry), CARD)
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
