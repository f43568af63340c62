"""Every test that asks for a `way` runs once for each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ways import WAYS, Way, forced


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    with forced(request.param):
        yield request.param
