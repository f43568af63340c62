"""How pytest runs a library's test files here: which of the tests, and how they count."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[2]
OURS = (ROOT / "mla_triton", ROOT / "tests" / "rivals")

OUTCOMES = ("passed", "failed", "out of scope", "skipped", "not run")

SCRIPT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Limit = Callable[[str, Any], Any]


@contextlib.contextmanager
def defaults_restored() -> Iterator[None]:
    """Undoes what tests leave behind: their default dtype and device."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)


def calls_of_script(module: ModuleType, name: str, dtype: torch.dtype) -> list[list[Any]]:
    """The arguments of each call of a test function that a script's `main` makes."""
    signature = inspect.signature(getattr(module, name))
    calls: list[list[Any]] = []

    def record(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(list(bound.arguments.values()))

    with defaults_restored(), mock.patch.object(module, name, record):
        module.main(dtype)
    return calls


def refusal(error: BaseException | None) -> str | None:
    """What a NotImplementedError says that is raised here, not by torch, and may be wrapped."""
    while error is not None and not isinstance(error, NotImplementedError):
        error = error.__cause__
    if error is None or error.__traceback__ is None:
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    path = Path(frame.f_code.co_filename)
    return str(error) if any(folder in path.parents for folder in OURS) else None


class Rivals:
    """A pytest plugin.

    Tests that are parametrised by pytest run as they are. A script, whose `main(dtype)` calls its
    test functions, is run for both dtypes, a test for each call; of its parameter objects
    `test_performance` is set False, for it looks for a CUDA kernel by name.
    """

    def __init__(self, *, sample: int | None, limit: Limit | None) -> None:
        """
        Args:
            sample: the most tests of one function that are run, drawn at random but always the
                same; None for all.
            limit: what a parameter of this name and value is cut to.
        """
        self._sample = sample
        self._limit = limit
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        """Of each file and test function, how many tests had which outcome."""
        self.reasons: Counter[str] = Counter()
        """Why tests are out of scope."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        marked = list(metafunc.definition.iter_markers("parametrize"))
        if not marked and hasattr(metafunc.module, "main"):
            self._parametrize_script(metafunc)
        elif self._limit is not None and marked:
            given = metafunc.parametrize
            metafunc.parametrize = lambda names, values, *args, **kwargs: given(  # type: ignore
                names, self._limited(names, values), *args, **kwargs
            )

    def _limited(self, names: Any, values: Any) -> list[Any]:
        assert self._limit is not None
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        cut: list[Any] = []
        for value in values:
            if len(names) == 1:
                new = self._limit(names[0], value)
            elif isinstance(value, (tuple, list)):
                new = tuple(map(self._limit, names, value))
            else:
                new = value
            if not any(type(one) is type(new) and one == new for one in cut):
                cut.append(new)
        return cut

    def _parametrize_script(self, metafunc: pytest.Metafunc) -> None:
        names = list(inspect.signature(metafunc.function).parameters)
        if not names:
            return
        cases = []
        for label, dtype in SCRIPT_DTYPES.items():
            calls = calls_of_script(metafunc.module, metafunc.function.__name__, dtype)
            for index, values in enumerate(calls):
                small = [
                    self._small(name, value) for name, value in zip(names, values, strict=True)
                ]
                mark = pytest.mark.default_dtype(dtype)
                cases.append(pytest.param(*small, id=f"{label}-{index}", marks=mark))
        metafunc.parametrize(names, cases)

    def _small(self, name: str, value: Any) -> Any:
        if not dataclasses.is_dataclass(value):
            return value if self._limit is None else self._limit(name, value)
        new = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if self._limit is not None:
            new = {name: self._limit(name, one) for name, one in new.items()}
        if "test_performance" in new:
            new["test_performance"] = False
        return dataclasses.replace(value, **new)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        if self._sample is None:
            return
        groups: dict[str, list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            groups[self._where(item.nodeid)].append(index)
        chosen: set[int] = set()
        for name, indices in groups.items():
            drawn = random.Random(0).sample(indices, min(self._sample, len(indices)))
            chosen.update(drawn)
            self.counts[name]["not run"] += len(indices) - len(drawn)
        config.hook.pytest_deselected(
            items=[item for index, item in enumerate(items) if index not in chosen]
        )
        items[:] = [item for index, item in enumerate(items) if index in chosen]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        with defaults_restored():
            mark = item.get_closest_marker("default_dtype")
            if mark is not None:
                # What a script's main sets before its calls.
                torch.set_default_dtype(mark.args[0])
                torch.set_default_device("cuda:0")
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        report = yield
        outcome = report.outcome
        reason = None if call.excinfo is None else refusal(call.excinfo.value)
        if reason is not None:
            report.outcome, outcome = "skipped", "out of scope"
            report.longrepr = (str(item.path), item.location[1] or 0, reason)
            self.reasons[reason] += 1
        if report.when == "call" or outcome != "passed":
            self.counts[self._where(item.nodeid)][outcome] += 1
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts[report.nodeid]["failed"] += 1

    @staticmethod
    def _where(nodeid: str) -> str:
        return nodeid.split("[")[0]

    def table(self) -> str:
        lines = [f"| test | {' | '.join(OUTCOMES)} |", f"| --- |{' --- |' * len(OUTCOMES)}"]
        total: Counter[str] = Counter()
        for name, counts in self.counts.items():
            total += counts
            lines.append(f"| {name} | {' | '.join(str(counts[one]) for one in OUTCOMES)} |")
        lines.append(f"| all | {' | '.join(str(total[one]) for one in OUTCOMES)} |")
        if self.reasons:
            lines += ["", "Out of scope:"]
            lines += [f"* {count} × {reason}" for reason, count in self.reasons.most_common()]
        return "\n".join(lines)
