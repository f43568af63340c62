"""A result held against the budget of its problem: row by row, and what is furthest from the truth.

A kernel that returns no lse is judged by its out alone: give `(out, None)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mla_triton.state import AttentionState
from mla_triton.testing.budget import Budget, Inputs, budget_of, difference, rms

State = AttentionState | tuple[torch.Tensor, torch.Tensor | None]
"""`(out, lse)`, as operations return it or as a plain pair."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Report:
    """What `compare` found. Errors and budgets are those of the row closest to, or furthest past,
    its budget."""

    ok: bool
    message: str
    out_error: float = float("nan")
    out_budget: float = float("nan")
    out_rms_error: float = float("nan")
    out_rms_budget: float = float("nan")
    lse_error: float = float("nan")
    lse_budget: float = float("nan")


@dataclass(frozen=True)
class Deviation:
    """How far a result is from the oracle by one measure, in units of what it may be.

    A share is an error over its budget: up to 1 is right. It is infinite for a row that has NaN or
    an infinity where the oracle has none, or the reverse, and for any error in a row without budget
    (one that sees no key).
    """

    shares: torch.Tensor
    """float64 `[..., heads]`: of each row."""
    error: float
    budget: float
    """Both of the row with the largest share."""
    where: tuple[int, ...]
    """Coordinates of that row's worst element in `out`, or of the row in `lse`; () without rows."""
    got: float
    expected: float
    """Both of that element."""

    @property
    def worst(self) -> float:
        """The largest share, 0 where there are no rows."""
        return self.shares.max().item() if self.shares.numel() else 0.0

    @property
    def over(self) -> int:
        """Rows that are past their budget."""
        return int((self.shares > 1).sum())


def deviations(state: State, inputs: Inputs, budget: Budget | None = None) -> dict[str, Deviation]:
    """The deviations of a result by "out" (largest element of a row), "out_rms" and "lse".

    `state` is on the device of `inputs`; a `lse` of None is left out. The budget is by default that
    of the inputs.

    Raises ValueError where shape or dtype of the result is not what `compare` accepts.
    """
    budget = budget_of(inputs) if budget is None else budget
    wrong = _wrong_form(state, inputs, budget)
    if wrong is not None:
        raise ValueError(wrong)
    return _deviations(state, budget)


def compare(state: State, inputs: Inputs, budget: Budget | None = None) -> Report:
    """Judges the result of a kernel against its budget, by default that of its inputs.

    `state` is on the device of `inputs`: `out` in the dtype of queries (of a merge, of its
    result), `lse` float32 or None. Where the oracle is infinite or NaN the result has to be the
    same, and nowhere else; only then are numbers compared.
    """
    if budget is None:
        budget = budget_of(inputs)
    wrong = _wrong_form(state, inputs, budget)
    if wrong is not None:
        return Report(False, wrong)
    for name, got, truth in _pairs(state, budget):
        strange = _strange(got, truth)
        if strange.any():
            where = _first(strange)
            values = f"{got[where].item()}, expected {truth[where].item()}"
            count = f"{int(strange.sum())} such elements"
            return Report(False, f"{name}{list(where)} is {values} ({count})")
    found = _deviations(state, budget)
    messages = [_message(name, each) for name, each in found.items() if each.over]
    numbers = {
        f"{name}_{kind}": getattr(each, kind)
        for name, each in found.items()
        for kind in ("error", "budget")
    }
    return Report(not messages, "; ".join(messages) or "within budget", **numbers)


def assert_within_budget(state: State, inputs: Inputs, budget: Budget | None = None) -> None:
    """Raises AssertionError, naming the worst element, unless `compare` accepts the result."""
    report = compare(state, inputs, budget)
    if not report.ok:
        raise AssertionError(f"{report.message}\n{inputs!r}")


def same_bits(one: Sequence[torch.Tensor | None], other: Sequence[torch.Tensor | None]) -> bool:
    """Whether tensors, or None, are equal bit for bit, NaN for NaN."""
    for a, b in zip(one, other, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif a.shape != b.shape or a.dtype != b.dtype or different_bits(a, b).any():
            return False
    return True


def assert_same_bits(
    one: Sequence[torch.Tensor | None], other: Sequence[torch.Tensor | None]
) -> None:
    """Raises AssertionError, saying how many elements of which tensor differ, unless `same_bits`.

    For results that went through the same instructions: NaN equals NaN, and 0 is not -0.
    """
    names = getattr(one, "_fields", range(len(one)))
    for name, a, b in zip(names, one, other, strict=True):
        if same_bits([a], [b]):
            continue
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(f"{name} is {_form(a)} once and {_form(b)} once")
        different = different_bits(a, b)
        where = _first(different)
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} elements of {name} differ, first at "
            f"{list(where)}: {a[where].item():.9g} and {b[where].item():.9g}"
        )


def different_bits(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """bool, in the shape of both: where bits differ."""
    as_integers = BITS[one.element_size()]
    return one.contiguous().view(as_integers) != other.contiguous().view(as_integers)


def _form(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _wrong_form(state: State, inputs: Inputs, budget: Budget) -> str | None:
    """What is wrong with shape or dtype of a result."""
    out, lse = state
    exact = budget.exact
    expected = [("out", out, exact.out.shape, inputs.dtype)]
    if lse is not None:
        expected.append(("lse", lse, exact.lse.shape, torch.float32))
    for name, got, shape, dtype in expected:
        if got.shape != shape or got.dtype != dtype:
            return f"{name} is {_form(got)}, expected {dtype} {list(shape)}"
    return None


def _pairs(state: State, budget: Budget) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, what was computed in float64, the truth) of out, and of lse where there is one."""
    out, lse = state
    pairs = [("out", out.double(), budget.exact.out)]
    return pairs if lse is None else [*pairs, ("lse", lse.double(), budget.exact.lse)]


def _strange(got: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """bool: where one is NaN or infinite and the other is not the same."""
    either = ~(got.isfinite() & truth.isfinite())
    wrong = either & (got.nan_to_num(1.5) != truth.nan_to_num(1.5))
    return wrong | (got.isnan() != truth.isnan())


def _deviations(state: State, budget: Budget) -> dict[str, Deviation]:
    found = {}
    for name, got, truth in _pairs(state, budget):
        error = difference(got, truth).masked_fill(_strange(got, truth), float("inf"))
        if name == "lse":
            found["lse"] = _deviation(error, error, budget.lse, got, truth)
        else:
            largest = error.amax(-1) if error.numel() else budget.out
            found["out"] = _deviation(largest, error, budget.out, got, truth)
            found["out_rms"] = _deviation(rms(error), error, budget.out_rms, got, truth)
    return found


def _deviation(
    row_error: torch.Tensor,
    error: torch.Tensor,
    allowed: torch.Tensor,
    got: torch.Tensor,
    truth: torch.Tensor,
) -> Deviation:
    """`row_error` and `allowed` are of rows, the others of elements, or of rows too (lse)."""
    if not row_error.numel():
        return Deviation(allowed, 0.0, 0.0, (), 0.0, 0.0)
    # Without a budget (an empty row, a value that no rounding changes) any error is too much.
    shares = torch.where(allowed > 0, row_error / allowed, row_error / 0.0)
    shares = shares.nan_to_num(0.0, posinf=float("inf"))
    row = _index(int(shares.argmax()), shares.shape)
    where = row if error.shape == row_error.shape else (*row, int(error[row].argmax()))
    return Deviation(
        shares, row_error[row].item(), allowed[row].item(), where, got[where].item(),
        truth[where].item(),
    )  # fmt: skip


def _message(name: str, found: Deviation) -> str:
    return (
        f"{name.replace('_', ' ')} error {found.error:.3g} is over its budget {found.budget:.3g} "
        f"at {name[:3]}{list(found.where)}: {found.got:.9g}, expected {found.expected:.9g} "
        f"({found.over} of {found.shares.numel()} rows)"
    )


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    return _index(int(mask.flatten().to(torch.uint8).argmax()), mask.shape)


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, here = divmod(flat, size)
        index.append(here)
    return tuple(reversed(index))
