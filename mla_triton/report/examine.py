"""A problem computed by every implementation that takes it, and held against its budget.

What is looked at of each: the error of every row in units of its budget, whether repeated calls
give the same bits, whether inputs are as they were, whether anything was written between rows. What
has to be the reference's to the bit, as most of what operations on a cache leave, has no errors to
be measured: the bytes are counted.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mla_triton import check, configs, select
from mla_triton import device as devices
from mla_triton.report.cases import Case
from mla_triton.report.histogram import counts
from mla_triton.testing import cache_results
from mla_triton.testing.budget import Budget, Inputs, budget_of
from mla_triton.testing.cache_results import Bits, CacheInputs, compare_cache
from mla_triton.testing.calls import Snapshot, plan_of, problem_of, run, spilt_results
from mla_triton.testing.comparison import Deviation, compare, deviations, same_bits
from mla_triton.testing.problems import DecodeInputs

CHOICES: dict[str, Callable[..., select.Selection]] = {
    "decode": select.choose_decode,
    "prefill": select.choose_prefill,
    "merge": select.choose_merge,
    **check.CHOICES,
}


@dataclass(frozen=True)
class Measure:
    """By one measure, the row that is closest to its budget or furthest past it."""

    name: str
    """ "out" (largest element of a row), "out_rms" or "lse"; of an append "stored", the numbers of
    a token in the cache."""
    ratio: float
    """Error over budget: up to 1 is right."""
    error: float
    budget: float
    where: tuple[int, ...]
    """Its worst element in `out`, or its place in `lse`; (token, column) of what is stored; ()
    where there is no row."""
    got: float
    expected: float
    rows: int
    over: int
    """Rows past their budget."""
    histogram: tuple[int, ...]
    """`mla_triton.report.histogram.counts` of all rows."""

    @property
    def place(self) -> str:
        """ "out[0, 0, 3, 1]"; "-" where there is no row."""
        return f"{self.name.removesuffix('_rms')}{list(self.where)}" if self.where else "-"

    @property
    def text(self) -> str:
        """The element, for people."""
        if not self.where:
            return "no rows"
        return (
            f"{self.place} is {self.got:.9g}, expected {self.expected:.9g}; "
            f"{self.name.replace('_', ' ')} error {self.error:.3g}, budget {self.budget:.3g}"
        )


@dataclass(frozen=True)
class Row:
    """What came of a case by one implementation."""

    operation: str
    shape: str
    dtype: str
    call: str
    implementation: str
    parts: int | None
    """Into how many a decode was cut, None for what fills the device."""
    config: str
    config_source: str
    """ "user", "shipped" and the like; "-" where there is no config."""
    ok: bool
    message: str
    measures: tuple[Measure, ...]
    """None where it raised, where the result has another shape or dtype, or where all of it has to
    be the reference's to the bit."""
    repeats: int
    differing: int
    """Of the repeats, those with other bits than the first call."""
    seconds: float
    """Of all calls together, compilation of the first included."""
    reproduction: str
    """A line of Python that computes and judges it again."""
    traceback: str = ""
    bits: tuple[Bits, ...] = ()
    """Bytes that have to be the reference's; none of what has budgets alone."""

    @property
    def is_exact(self) -> bool:
        """Whether there are bytes to compare and no errors to measure."""
        return bool(self.bits) and not self.measures

    @property
    def differing_bytes(self) -> int:
        return sum(each.differing for each in self.bits)

    @property
    def worst(self) -> Measure | None:
        """The measure that is closest to its budget or furthest past it."""
        return max(self.measures, key=lambda measure: measure.ratio, default=None)


def examine(todo: Sequence[Case], device: torch.device, repeats: int) -> Iterator[Row]:
    """Each case by each implementation that takes it, as one row after another.

    The reference, which is what the oracle is made of, runs the first case of an operation alone. A
    case that raises is a row that failed, and the others go on.
    """
    seen: set[str] = set()
    for case in todo:
        first = case.operation not in seen
        seen.add(case.operation)
        try:
            inputs = case.inputs(device)
            budget = None if isinstance(inputs, CacheInputs) else budget_of(inputs)
            taking = implementations(case.operation, inputs)
        except Exception as error:
            yield _failed(case, "-", None, device, repeats, error, 0.0)
            continue
        for impl in taking:
            if impl == "reference" and not first and len(taking) > 1:
                continue
            for parts in case.parts if impl != "reference" else (None,):
                yield _examined(case, impl, parts, inputs, budget, device, repeats)


def known(inputs: Inputs | CacheInputs) -> tuple[Any, devices.Device]:
    """(problem, card): what an implementation is chosen by."""
    if isinstance(inputs, CacheInputs):
        place = cache_results.device_of(inputs)
        return cache_results.problem_of(inputs), devices.of(place)
    return problem_of(inputs), devices.of(inputs.output_buffers()["out"].device)


def implementations(operation: str, inputs: Inputs | CacheInputs) -> list[str]:
    """Names of those that take a problem when they are asked for, best first."""
    choose, (problem, device) = CHOICES[operation], known(inputs)
    # The reference takes everything, so asking for it gives the names of all.
    names = [name for name, _ in choose(problem, device, "reference").reasons]

    def takes(name: str) -> bool:
        try:
            choose(problem, device, name)
        except NotImplementedError:
            return False
        return True

    return [name for name in names if takes(name)]


def _examined(
    case: Case,
    impl: str,
    parts: int | None,
    inputs: Inputs | CacheInputs,
    budget: Budget | None,
    device: torch.device,
    repeats: int,
) -> Row:
    begun = time.perf_counter()
    try:
        before = Snapshot(inputs)
        result = run(inputs, impl=impl, parts=parts)
        same: Callable[[Any, Any], bool] = (
            cache_results.same_result if isinstance(inputs, CacheInputs) else same_bits
        )
        differing = sum(
            not same(result, run(inputs, impl=impl, parts=parts)) for _ in range(repeats)
        )
        seconds = time.perf_counter() - begun
        wrong, found, bits, spilt = _judged(result, inputs, budget)
        measures = tuple(_measure(name, each) for name, each in found.items())
        if differing:
            wrong.append(f"{differing} of {repeats} repeats have other bits than the first call")
        written = before.written()
        if written:
            wrong.append(f"{', '.join(written)} must be read only, and changed")
        if spilt:
            wrong.append(f"what lies between rows of {spilt} was written")
        config, source = _config(case.operation, impl, parts, inputs)
    except Exception as error:
        return _failed(case, impl, parts, device, repeats, error, time.perf_counter() - begun)
    return Row(
        case.operation, case.shape, case.dtype, case.call, impl, parts, config, source,
        not wrong, "; ".join(wrong) or ("within budget" if measures else "equal bits"), measures,
        repeats, differing, seconds, reproduction(case, impl, parts, device, repeats), bits=bits,
    )  # fmt: skip


def _judged(
    result: Any, inputs: Inputs | CacheInputs, budget: Budget | None
) -> tuple[list[str], dict[str, Deviation], tuple[Bits, ...], str]:
    """(what is wrong, measures, bytes that were compared, what was written between its rows)."""
    if isinstance(inputs, CacheInputs):
        found = compare_cache(result, inputs)
        measures = {} if found.stored is None else {"stored": found.stored}
        return [] if found.ok else [found.message], measures, found.bits, ""
    report = compare(result, inputs, budget)
    wrong = [] if report.ok else [report.message]
    return wrong, deviations(result, inputs, budget), (), spilt_results(result, inputs)


def _failed(
    case: Case,
    impl: str,
    parts: int | None,
    device: torch.device,
    repeats: int,
    error: Exception,
    seconds: float,
) -> Row:
    return Row(
        case.operation, case.shape, case.dtype, case.call, impl, parts, "-", "-", False,
        f"{type(error).__name__}: {error}", (), repeats, 0, seconds,
        reproduction(case, impl, parts, device, repeats),
        "".join(traceback.format_exception(error)),
    )  # fmt: skip


def reproduction(
    case: Case, impl: str, parts: int | None, device: torch.device, repeats: int
) -> str:
    """A line that raises what is wrong about a row, and nothing where nothing is."""
    options = "" if impl == "-" else f", impl={impl!r}"
    options += "" if parts is None else f", parts={parts}"
    return (
        "import torch; from mla_triton.testing import *; "
        f"assert_correct({case.code(device)}, lambda i: run(i{options}), repeats={repeats + 1})"
    )


def _measure(name: str, found: Deviation) -> Measure:
    return Measure(
        name, found.worst, found.error, found.budget, found.where, found.got, found.expected,
        found.shares.numel(), found.over, tuple(counts(found.shares)),
    )  # fmt: skip


def _config(
    operation: str, impl: str, parts: int | None, inputs: Inputs | CacheInputs
) -> tuple[str, str]:
    """(config, where it is from) of a call, "-" for the reference, which has none."""
    if impl == "reference":
        return "-", "-"
    problem, device = known(inputs)
    module = CHOICES[operation](problem, device, impl).module
    row_tile = None
    if isinstance(inputs, DecodeInputs):
        like = None if parts is None else plan_of(inputs, impl, parts).geometry
        row_tile = module.geometry(problem, device, like=like).row_tile
    choice = configs.choose(module, problem, device, row_tile)
    return str(choice.config).removeprefix("Config(").removesuffix(")"), choice.source
