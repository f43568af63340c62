"""Which bytes of memory a tensor takes, and whether two tensors have any in common.

Pure arithmetic of addresses and strides: no memory is read, so the device is not waited for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Region(NamedTuple):
    """The bytes of a tensor: elements of `item` bytes in a shape, apart by strides."""

    address: int
    item: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements; not negative."""


def of(tensor: torch.Tensor) -> Region:
    return Region(tensor.data_ptr(), tensor.element_size(), tensor.shape, tensor.stride())


def reach(item: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Bytes from the beginning of a tensor to its end, 0 where it has no element."""
    if 0 in shape:
        return 0
    steps = zip(shape, strides, strict=True)
    return item * (1 + sum((size - 1) * stride for size, stride in steps))


def share(one: Region, other: Region) -> bool:
    """Whether any byte belongs to both: not where they merely lie between each other's rows."""
    distance = other.address - one.address
    ends = reach(*one[1:]), distance + reach(*other[1:])
    if not ends[0] or ends[1] == distance or distance >= ends[0] or ends[1] <= 0:
        return False
    return _share_at(one[1:], other[1:], distance)


# Of interleaved tensors every row is looked at: once for buffers that are used again and again.
@lru_cache(maxsize=256)
def _share_at(
    one: tuple[int, tuple[int, ...], tuple[int, ...]],
    other: tuple[int, tuple[int, ...], tuple[int, ...]],
    distance: int,
) -> bool:
    (starts, size), (other_starts, other_size) = _runs(0, *one), _runs(distance, *other)
    # Of the other tensor's runs that begin before the end of a run, the last reaches furthest.
    last = torch.searchsorted(other_starts, starts + size) - 1
    return bool(((last >= 0) & (other_starts[last.clamp_min(0)] + other_size > starts)).any())


def _runs(
    address: int, item: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[torch.Tensor, int]:
    """(sorted addresses of the contiguous runs of a tensor, bytes of each)."""
    if not strides or strides[-1] != 1:
        shape, strides = (*shape, 1), (*strides, 1)
    starts = torch.tensor([address], device="cpu")
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        starts = (starts[:, None] + torch.arange(size, device="cpu") * (stride * item)).flatten()
    return starts.sort().values, shape[-1] * item
