"""Every test that asks for a `way` runs once for each of them, and gives its memory back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ways import WAYS, Way, forced


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    with forced(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def memory_goes_back() -> Iterator[None]:
    """Tests run side by side on one GPU, and PyTorch keeps what one of them has freed."""
    yield
    torch.cuda.empty_cache()
