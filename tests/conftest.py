"""What every test stands on: Triton's interpreter where there is no GPU, uninitialised memory that
is NaN, reproducible random tests, and GPU tests that are collected only where a GPU is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# Triton reads the first of these while it is imported, so nothing above may import it.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

GPU_TESTS = Path(__file__).parent / "gpu"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = [] if HAS_GPU else ["gpu"]

hypothesis.settings.register_profile(
    "ci",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "dev",
    max_examples=30,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "deep",
    max_examples=2000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev")
)


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETING:
        _refuse_numpy_that_breaks_the_interpreter()
    # A buffer that a kernel was to write and did not is then NaN (or the largest integer), and no
    # test can pass on what an earlier one left in memory.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def _refuse_numpy_that_breaks_the_interpreter() -> None:
    import numpy
    import triton

    version = tuple(int(part) for part in numpy.__version__.split(".")[:2])
    if version >= (2, 4) and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        raise pytest.UsageError(
            f"the interpreter of Triton {triton.__version__} needs numpy < 2.4, "
            f"got {numpy.__version__}"
        )


def pytest_report_header(config: pytest.Config) -> list[str]:
    import triton

    kernels = "in Triton's interpreter" if INTERPRETING else "compiled"
    if HAS_GPU:
        where = f"on {torch.cuda.get_device_name()}"
    else:
        where = "no GPU: tests/gpu was NOT collected"
    return [
        f"mla_triton: kernels run {kernels}; {where}",
        f"torch {torch.__version__}, triton {triton.__version__}, "
        f"hypothesis profile {hypothesis.settings.get_current_profile_name()}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """Where the tensors of a test live: on the GPU if there is one."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def debugging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, calls verify values."""
    from mla_triton import debug

    monkeypatch.setenv("MLA_TRITON_DEBUG", "1")
    debug.switched_on.cache_clear()
    yield
    debug.switched_on.cache_clear()


@pytest.fixture(autouse=True)
def nothing_recalled() -> None:
    """Every test's first call goes through all checks, whatever an earlier test has called."""
    from mla_triton.ops import decode, prefill

    decode.RECALLED.clear()
    prefill.RECALLED.clear()
