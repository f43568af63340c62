"""The runner of other libraries' test files counts right what passes, fails and is out of scope.

The files here are written for that: those of the libraries are not in the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rival_on_cpu import limited

RUN = Path(__file__).parent / "rivals" / "run.py"

PARAMETRISED = """
import flashinfer
import pytest
import torch
from conftest import clear_cuda_cache
from flashinfer.utils import is_sm90a_supported
from vllm.platforms import current_platform
from vllm._custom_ops import merge_attn_states, something_else

@pytest.mark.parametrize("num_heads", [2, 3000])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_merge(num_heads, dtype):
    device = torch.device("cuda:0")
    clear_cuda_cache(device)
    assert is_sm90a_supported(device) and torch.cuda.is_available()
    torch.set_default_dtype(dtype)
    v = torch.ones(3, num_heads, 32, device=device)
    assert v.dtype == dtype and v.is_cuda and v.to(0).is_cuda and v.cuda().is_cuda
    merged, s = flashinfer.merge_state(v, torch.zeros(3, num_heads, device="cuda").float(),
                                       v, torch.zeros(3, num_heads).float().to("cuda"))
    assert merged.dtype == dtype and torch.equal(merged, v) and (s == 1).all()

def test_what_is_left_by_another_is_undone():
    assert torch.ones(1).dtype == torch.float32
    torch.testing.assert_close(torch.ones(1), torch.ones(1))

def test_wrong():
    v, s = torch.ones(3, 2, 32), torch.zeros(3, 2)
    assert (flashinfer.merge_state(v, s, v, s)[1] == 2).all()

def test_absent():
    something_else(1)

def test_refused():
    v, s = torch.ones(3, 2, 32), torch.zeros(2, 3)
    merge_attn_states(v, v, s, v, s, output_scale=torch.ones(1))

def test_not_of_ours():
    raise NotImplementedError("of the test's own")

def test_elsewhere():
    pytest.skip(current_platform.device_type)
"""

SCRIPT = """
import dataclasses
import flash_mla
import torch

@dataclasses.dataclass
class Case:
    b: int
    h_q: int
    test_performance: bool

def test_decode(case):
    assert not case.test_performance
    q = torch.randn(case.b, 1, case.h_q, 160)
    cache = torch.randn(2, 16, 1, 160)
    table, lens = torch.zeros(case.b, 1).int(), torch.full((case.b,), 7).int()
    meta, splits = flash_mla.get_mla_metadata(lens, case.h_q, 1)
    out, lse = flash_mla.flash_mla_with_kvcache(q, cache, table, lens, 128, meta, splits)
    assert out.dtype == q.dtype and q.dtype in (torch.half, torch.bfloat16)

def main(dtype):
    torch.set_default_dtype(dtype)
    torch.set_default_device("cuda:0")
    for b in (1, 2):
        test_decode(Case(b, 2, True))
"""

IN_A_PACKAGE = """
import torch
from tests.kernels.utils import DEFAULT_OPCHECK_TEST_UTILS, opcheck
from vllm import _custom_ops as ops

def fp8_case():
    kv_c, k_pe = torch.randn(3, 32, device="cuda"), torch.randn(3, 16, device="cuda")
    cache = torch.zeros(2, 4, 48, dtype=torch.uint8, device="cuda")
    slots, scale = torch.tensor([5, -1, 0], device="cuda"), torch.tensor(0.1, device="cuda")
    return kv_c, k_pe, cache, slots, "fp8", scale

def test_operator():
    opcheck(torch.ops._C_cache_ops.concat_and_cache_mla, fp8_case(),
            test_utils=DEFAULT_OPCHECK_TEST_UTILS)

def test_fp8():
    kv_c, k_pe, cache, slots, kind, scale = fp8_case()
    ops.concat_and_cache_mla(kv_c, k_pe, cache, slots, kind, scale)
    expected, back = torch.zeros(48, dtype=torch.uint8), torch.zeros(48)
    ops.convert_fp8(expected, torch.cat([kv_c[0], k_pe[0]]), scale.item(), kv_dtype=kind)
    assert torch.equal(cache[1, 1], expected) and cache[1, 1].any() and not cache[0, 1].any()
    ops.convert_fp8(back, expected, scale.item())
    torch.testing.assert_close(back, torch.cat([kv_c[0], k_pe[0]]), rtol=2**-4, atol=2**-10)

def test_pinned():
    assert torch.ones(1).pin_memory().item() == 1
    ops.convert_fp8(torch.zeros(1, dtype=torch.uint8), torch.ones(1), kv_dtype="fp8_e5m2")
"""


def rows_of(
    folder: Path, text: str, *options: str, file: str = "test_it.py"
) -> dict[str, list[int]]:
    """Of each test of a file, how many passed, failed, were out of scope, skipped and not run."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    done = subprocess.run(
        [sys.executable, str(RUN), "--cpu", str(folder), file, *options],
        env=os.environ | {"PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line[:1] == "|"]
    assert len(rows) > 2, done.stdout + done.stderr
    return {name.rpartition("::")[2]: [int(one) for one in rest] for name, *rest in rows[2:]}


def test_outcomes(tmp_path):
    assert rows_of(tmp_path, PARAMETRISED) == {
        "test_merge": [4, 0, 0, 0, 0],
        "test_what_is_left_by_another_is_undone": [1, 0, 0, 0, 0],
        "test_wrong": [0, 1, 0, 0, 0],
        "test_absent": [0, 0, 1, 0, 0],
        "test_refused": [0, 0, 1, 0, 0],
        "test_not_of_ours": [0, 1, 0, 0, 0],
        "test_elsewhere": [0, 0, 0, 1, 0],
        "all": [5, 2, 2, 1, 0],
    }


def test_scripts_and_samples(tmp_path):
    assert rows_of(tmp_path, SCRIPT, "--sample", "3")["test_decode"] == [3, 0, 0, 0, 1]


def test_a_package_of_tests(tmp_path):
    """Whose name the aliases have, too."""
    for package in ("tests", "tests/kernels"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    assert rows_of(tmp_path, IN_A_PACKAGE, file="tests/kernels/test_it.py") == {
        "test_operator": [1, 0, 0, 0, 0],
        "test_fp8": [1, 0, 0, 0, 0],
        "test_pinned": [0, 0, 1, 0, 0],
        "all": [2, 0, 1, 0, 0],
    }


def test_a_file_that_cannot_be_read_has_failed(tmp_path):
    assert rows_of(tmp_path, "import no_such_module")["all"] == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "value", "cut"),
    [
        ("kv_len", 96, 96),
        ("kv_len", 5532, 97),
        ("kv_len", 7564, 96),
        ("b", 128, 2),
        ("b", True, True),
        ("head_dim", 5532, 5532),
        ("kv_len", None, None),
    ],
)
def test_limits(name, value, cut):
    assert limited(name, value) == cut
