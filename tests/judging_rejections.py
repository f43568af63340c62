"""How the cases of `rejections` and its like are judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rejections import Rejection, arguments

import mla_triton
from mla_triton import device as devices

needs_kernels = pytest.mark.skipif(
    not devices.interpreting(), reason="CPU tensors are not taken to the kernels"
)


def rejected(case: Rejection) -> None:
    with pytest.raises(case.error) as error:
        case.call()
    assert str(error.value) == case.message
    assert error.type is case.error


def named(cases: list[Rejection]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def same_as_plain(**changes: Any) -> None:
    """A call that looks unusual gives what the ordinary one gives."""
    layout = {name: changes[name] for name in ("ragged", "pair", "csr") if name in changes}
    with torch.no_grad():
        expected = mla_triton.decode(**arguments(**layout))
        got = mla_triton.decode(**arguments(**changes))
    assert torch.equal(got.out, expected.out)
    assert torch.equal(got.lse, expected.lse)
