"""What append, gather and copy_pages leave, held against the reference.

To the bit, canaries and what lies between rows included; but for the numbers of an append that
fuses a norm or a rotation, whose sums may be in another order: they have a budget
(`mla_triton.testing.append_errors`), and what is not written still has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

import mla_triton
from mla_triton import validate, validate_append, validate_copy, validate_gather
from mla_triton.problem_cache import AppendProblem, CopyProblem, GatherProblem
from mla_triton.testing.caches import AppendInputs, CacheMemory, append_errors
from mla_triton.testing.comparison import Deviation, different_bits
from mla_triton.testing.copies import CopyInputs, pages_of
from mla_triton.testing.gathers import GatherInputs

CacheInputs = AppendInputs | GatherInputs | CopyInputs
CacheResult = CacheMemory | tuple[torch.Tensor, torch.Tensor | None]
"""What an append or a copy leaves in a copy of the cache; `(out, rope_out)` of a gather."""


@dataclass(frozen=True)
class Bits:
    """Bytes that have to be the reference's."""

    what: str
    compared: int
    differing: int
    first: str
    """Where they differ first, and what is there; "" where they do not."""

    @property
    def text(self) -> str:
        """For people."""
        if not self.differing:
            return f"{self.compared} bytes {self.what}: equal bits"
        return f"{self.differing} of {self.compared} bytes {self.what} are not the reference's" + (
            f", first {self.first}" if self.first else ""
        )


@dataclass(frozen=True)
class CacheReport:
    """What `compare_cache` found."""

    bits: tuple[Bits, ...]
    stored: Deviation | None = None
    """Of a fused append: each token's share of its budget, and the worst number, by (token,
    column)."""

    @property
    def ok(self) -> bool:
        return not self.message

    @property
    def message(self) -> str:
        """What is wrong; "" where nothing is."""
        wrong = [each.text for each in self.bits if each.differing]
        if self.stored is not None and self.stored.over:
            found = self.stored
            wrong.append(
                f"stored{list(found.where)} is {found.got:.9g}, expected {found.expected:.9g}: its "
                f"error {found.error:.3g} is over its budget {found.budget:.3g} ({found.over} of "
                f"{found.shares.numel()} tokens)"
            )
        return "; ".join(wrong)


def run(inputs: CacheInputs, impl: str | None = None) -> CacheResult:
    """Our operation over a problem, into copies of its cache or of its results."""
    if isinstance(inputs, GatherInputs):
        return inputs.call(impl=impl)
    made = inputs.fresh()
    arguments, options = made.call_arguments()
    if isinstance(made, AppendInputs):
        mla_triton.append(*arguments, **options, impl=impl)
        return made.memory
    mla_triton.copy_pages(*arguments, **options, impl=impl)
    return made.target


def problem_of(inputs: CacheInputs) -> AppendProblem | GatherProblem | CopyProblem:
    """What a call with these inputs is to the package."""
    if isinstance(inputs, GatherInputs):
        return validate_gather.gather(
            validate.unpack_cache(inputs.cache), *validate.unpack_page_table(inputs.table),
            inputs.cu_seqlens_k, inputs.starts, inputs.out, inputs.rope_out,
        )  # fmt: skip
    if isinstance(inputs, CopyInputs):
        read, written = (
            validate_copy.cache_parts(pages_of(memory), "cache")
            for memory in (inputs.source, inputs.target)
        )
        return validate_copy.copy_pages(
            list(read), list(read.values()), list(written.values()), inputs.source_pages,
            inputs.target_pages,
        )  # fmt: skip
    options = inputs.options
    return validate_append.append(
        validate.unpack_cache(inputs.memory.cache), inputs.latent, inputs.rope, inputs.slots,
        options.get("norm_weight"), options.get("cos_sin"), options.get("positions"),
        options.get("rope_style", "interleaved"), options["power_of_two_scales"],
    )  # fmt: skip


def device_of(inputs: CacheInputs) -> torch.device:
    if isinstance(inputs, GatherInputs):
        return inputs.out.device
    return inputs.slots.device if isinstance(inputs, AppendInputs) else inputs.source_pages.device


def is_fused(inputs: CacheInputs) -> bool:
    """Whether numbers are computed on their way into the cache."""
    if not isinstance(inputs, AppendInputs):
        return False
    return any(inputs.options.get(name) is not None for name in ("norm_weight", "cos_sin"))


def compare_cache(result: CacheResult, inputs: CacheInputs) -> CacheReport:
    """Judges what an operation on a cache left; `result` as `run` gives it."""
    if isinstance(inputs, GatherInputs):
        rows = cast("tuple[torch.Tensor, torch.Tensor | None]", result)
        return CacheReport(tuple(_of_rows(rows, inputs)))
    memory = cast(CacheMemory, result)
    if not (isinstance(inputs, AppendInputs) and is_fused(inputs)):
        return CacheReport((_of_memory(memory, inputs.expected()),))
    inside = _written_bytes(inputs)
    pairs = zip(memory.buffers, inputs.memory.buffers, inside, strict=True)
    spilt = sum(int(((got != was) & ~here).sum()) for got, was, here in pairs)
    rest = sum(int((~here).sum()) for here in inside)
    bits = Bits("outside of the slots that are written", rest, spilt, "")
    return CacheReport((bits,), _of_numbers(memory, inputs))


def same_result(one: CacheResult, other: CacheResult) -> bool:
    """Whether two calls left the same bits."""
    if isinstance(one, CacheMemory) and isinstance(other, CacheMemory):
        return one.differs(other) == 0
    pairs = zip(cast(Sequence[Any], one), cast(Sequence[Any], other), strict=True)
    return all(
        a is b or (a is not None and b is not None and not different_bits(a, b).any())
        for a, b in pairs
    )


def _of_memory(got: CacheMemory, expected: CacheMemory) -> Bits:
    names = ("cache",) if got.form == "fused" else ("ckv", *["kpe"] * got.has_keys, "scales")
    first = ""
    for name, part in zip(names, got.parts, strict=False):
        first = first or _first(name, part.of(got.buffers), part.of(expected.buffers))
    differing = got.differs(expected)
    if differing and not first:
        first = "where no token lies"
    count = sum(buffer.numel() for buffer in got.buffers)
    return Bits("of the cache and around it", count, differing, first)


def _of_rows(got: tuple[torch.Tensor, torch.Tensor | None], inputs: GatherInputs) -> Iterator[Bits]:
    """Where rows lie as the inputs' do, what is between them is looked at, too."""
    expected = inputs.expected()
    for name, one, other in zip(("out", "rope_out"), got, expected, strict=True):
        if other is None:
            continue
        if one is None or one.shape != other.shape or one.dtype != other.dtype:
            form = "None" if one is None else f"{one.dtype} {list(one.shape)}"
            size = other.numel() * other.itemsize
            wanted = f"{form}, expected {other.dtype} {list(other.shape)}"
            yield Bits(f"of {name}", size, max(1, size), wanted)
            continue
        first = _first(name, one, other)
        as_bytes = [tensor.contiguous().view(torch.uint8) for tensor in (one, other)]
        if one.stride() == other.stride() and _nbytes(one) == _nbytes(other):
            as_bytes = [as_bytes[0].new_empty(0).set_(t.untyped_storage()) for t in (one, other)]
        differing = int((as_bytes[0] != as_bytes[1]).sum())
        if differing and not first:
            first = "between rows"
        yield Bits(f"of {name}", as_bytes[0].numel(), differing, first)


def _nbytes(tensor: torch.Tensor) -> int:
    """Of all memory that the tensor is a view of."""
    return int(tensor.untyped_storage().nbytes())


def _first(name: str, got: torch.Tensor, expected: torch.Tensor) -> str:
    """The first element whose bits differ, with both numbers."""
    different = different_bits(got, expected)
    if not different.any():
        return ""
    where = tuple(different.nonzero()[0].tolist())
    numbers = (float(tensor[where].float()) for tensor in (got, expected))
    return f"{name}{list(where)}: {next(numbers):.9g}, expected {next(numbers):.9g}"


def _written_bytes(inputs: AppendInputs) -> list[torch.Tensor]:
    """Of each buffer of the cache, the bytes that tokens are written to."""
    memory = inputs.memory
    marks = [torch.zeros_like(buffer) for buffer in memory.buffers]
    slots = inputs.slots.long()[inputs.written]
    for part in memory.parts:
        stored = part.of(marks).view(torch.uint8)
        stored[slots // stored.shape[1], slots % stored.shape[1]] = 1
    return [mark.bool() for mark in marks]


def _of_numbers(memory: CacheMemory, inputs: AppendInputs) -> Deviation:
    """What is stored of each token that is in the cache afterwards."""
    error, allowed = append_errors(memory, inputs)
    if not error.numel():
        return Deviation(error[:, 0], 0.0, 0.0, (), 0.0, 0.0)
    error = error.nan_to_num(float("inf"))
    shares = torch.where(allowed > 0, error / allowed, error / 0.0).nan_to_num(
        0.0, posinf=float("inf")
    )
    of_tokens, columns = shares.max(1)
    row = int(of_tokens.argmax())
    column, token = int(columns[row]), int(inputs.written[row])
    rope = 0 if inputs.rope is None else inputs.rope.shape[1]
    found = memory.values(inputs.slots.long()[inputs.written], rope)
    return Deviation(
        of_tokens, error[row, column].item(), allowed[row, column].item(), (token, column),
        found[row, column].item(), inputs.exact()[row, column].item(),
    )  # fmt: skip
