"""The ground that the other tests stand on is itself there."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
)
def test_uninitialised_memory_is_nan(dtype: torch.dtype, device: torch.device) -> None:
    like = torch.zeros(33, dtype=dtype, device=device)
    for fresh in (
        torch.empty(33, dtype=dtype, device=device),
        torch.empty_like(like),
        like.new_empty(33),
        torch.empty_strided((3, 11), (11, 1), dtype=dtype, device=device),
    ):
        assert fresh.float().isnan().all()


def test_uninitialised_integers_are_out_of_any_range(device: torch.device) -> None:
    fresh = torch.empty(33, dtype=torch.int32, device=device)
    assert (fresh == torch.iinfo(torch.int32).max).all()


def test_kernels_run_in_the_interpreter_exactly_where_there_is_no_gpu() -> None:
    import triton

    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU may run either")
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert triton.knobs.runtime.interpret
