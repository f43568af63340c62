"""The execution that a property is tried by."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from executions import Execution


@pytest.fixture(scope="module")
def execution(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Execution]:
    """In force. What is compiled for older cards is compiled once for all processes of xdist."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with request.param.in_force(shared / "older-code") as execution:
        yield execution
